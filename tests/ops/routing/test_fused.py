"""The fused routing gives what plain torch gives: interpreted here, compiled on a GPU."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertune.ops.routing import fused
from expertune.ops.routing.fused import fused_select_experts
from expertune.ops.routing.select import select_experts
from expertune.ops.routing.types import Routing, RoutingRule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # NumPy's, in the interpreter: inf - inf
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

SCORES = ("softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen", "sigmoid_of_chosen")
RULES = {
    "qwen": RoutingRule(8, "softmax", normalize=True),
    "mixtral": RoutingRule(2, "softmax", normalize=True),
    "gpt-oss": RoutingRule(4, "softmax_of_chosen"),
    "llama4": RoutingRule(1, "sigmoid_of_chosen"),
    "deepseek-v2": RoutingRule(6, "softmax", scaling=16.0, num_groups=8, top_groups=3, group_experts=1),
    "deepseek-v3": RoutingRule(8, "sigmoid", True, 1e-20, 2.5, num_groups=8, top_groups=4),
    "deepseek-v4": RoutingRule(6, "sqrt_softplus", True, 1e-20, 1.5),
    "others count as 0": RoutingRule(5, "sigmoid", True, num_groups=4, top_groups=1, group_experts=1, other_groups=0.0),
}


def route(
    select: Callable[..., Routing], logits_TE: Tensor, rule: RoutingRule, dweights_TK: Tensor, **given: object
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, ids, dlogits)."""
    leaf = logits_TE.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    routing = select(leaf, rule, **given)
    assert routing.logits_TE is leaf
    (dlogits_TE,) = torch.autograd.grad(routing.weights_TK, leaf, dweights_TK.to(routing.weights_TK.dtype))
    return routing.weights_TK.detach(), routing.expert_ids_TK, dlogits_TE


def error(got: Tensor, want: Tensor, scale: float = 0.0) -> float:
    """L2 error relative to what is wanted, or to `scale` where that is more; finite, or it says so."""
    assert got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=max(scale, 1e-30)))


def assert_same(logits_TE: Tensor, rule: RoutingRule, **given: object) -> None:
    """Against torch in fp32 (in the logits' own dtype, which bounds dlogits). Random logits: no scores nearly tie."""
    generator = torch.Generator().manual_seed(1)
    dweights_TK = torch.randn(logits_TE.shape[0], rule.top_k, generator=generator).to(logits_TE.device)
    got, want = (
        route(select, logits_TE, rule, dweights_TK, **given) for select in (fused_select_experts, select_experts)
    )
    assert got[0].dtype == want[0].dtype
    assert got[1].dtype == torch.int64
    assert got[2].dtype == logits_TE.dtype
    assert torch.equal(got[1], want[1])
    # A unit in the last place: the interpreter cuts where a GPU rounds.
    precision = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
    assert error(got[0], want[0]) <= 1e-6 + precision[want[0].dtype]
    # The gradient of a softmax over one expert is a difference that is zero: its terms are of the size of dweights.
    scale = 1e-2 * float(dweights_TK.norm()) if logits_TE.shape[1] == 1 else 0.0
    assert error(got[2], want[2], scale) <= 1e-5 + precision[logits_TE.dtype]


