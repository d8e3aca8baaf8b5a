"""The choice of experts: equal to the routers of Transformers, and its own rules on ties, NaN and groups."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertune.ops.routing import select
from expertune.ops.routing.select import select_experts
from expertune.ops.routing.types import OF_CHOSEN, Routing, RoutingRule

NAN = float("nan")
SCORES = ("softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen", "sigmoid_of_chosen")
ROOT = Path(__file__).parents[3]


# Against the routers of Transformers


@dataclass(frozen=True)
class Family:
    """A router class of Transformers, what its configuration says, and the same as a rule.

    call: how to run it on logits and bias, if not by the hidden states alone.
    """

    path: str
    rule: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    call: Callable[[Any, Tensor, Tensor | None], Any] | None = None
    has_bias: bool = False
    num_groups: int = 1

    def __str__(self) -> str:
        return self.path.rpartition(".")[2]


V3 = {"score": "sigmoid", "epsilon": 1e-20, "group_experts": 2}
FAMILIES = (
    Family("qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter", {"score": "softmax"}),
    Family("olmoe.modeling_olmoe.OlmoeTopKRouter", {"score": "softmax"}),
    Family("mixtral.modeling_mixtral.MixtralTopKRouter", {"score": "softmax", "normalize": True}),
    Family("gpt_oss.modeling_gpt_oss.GptOssTopKRouter", {"score": "softmax_of_chosen", "normalize": False}),
    Family("granitemoe.modeling_granitemoe.GraniteMoeTopKRouter", {"score": "softmax_of_chosen", "normalize": False}),
    Family("deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter", V3, has_bias=True, num_groups=4),
    Family("deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter", V3, has_bias=True),
    Family("glm4_moe.modeling_glm4_moe.Glm4MoeTopkRouter", V3, has_bias=True),
    Family("glm4_moe.modeling_glm4_moe.Glm4MoeTopkRouter", V3, has_bias=True, num_groups=2),
    Family("mistral4.modeling_mistral4.Mistral4TopkRouter", {"score": "softmax", "epsilon": 1e-20}, num_groups=4),
    Family(
        "deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter",
        {"score": "softmax", "normalize": False, "group_experts": 1},
        {"topk_method": "group_limited_greedy"},
        num_groups=4,
    ),
    Family(
        "deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter",
        {"score": "softmax", "normalize": False},
        {"topk_method": "greedy"},
    ),
    Family(
        "deepseek_v4.modeling_deepseek_v4.DeepseekV4TopKRouter",
        {"score": "sqrt_softplus", "normalize": True, "epsilon": 1e-20},
        {"scoring_func": "sqrtsoftplus"},
        has_bias=True,
    ),
    Family(
        "minimax_m2.modeling_minimax_m2.MiniMaxM2TopKRouter",
        {"score": "sigmoid", "normalize": True},
        call=lambda router, logits, bias: router(logits, bias),
        has_bias=True,
    ),
    Family(
        "lfm2_moe.modeling_lfm2_moe.Lfm2MoeTopKRouter",
        {"score": "sigmoid", "epsilon": 1e-6},
        {"use_expert_bias": True},
        call=lambda router, logits, bias: router(logits, bias),
        has_bias=True,
    ),
    Family(
        "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeTopKRouter",
        {"score": "softmax", "normalize": True},
        {"moe_norm_min": 1e-12},
        has_bias=True,
    ),
    Family("kolibri1.modeling_kolibri1.Kolibri1TopKRouter", {"score": "sigmoid_of_chosen"}, has_bias=True),
    Family(
        "cohere2_moe.modeling_cohere2_moe.Cohere2MoeTopKRouter",
        {"score": "sigmoid_of_chosen"},
        {"expert_selection_fn": "sigmoid"},
    ),
)
SIZES = [(8, 2), (16, 4), (20, 3), (64, 8), (128, 8), (8, 1)]
SCALED = ("deepseek_v2", "deepseek_v3", "deepseek_v4", "glm4_moe", "mistral4", "lfm2_moe")


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("plain", [False, True], ids=["", "no bias, no scaling"])
def test_equal_to_the_router_of_transformers(
    family: Family, num_experts: int, top_k: int, norm: bool, plain: bool
) -> None:
    folder, file, name = family.path.split(".")
    try:
        router_class = getattr(importlib.import_module(f"transformers.models.{folder}.{file}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this Transformers has no {name}")
    num_groups = family.num_groups
    top_groups = min(num_groups, max(2, -(-top_k * num_groups // num_experts)))
    scaling = 2.5 if folder in SCALED and not plain else 1.0
    config = {
        "num_experts_per_tok": top_k, "hidden_size": num_experts, "num_experts": num_experts,
        "num_local_experts": num_experts, "norm_topk_prob": norm, "routed_scaling_factor": scaling,
        "n_group": num_groups, "topk_group": top_groups,
    }  # fmt: skip
    router = router_class(SimpleNamespace(**config, **family.config))
    generator = torch.Generator().manual_seed(num_experts + top_k)
    router.weight.data = torch.eye(num_experts)  # so that the hidden states are the logits
    logits_TE = torch.randn(50, num_experts, generator=generator) * 2
    bias_E = None
    if family.has_bias:
        bias_E = torch.randn(num_experts, generator=generator) * (0.0 if plain else 0.1)
        holder = getattr(router, "moe_statics", router)
        if hasattr(holder, "e_score_correction_bias"):
            holder.e_score_correction_bias.data.copy_(bias_E.view_as(holder.e_score_correction_bias))
    with torch.no_grad():
        outputs = family.call(router, logits_TE, bias_E) if family.call else router(logits_TE)
    ids_TK, weights_TK = (
        next(each for each in outputs if each.shape == (50, top_k) and each.is_floating_point() == kind)
        for kind in (False, True)
    )
    options = {
        "normalize": norm, "scaling": scaling, "num_groups": num_groups, "top_groups": top_groups, **family.rule
    }  # fmt: skip
    got = select_experts(logits_TE, RoutingRule(top_k, **options), bias_E=bias_E)
    ours, theirs = got.expert_ids_TK.sort(dim=1), ids_TK.sort(dim=1)
    assert torch.equal(ours.values, theirs.values)
    torch.testing.assert_close(
        got.weights_TK.gather(1, ours.indices), weights_TK.gather(1, theirs.indices), rtol=1e-6, atol=1e-7
    )


# What holds for every rule


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, RoutingRule, Tensor | None]:
    """Logits with ties, a rule that can choose among them, and perhaps a bias."""
    num_groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    group_size = draw(st.integers(2, 6))
    top_groups = draw(st.integers(1, num_groups))
    rule = RoutingRule(
        top_k=draw(st.integers(1, top_groups * group_size)),
        score=draw(st.sampled_from(SCORES)),
        normalize=draw(st.booleans()),
        epsilon=draw(st.sampled_from([0.0, 1e-20])),
        scaling=draw(st.sampled_from([1.0, 2.5])),
        num_groups=num_groups,
        top_groups=top_groups,
        group_experts=draw(st.integers(1, 2)),
    )
    num_experts, num_tokens = num_groups * group_size, draw(st.integers(0, 6))
    number = st.sampled_from([-3.0, -1.0, 0.0, 0.0, 0.5, 2.0])
    values = draw(st.lists(number, min_size=num_tokens * num_experts, max_size=num_tokens * num_experts))
    bias = draw(st.none() | st.lists(number, min_size=num_experts, max_size=num_experts))
    return torch.tensor(values).view(num_tokens, num_experts), rule, None if bias is None else torch.tensor(bias)


def choice(logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None) -> Tensor:
    """What is chosen by, written out once more."""
    scores = {
        "softmax": torch.softmax(logits_TE, -1),
        "sigmoid": torch.sigmoid(logits_TE),
        "sqrt_softplus": torch.nn.functional.softplus(logits_TE).sqrt(),
    }.get(rule.score, logits_TE)
    return scores if bias_E is None else scores + bias_E


@settings(max_examples=300, deadline=None)
@given(cases())
def test_ids_weights_and_groups(case: tuple[Tensor, RoutingRule, Tensor | None]) -> None:
    logits_TE, rule, bias_E = case
    num_tokens, num_experts = logits_TE.shape
    routing = select_experts(logits_TE, rule, bias_E=bias_E)
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (num_tokens, rule.top_k)
    assert routing.expert_ids_TK.dtype == torch.int64
    by = choice(logits_TE, rule, bias_E)
    for ids, weights, row in zip(routing.expert_ids_TK.tolist(), routing.weights_TK, by.tolist(), strict=True):
        assert set(ids) <= set(range(num_experts))
        assert len(set(ids)) == rule.top_k
        size = num_experts // rule.num_groups
        groups = [row[start : start + size] for start in range(0, num_experts, size)]
        score = [sum(sorted(group, reverse=True)[: rule.group_experts]) for group in groups]
        best = sorted(range(rule.num_groups), key=lambda group: -score[group])[: rule.top_groups]  # sorted is stable
        allowed = [expert for expert in range(num_experts) if expert // size in best]
        assert ids == sorted(allowed, key=lambda expert: -row[expert])[: rule.top_k]  # and so are these ties
        assert (weights >= 0).all()
        if rule.normalize or rule.score == "softmax_of_chosen":
            assert abs(weights.sum().item() - rule.scaling) < 1e-5


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(score: Any, has_groups: bool, normalize: bool) -> None:
    torch.manual_seed(0)
    groups = {"num_groups": 4, "top_groups": 2} if has_groups else {}
    rule = RoutingRule(3, score, normalize=normalize, epsilon=1e-20, scaling=1.5, **groups)
    logits_TE = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias_E = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def weights(logits: Tensor) -> Tensor:
        return select_experts(logits, rule, bias_E=bias_E, weights_dtype=torch.float64).weights_TK

    assert torch.autograd.gradcheck(weights, (logits_TE,))
    assert torch.autograd.gradgradcheck(weights, (logits_TE,))
    weights(logits_TE).sum().backward()
    assert bias_E.grad is None


@pytest.mark.parametrize("score", SCORES)
def test_the_bias_has_no_part_in_the_weights(score: Any) -> None:
    logits_TE, rule = torch.zeros(3, 8), RoutingRule(2, score, normalize=True)
    bias_E = torch.zeros(8).index_fill(0, torch.tensor([5, 2]), 1.0)
    routing = select_experts(logits_TE, rule, bias_E=bias_E)
    assert routing.expert_ids_TK.tolist() == [[2, 5]] * 3
    torch.testing.assert_close(routing.weights_TK, torch.full((3, 2), 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_weighed_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_TE, rule = torch.randn(20, 16).to(dtype), RoutingRule(4, normalize=True)
    routing = select_experts(logits_TE, rule)
    assert routing.weights_TK.dtype == torch.float32
    want = select_experts(logits_TE.double(), rule, weights_dtype=torch.float64)
    assert torch.equal(routing.expert_ids_TK, want.expert_ids_TK)
    torch.testing.assert_close(routing.weights_TK, want.weights_TK.float(), rtol=1e-5, atol=0)
    asked = select_experts(logits_TE, rule, weights_dtype=torch.bfloat16).weights_TK
    assert torch.equal(asked, routing.weights_TK.bfloat16())


def test_strides_do_not_matter() -> None:
    torch.manual_seed(0)
    wide, rule = torch.randn(16, 20), RoutingRule(4, num_groups=4, top_groups=2)
    routing, want = select_experts(wide.T[::2], rule), select_experts(wide.T[::2].contiguous(), rule)
    assert torch.equal(routing.expert_ids_TK, want.expert_ids_TK)
    assert torch.equal(routing.weights_TK, want.weights_TK)


# Ties, NaN, infinities


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("num_experts", [4, 64, 256, 300])
def test_of_equals_the_lower_index_comes_first(score: Any, num_experts: int) -> None:
    """Also where a fast top-k of torch returns another order."""
    rule = RoutingRule(4, score)
    assert select_experts(torch.zeros(3, num_experts), rule).expert_ids_TK.tolist() == [[0, 1, 2, 3]] * 3
    logits_TE = torch.zeros(1, num_experts)
    logits_TE[0, -1] = 1
    assert select_experts(logits_TE, rule).expert_ids_TK.tolist() == [[num_experts - 1, 0, 1, 2]]


def test_of_equal_groups_the_lower_index_comes_first() -> None:
    rule = RoutingRule(2, "sigmoid", num_groups=4, top_groups=2)
    assert select_experts(torch.zeros(1, 8), rule).expert_ids_TK.tolist() == [[0, 1]]
    logits_TE = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 1]])
    assert select_experts(logits_TE, RoutingRule(3, "sigmoid", num_groups=4, top_groups=2)).expert_ids_TK.tolist() == [
        [6, 7, 0]
    ]


def test_experts_of_other_groups() -> None:
    """With -inf they are never chosen, however bad the others are; with 0 they are, as A.X-K2 does it."""
    logits_TE = torch.tensor([[9.0, -9.0, 8.0, 8.0]])
    bias_E = torch.tensor([3.0, -1.0, 0.0, 0.0])
    never = RoutingRule(2, "sigmoid", num_groups=2, top_groups=1)
    assert select_experts(logits_TE, never, bias_E=bias_E).expert_ids_TK.tolist() == [[0, 1]]
    zero = RoutingRule(2, "sigmoid", num_groups=2, top_groups=1, other_groups=0.0)
    assert select_experts(logits_TE, zero, bias_E=bias_E).expert_ids_TK.tolist() == [[0, 2]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("has_groups", [False, True])
def test_nan_is_seen_in_the_weights_and_never_in_the_ids(score: Any, has_groups: bool) -> None:
    torch.manual_seed(0)
    groups = {"num_groups": 4, "top_groups": 2} if has_groups else {}
    rule = RoutingRule(3, score, normalize=True, **groups)
    logits_TE = torch.randn(200, 8)
    clean = select_experts(logits_TE, rule)
    spoiled_TE = torch.where(torch.rand(200, 8) < 0.1, NAN, logits_TE)
    spoiled_TE[0], spoiled_TE[1] = NAN, logits_TE[1]
    routing = select_experts(spoiled_TE, rule)
    assert_in_range_and_different(routing, 8)
    has_nan_T = spoiled_TE.isnan().any(dim=1)
    assert has_nan_T.any()
    assert not has_nan_T.all()
    assert routing.weights_TK[has_nan_T].isnan().all()
    assert torch.equal(routing.weights_TK[~has_nan_T], clean.weights_TK[~has_nan_T])
    assert torch.equal(routing.expert_ids_TK[~has_nan_T], clean.expert_ids_TK[~has_nan_T])
    if has_groups:
        assert all(len({expert // 2 for expert in row}) <= 2 for row in routing.expert_ids_TK.tolist())
    assert routing.expert_ids_TK[0].tolist() == [0, 1, 2]


def test_an_expert_that_is_nan_is_chosen_last() -> None:
    logits_TE = torch.tensor([[NAN, 1.0, 2.0, 0.0]])
    for score in ("sigmoid", "sqrt_softplus", *OF_CHOSEN):
        assert select_experts(logits_TE, RoutingRule(3, score)).expert_ids_TK.tolist() == [[2, 1, 3]]  # type: ignore[arg-type]
        assert select_experts(logits_TE, RoutingRule(4, score)).expert_ids_TK.tolist() == [[2, 1, 3, 0]]  # type: ignore[arg-type]
    bias_E = torch.tensor([0.0, NAN, 0.0, 0.0])
    routing = select_experts(torch.zeros(1, 4), RoutingRule(3, "sigmoid"), bias_E=bias_E)
    assert routing.expert_ids_TK.tolist() == [[0, 2, 3]]
    assert routing.weights_TK.isnan().all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), torch.finfo(torch.float32).max])
@pytest.mark.parametrize("has_groups", [False, True])
def test_infinities_leave_ids_in_range(score: Any, value: float, has_groups: bool) -> None:
    torch.manual_seed(0)
    groups = {"num_groups": 4, "top_groups": 2} if has_groups else {}
    logits_TE = torch.where(torch.rand(200, 8) < 0.4, value, torch.randn(200, 8))
    logits_TE[0] = value
    assert_in_range_and_different(select_experts(logits_TE, RoutingRule(3, score, **groups)), 8)
    bias_E = torch.zeros(8).index_fill(0, torch.tensor([1, 6]), value)
    assert_in_range_and_different(select_experts(logits_TE, RoutingRule(3, score, **groups), bias_E=bias_E), 8)


def test_infinite_logits() -> None:
    inf = float("inf")
    sigmoid = select_experts(torch.tensor([[0.0, inf, -inf, 1.0]]), RoutingRule(4, "sigmoid"))
    assert sigmoid.expert_ids_TK.tolist() == [[1, 3, 0, 2]]
    assert sigmoid.weights_TK[0].tolist()[::3] == [1, 0]
    softmax = select_experts(torch.tensor([[0.0, -inf, 1.0], [0.0, inf, 1.0], [-inf] * 3]), RoutingRule(2))
    assert softmax.expert_ids_TK.tolist() == [[2, 0], [0, 1], [0, 1]]
    assert softmax.weights_TK[0].isfinite().all()
    assert softmax.weights_TK[1:].isnan().all()


def test_an_expert_can_be_switched_off_by_its_bias() -> None:
    bias_E = torch.tensor([0.0, -float("inf"), 0.0, 0.0])
    routing = select_experts(torch.tensor([[0.0, 9.0, 1.0, 2.0]]), RoutingRule(2, "sigmoid"), bias_E=bias_E)
    assert routing.expert_ids_TK.tolist() == [[3, 2]]
    assert routing.weights_TK.isfinite().all()


def assert_in_range_and_different(routing: Routing, num_experts: int) -> None:
    for row in routing.expert_ids_TK.tolist():
        assert set(row) <= set(range(num_experts))
        assert len(set(row)) == len(row)


# The flat view


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 4, 4), (7, 16, 3), (50, 64, 8)])
def test_the_flat_view_is_the_same_numbers_in_the_same_order(num_tokens: int, num_experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    routing = select_experts(torch.randn(num_tokens, num_experts), RoutingRule(top_k))
    size = num_tokens * top_k
    assert routing.weights_S.shape == routing.expert_of_slot_S.shape == routing.token_of_slot_S.shape == (size,)
    assert routing.expert_of_slot_S.dtype == routing.token_of_slot_S.dtype == torch.int32
    assert routing.weights_S.data_ptr() == routing.weights_TK.data_ptr()
    for slot in range(size):
        token, k = divmod(slot, top_k)
        assert routing.token_of_slot_S[slot] == token
        assert routing.expert_of_slot_S[slot] == routing.expert_ids_TK[token, k]
        assert routing.weights_S[slot] == routing.weights_TK[token, k]
    load_E = routing.load_E(num_experts)
    assert load_E.dtype == torch.int64
    assert load_E.tolist() == [(routing.expert_ids_TK == expert).sum() for expert in range(num_experts)]


def test_the_flat_view_cannot_differ_from_the_rows() -> None:
    """It is derived from them: there is nothing to set that could say something else."""
    ids_TK = torch.tensor([[3, 1], [0, 2], [2, 3]])
    routing = Routing(torch.rand(2, 3).T, ids_TK, torch.zeros(3, 4))
    assert routing.weights_S.tolist() == routing.weights_TK.flatten().tolist()  # not contiguous: a copy, in order
    ids_TK.copy_(torch.tensor([[1, 0], [1, 0], [1, 0]]))
    assert routing.expert_of_slot_S.tolist() == [1, 0] * 3
    assert routing.load_E(4).tolist() == [3, 3, 0, 0]
    with pytest.raises(AttributeError):
        routing.expert_of_slot_S = ids_TK.flatten()  # type: ignore[misc]


def test_gradients_pass_through_the_flat_weights() -> None:
    logits_TE = torch.randn(5, 8, requires_grad=True)
    routing, upstream_S = select_experts(logits_TE, RoutingRule(2)), torch.randn(10)
    flat = torch.autograd.grad((routing.weights_S * upstream_S).sum(), logits_TE, retain_graph=True)[0]
    rows = torch.autograd.grad((routing.weights_TK * upstream_S.view(5, 2)).sum(), logits_TE)[0]
    assert torch.equal(flat, rows)


def test_no_token() -> None:
    for score in SCORES:
        rule = RoutingRule(2, score, normalize=True, num_groups=2, top_groups=1)  # type: ignore[arg-type]
        logits_TE = torch.zeros(0, 8, requires_grad=True)
        routing = select_experts(logits_TE, rule, bias_E=torch.zeros(8))
        assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (0, 2)
        routing.weights_TK.sum().backward()
        assert routing.load_E(8).tolist() == [0] * 8


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9}, "top_k"),
        ({"score": "relu"}, "score"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups"),
        ({"num_groups": 2, "top_groups": 0}, "top_groups"),
        ({"num_groups": 8, "top_groups": 4}, "group_experts"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "top_k"),
    ],
)
def test_rules_that_cannot_choose(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select_experts(torch.zeros(2, 8), RoutingRule(**({"top_k": 2} | changes)))


def test_wrong_arguments() -> None:
    rule = RoutingRule(2)
    with pytest.raises(ValueError, match="logits_TE"):
        select_experts(torch.zeros(8), rule)
    with pytest.raises(ValueError, match="logits_TE"):
        select_experts(torch.zeros(2, 8, dtype=torch.int64), rule)
    with pytest.raises(ValueError, match="bias_E"):
        select_experts(torch.zeros(2, 8), rule, bias_E=torch.zeros(7))
    with pytest.raises(ValueError, match="weights_dtype"):
        select_experts(torch.zeros(2, 8), rule, weights_dtype=torch.int64)


# The worked examples


@pytest.mark.parametrize("text", [select.__doc__ or "", (ROOT / "docs" / "routing.md").read_text()], ids=["py", "md"])
def test_the_worked_example_of_four_tokens(text: str) -> None:
    """The table is read: four lines of four logits, four scores, two ids and two weights."""
    numbers = [re.findall(r"(?<!\S)(-?\d[\d.]*|nan)(?!\S)", line) for line in text.splitlines()]
    rows = [line[:12] for line in numbers if len(line) >= 12]
    assert len(rows) == 4
    table = torch.tensor([[float(cell) for cell in row] for row in rows])
    logits_TE, scores_TE, ids_TK, weights_TK = table.split([4, 4, 2, 2], dim=1)
    routing = select_experts(logits_TE, RoutingRule(2, "softmax", normalize=True))
    assert routing.expert_ids_TK.tolist() == ids_TK.long().tolist()
    torch.testing.assert_close(logits_TE.softmax(1), scores_TE, atol=6e-4, rtol=0, equal_nan=True)
    torch.testing.assert_close(routing.weights_TK, weights_TK, atol=6e-4, rtol=0, equal_nan=True)
