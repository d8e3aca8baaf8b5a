"""The auxiliary losses, against Transformers' own and against their formulas."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from expertune.ops.routing.losses import load_balancing_loss, z_loss
from expertune.ops.routing.select import select_experts
from expertune.ops.routing.types import Routing, RoutingRule

BATCH, LENGTH = 3, 7
MASKS = [
    None,
    torch.ones(BATCH, LENGTH, dtype=torch.int64),
    torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [1] * 5 + [0] * 2]),
]


def layers(num_layers: int, *, top_k: int = 2, num_experts: int = 8, score: str = "softmax") -> list[Routing]:
    torch.manual_seed(0)
    rule = RoutingRule(top_k, score)  # type: ignore[arg-type]
    return [
        select_experts(torch.randn(BATCH * LENGTH, num_experts, requires_grad=True), rule) for _ in range(num_layers)
    ]


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "all", "padding"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (16, 5), (4, 4), (8, 1)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_of_chosen"])
def test_equal_to_transformers(
    num_layers: int, mask: torch.Tensor | None, num_experts: int, top_k: int, score: str
) -> None:
    routings = layers(num_layers, top_k=top_k, num_experts=num_experts, score=score)
    logits = tuple(each.logits_TE for each in routings)
    want = load_balancing_loss_func(logits, num_experts, top_k, mask)
    got = load_balancing_loss(routings, attention_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for ours, theirs in zip(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    if num_layers == 1:
        assert torch.equal(load_balancing_loss(routings[0], attention_mask=mask), got)


def test_an_even_load_gives_top_k() -> None:
    ids_TK = torch.arange(16).view(8, 2) % 8
    routing = Routing(torch.full((8, 2), 0.5), ids_TK, torch.zeros(8, 8))
    torch.testing.assert_close(load_balancing_loss(routing), torch.tensor(2.0))


def test_the_ids_that_were_chosen_count() -> None:
    """With a correction bias they are not those of the largest logits."""
    logits_TE = torch.zeros(4, 8).index_fill(1, torch.tensor([0]), 1.0)
    bias_E = torch.zeros(8).index_fill(0, torch.tensor([7]), 9.0)
    routing = select_experts(logits_TE, RoutingRule(1, "sigmoid"), bias_E=bias_E)
    torch.testing.assert_close(load_balancing_loss(routing), 8 * logits_TE.softmax(1)[0, 7])


@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "all", "padding"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_z_loss(mask: torch.Tensor | None, num_layers: int) -> None:
    routings = layers(num_layers)
    rows = torch.cat([each.logits_TE.exp().sum(dim=1).log() ** 2 for each in routings])
    counts = torch.ones_like(rows) if mask is None else mask.flatten().float().repeat(num_layers)
    got = z_loss(routings, attention_mask=mask)
    torch.testing.assert_close(got, (rows * counts).sum() / counts.sum())
    for layer, gradient in zip(routings, torch.autograd.grad(got, [each.logits_TE for each in routings]), strict=True):
        z_T1 = layer.logits_TE.logsumexp(dim=1, keepdim=True)
        count_T1 = counts[: BATCH * LENGTH].unsqueeze(1)
        want = 2 * z_T1 * layer.logits_TE.softmax(dim=1) * count_T1 / counts.sum()
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_gradients_in_fp64(loss) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    logits_TE = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    rule = RoutingRule(2)
    assert torch.autograd.gradcheck(lambda logits: loss(select_experts(logits, rule)), (logits_TE,))


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_no_token_and_nothing_but_padding(loss) -> None:  # type: ignore[no-untyped-def]
    routing = select_experts(torch.zeros(0, 8), RoutingRule(2))
    assert loss(routing) == 0
    routing = select_experts(torch.randn(4, 8), RoutingRule(2))
    assert loss(routing, attention_mask=torch.zeros(4)) == 0


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_low_precision_logits_are_summed_in_fp32(loss) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    logits_TE = torch.randn(2000, 8).bfloat16()
    routing = select_experts(logits_TE, RoutingRule(2))
    exact = select_experts(logits_TE.double(), RoutingRule(2))
    torch.testing.assert_close(loss(routing), loss(exact).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_what_does_not_belong_together(loss) -> None:  # type: ignore[no-untyped-def]
    routing = select_experts(torch.randn(4, 8), RoutingRule(2))
    with pytest.raises(ValueError, match="at least one"):
        loss([])
    with pytest.raises(ValueError, match="one shape"):
        loss([routing, select_experts(torch.randn(5, 8), RoutingRule(2))])
    with pytest.raises(ValueError, match="attention_mask"):
        loss(routing, attention_mask=torch.ones(5))