def random_logits(tokens: int, experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Distinct in each row also in 16 bits: a row is a shuffled ladder, with noise in fp32."""
    generator = torch.Generator().manual_seed(seed)
    ladder = torch.linspace(-4, 4, experts).repeat(tokens, 1)
    if dtype == torch.float32:
        ladder = ladder + torch.randn(tokens, experts, generator=generator)
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    return ladder.gather(1, order).to(dtype).to(DEVICE)


def random_bias(experts: int) -> Tensor:
    return 0.3 * torch.randn(experts, generator=torch.Generator().manual_seed(2)).to(DEVICE)


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("experts", [8, 64, 160])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_agrees_with_torch(rule: RoutingRule, experts: int, with_bias: bool) -> None:
    if rule.has_groups and rule.top_k > rule.top_groups * experts // rule.num_groups:
        pytest.skip("the best groups have too few experts")
    if rule.group_experts > experts // rule.num_groups:
        pytest.skip("a group has too few experts")
    assert_same(random_logits(21, experts), rule, bias_E=random_bias(experts) if with_bias else None)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (1, 128, 8), (3, 5, 5), (7, 16, 16), (9, 100, 3), (2, 257, 10), (5, 512, 22), (2, 1024, 2)],
)
@pytest.mark.parametrize("score", SCORES)
def test_shapes(tokens: int, experts: int, top_k: int, score: str) -> None:
    normalize = top_k > 1  # a single weight is 1 then, and its gradient rounding errors
    assert_same(random_logits(tokens, experts), RoutingRule(top_k, score, normalize, scaling=1.7))


@pytest.mark.parametrize(("num_groups", "top_groups", "group_experts"), [(3, 2, 4), (16, 5, 2), (24, 7, 1), (2, 1, 3)])
def test_groups_of_any_size(num_groups: int, top_groups: int, group_experts: int) -> None:
    rule = RoutingRule(
        4, "sigmoid", True, num_groups=num_groups, top_groups=top_groups, group_experts=group_experts
    )  # fmt: skip
    assert_same(random_logits(17, 48), rule, bias_E=random_bias(48))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_16_bits(score: str, dtype: torch.dtype) -> None:
    logits_TE = random_logits(13, 96, dtype)
    assert_same(logits_TE, RoutingRule(6, score, normalize=True))
    assert_same(logits_TE, RoutingRule(6, score), weights_dtype=dtype)
    assert_same(logits_TE, RoutingRule(6, score, num_groups=6, top_groups=2), bias_E=random_bias(96).to(dtype))


def test_strides() -> None:
    rule, logits_TE = RoutingRule(3, normalize=True), random_logits(24, 40)
    for strided in (logits_TE.t().contiguous().t(), logits_TE.repeat(1, 2)[:, :40], logits_TE[::2], logits_TE[:, ::2]):
        assert_same(strided, rule)
    dweights_TK = torch.randn(3, 24, device=DEVICE).t()
    got, want = (route(select, logits_TE, rule, dweights_TK) for select in (fused_select_experts, select_experts))
    assert error(got[2], want[2]) < 1e-5


@pytest.mark.parametrize("score", SCORES)
def test_no_token(score: str) -> None:
    logits_TE = torch.empty(0, 6, device=DEVICE)
    weights_TK, ids_TK, dlogits_TE = route(
        fused_select_experts, logits_TE, RoutingRule(2, score), torch.empty(0, 2, device=DEVICE)
    )
    assert (weights_TK.shape, ids_TK.shape, dlogits_TE.shape) == ((0, 2), (0, 2), (0, 6))


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lowest_expert(score: str) -> None:
    logits_TE = torch.zeros(3, 70, device=DEVICE)
    logits_TE[1, [65, 3, 40, 9]] = 1.0
    logits_TE[2] = torch.tensor([0.0, -0.0] * 35)
    ids_TK = fused_select_experts(logits_TE, RoutingRule(6, score)).expert_ids_TK
    assert ids_TK.tolist() == [[0, 1, 2, 3, 4, 5], [3, 9, 40, 65, 0, 1], [0, 1, 2, 3, 4, 5]]
    grouped = RoutingRule(6, score, num_groups=7, top_groups=2)
    assert (
        fused_select_experts(logits_TE, grouped).expert_ids_TK.tolist()
        == select_experts(logits_TE, grouped).expert_ids_TK.tolist()
    )


ODD = [float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 0.0, -0.0, 1.0, 1.0, 2.0]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_ids_are_in_range_and_distinct_whatever_the_logits(data: st.DataObject) -> None:
    """NaN, infinities and ties: the ids and the weights that are NaN, as in torch."""
    experts = data.draw(st.sampled_from([1, 4, 6, 12, 36]))
    num_groups = data.draw(st.sampled_from([groups for groups in (1, 2, 3, 4) if experts % groups == 0]))
    top_groups = data.draw(st.integers(1, num_groups))
    size = experts // num_groups
    rule = RoutingRule(
        top_k=data.draw(st.integers(1, top_groups * size)),
        score=data.draw(st.sampled_from(SCORES)),
        normalize=data.draw(st.booleans()),
        num_groups=num_groups,
        top_groups=top_groups,
        group_experts=data.draw(st.integers(1, min(2, size))),
    )
    row = st.lists(st.sampled_from(ODD), min_size=experts, max_size=experts)
    logits_TE = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=5)), device=DEVICE)
    bias_E = torch.tensor(data.draw(row), device=DEVICE) if data.draw(st.booleans()) else None
    got, want = (select(logits_TE, rule, bias_E=bias_E) for select in (fused_select_experts, select_experts))
    assert got.expert_ids_TK.min() >= 0
    assert got.expert_ids_TK.max() < experts
    assert all(len(set(ids)) == rule.top_k for ids in got.expert_ids_TK.tolist())
    assert torch.equal(got.expert_ids_TK, want.expert_ids_TK)
    torch.testing.assert_close(got.weights_TK, want.weights_TK, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_a_nan_shows_in_its_own_row_alone() -> None:
    logits_TE = random_logits(4, 20)
    logits_TE[2, 7] = float("nan")
    for score in SCORES:
        weights_TK = fused_select_experts(logits_TE, RoutingRule(3, score, normalize=True)).weights_TK
        assert weights_TK.isnan().all(dim=1).tolist() == [False, False, True, False]


def test_gradients_of_an_auxiliary_loss_add_up() -> None:
    rule, logits_TE = RoutingRule(4, normalize=True), random_logits(11, 32)

    def grad(select: Callable[..., Routing]) -> Tensor:
        leaf = logits_TE.clone().requires_grad_()
        routing = select(leaf, rule)
        loss = (routing.weights_TK * torch.arange(4, device=DEVICE)).sum() + routing.logits_TE.logsumexp(
            1
        ).square().sum()
        return torch.autograd.grad(loss, leaf)[0]

    assert error(grad(fused_select_experts), grad(select_experts)) < 1e-5


def test_no_gradient_for_nothing() -> None:
    logits_TE = random_logits(3, 8)
    assert not fused_select_experts(logits_TE, RoutingRule(2)).weights_TK.requires_grad
    routing = fused_select_experts(logits_TE.requires_grad_(), RoutingRule(2))
    assert not routing.expert_ids_TK.requires_grad


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_compiled(score: str) -> None:
    """torch.compile in one graph; the ops' fakes and gradients are what torch expects."""
    rule, bias_E = RoutingRule(3, score, True, 1e-9, 2.0, num_groups=4, top_groups=2), random_bias(16)
    compiled = torch.compile(fused_select_experts, fullgraph=True, backend="aot_eager")
    dweights_TK = torch.randn(10, 3, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    got = route(compiled, random_logits(10, 16), rule, dweights_TK, bias_E=bias_E)
    want = route(fused_select_experts, random_logits(10, 16), rule, dweights_TK, bias_E=bias_E)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    fields = (3, score, True, 1e-9, 2.0, 4, 2, 2, float("-inf"))
    leaf = random_logits(5, 16).requires_grad_()
    torch.library.opcheck(fused._select_op, (leaf, bias_E, torch.float32, *fields))
    torch.library.opcheck(fused._select_backward_op, (leaf.detach(), want[1][:5], dweights_TK[:5], *fields[1:5]))


def test_fp64_and_very_many_experts_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(fused, "_launch_select", refuse)
    for logits_TE in (random_logits(2, 6).double(), random_logits(2, fused.MAX_EXPERTS + 1)):
        got, want = (select(logits_TE, RoutingRule(2)) for select in (fused_select_experts, select_experts))
        assert torch.equal(got.weights_TK, want.weights_TK)
        assert torch.equal(got.expert_ids_TK, want.expert_ids_TK)


def test_errors_are_those_of_torchs_path() -> None:
    with pytest.raises(ValueError, match="top_k: got 9, need 1 to 8"):
        fused_select_experts(random_logits(2, 8), RoutingRule(9))
    with pytest.raises(ValueError, match=r"bias_E: got shape \(3,\)"):
        fused_select_experts(random_logits(2, 8), RoutingRule(2), bias_E=torch.zeros(3))


# On a GPU in real sizes.

REAL = [
    pytest.param(RULES[name], experts, dtype, id=f"{name}-{experts}-{dtype}")
    for name, experts, dtype in (
        ("qwen", 128, torch.bfloat16),
        ("qwen", 256, torch.float32),
        ("deepseek-v3", 256, torch.float32),
        ("deepseek-v2", 160, torch.float32),
        ("gpt-oss", 32, torch.bfloat16),
        ("deepseek-v4", 384, torch.float32),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(("rule", "experts", "dtype"), REAL)
def test_real_sizes(rule: RoutingRule, experts: int, dtype: torch.dtype) -> None:
    """Scores a few roundings apart may change places: then the scores that were chosen are equal within 1e-5."""
    logits_TE = torch.randn(8191, experts, device="cuda").to(dtype)
    bias_E = random_bias(experts)
    got, want = (select(logits_TE, rule, bias_E=bias_E) for select in (fused_select_experts, select_experts))
    same_T = (got.expert_ids_TK == want.expert_ids_TK).all(dim=1)
    assert same_T.float().mean() > 0.995
    assert error(got.weights_TK[same_T], want.weights_TK[same_T]) < 1e-6
    torch.testing.assert_close(got.weights_TK.sum(1), want.weights_TK.sum(1), rtol=1e-4, atol=1e-6)
    dweights_TK = torch.randn_like(got.weights_TK)
    got_grad, want_grad = (
        route(select, logits_TE[same_T], rule, dweights_TK[same_T], bias_E=bias_E)[2]
        for select in (fused_select_experts, select_experts)
    )
    assert error(got_grad, want_grad) < (1e-5 if dtype == torch.float32 else 2.0**-8)


@pytest.mark.gpu
@pytest.mark.parametrize(("rule", "experts", "dtype"), REAL)
def test_two_runs_agree_in_every_bit_on_any_stream(rule: RoutingRule, experts: int, dtype: torch.dtype) -> None:
    logits_TE = torch.randn(4099, experts, device="cuda").to(dtype)
    dweights_TK = torch.randn(4099, rule.top_k, device="cuda")
    first = route(fused_select_experts, logits_TE, rule, dweights_TK)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = route(fused_select_experts, logits_TE, rule, dweights_TK)
    torch.cuda.current_stream().wait_stream(stream)
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    rule, static = RULES["qwen"], torch.randn(512, 128, device="cuda")
    dweights_TK = torch.randn(512, 8, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        leaf = static.detach().requires_grad_()
        routing = fused_select_experts(leaf, rule)
        (grad,) = torch.autograd.grad(routing.weights_TK, leaf, dweights_TK)
        return routing.weights_TK.detach(), routing.expert_ids_TK, grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    static.copy_(torch.randn_like(static))
    graph.replay()
    for mine, want in zip(results, step(), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31() -> None:
    logits_TE = torch.zeros(2**31 // 512 + 5, 512, device="cuda", dtype=torch.bfloat16)
    logits_TE[-1, 500] = 1.0
    ids_TK = fused_select_experts(logits_TE, RoutingRule(2)).expert_ids_TK
    assert ids_TK[-1].tolist() == [500, 0]
