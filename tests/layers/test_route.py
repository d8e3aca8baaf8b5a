"""`route` and `shared_experts` against the blocks of every architecture of the installed Transformers."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import expertune
from expertune.layers import running
from expertune.layers.layout import is_experts_module
from expertune.layers.route import route, shared_experts
from expertune.layers.router import NUM_GROUPS, read_router
from expertune.ops.routing import fused
from expertune.ops.routing.types import Routing
from tests.comparing import assert_agrees
from tests.integrations.architectures import Architecture, architectures, build
from tests.tiny import randomize_lora_b, tiny_model

REFUSED = {
    "diffusion_gemma": "network of its own",
    "gemma4": "network of its own",
    "inkling": "shared experts",
    "phimoe": "sparsemixer",
    "zaya": "network of its own",
}
"""The architectures whose routers are no rule over logits."""
PAGE = Path(__file__).parents[2] / "docs" / "routing.md"
TOKENS = 40
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"norm_topk_prob": True, "routed_scaling_factor": 1.7, "router_scaling_factor": 1.7, "route_scale": 1.7},
    {"norm_topk_prob": False, "num_group": 4, "topk_group": 2, "top_k": 2},
    {"topk_method": "group_limited_greedy", "num_group": 4, "topk_group": 2, "top_k": 4},
    {"expert_selection_fn": "sigmoid", "router_logit_softcapping": 0.5, "output_multiplier": 0.3},
    {"expert_selection_fn": "sigmoid", "norm_topk_prob": True, "use_expert_bias": False, "score_fn": nn.Sigmoid()},
)
"""Attributes of gates; each applies where a gate has one of that name."""


def blocks(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every experts module, and the module that it is in."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_experts_module(module):
            owner = modules[name.rpartition(".")[0]]
            while type(owner).__name__ == "ParamWrapper":
                name = name.rpartition(".")[0]
                owner = modules[name.rpartition(".")[0]]
            yield module, owner


def architecture_of(folder: str) -> Architecture:
    """Skips the test where the installed Transformers does not have it."""
    for each in architectures():
        if each.folder == folder:
            return each
    pytest.skip(f"this Transformers has no {folder}")


def first_block(folder: str) -> tuple[nn.Module, nn.Module]:
    return next(blocks(build(architecture_of(folder), "eager")))


def hidden_states(block: Any, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, TOKENS // 2, read_router(block).weight_EH.shape[1], generator=generator)


def own_choice(block: nn.Module, experts: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ids and weights that the block passes to its experts, and what the experts return."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def listen(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((args[1], args[2], output))

    hook = experts.register_forward_hook(listen)
    try:
        block(hidden)
    finally:
        hook.remove()
    assert len(calls) == 1
    return calls[0]


def assert_same_choice(routing: Routing, ids_TK: Tensor, weights_TK: Tensor) -> None:
    """The same experts with the same weights; the order within a row is the router's own."""
    ours, theirs = routing.expert_ids_TK.sort(dim=1), ids_TK.sort(dim=1)
    assert torch.equal(ours.values, theirs.values)
    difference = routing.weights_TK.gather(1, ours.indices) - weights_TK.gather(1, theirs.indices)
    assert difference.abs().max() <= 1e-6 * weights_TK.abs().max().clamp(min=1)


@pytest.mark.parametrize("architecture", architectures(), ids=str)
def test_equal_to_the_blocks_own_router(architecture: Architecture) -> None:
    model = build(architecture, "eager")
    tried = 0
    for experts, block in blocks(model):
        gate: Any = getattr(block, "gate", None) or getattr(block, "router", None)
        if architecture.folder in REFUSED or hasattr(gate, "tid2eid"):
            reason = REFUSED.get(architecture.folder, "token id")
            with pytest.raises(ValueError, match=reason):
                route(block, torch.zeros(1, 2, 32))
            tried += 1
            continue
        hidden = hidden_states(block)
        before = dict(vars(gate))
        for variant in VARIANTS:
            changes = {name: value for name, value in variant.items() if getattr(gate, name, None) is not None}
            if variant and not changes:
                continue
            if "num_group" not in changes:
                changes.pop("topk_group", None)
            for name, value in changes.items():
                setattr(gate, name, value)
            with torch.no_grad():
                ids_TK, weights_TK, _ = own_choice(block, experts, hidden)
                assert_same_choice(route(block, hidden), ids_TK, weights_TK)
            gate.__dict__.update({name: before[name] for name in changes if name in before})
            tried += 1
    assert tried


def test_the_table_of_the_documentation() -> None:
    """Every architecture of the installed Transformers stands in the row of its rule, or among those refused."""
    page = PAGE.read_text(encoding="utf-8")
    wrong = []
    for architecture in architectures():
        if architecture.folder in REFUSED:
            refused = page[page.index("`route` raises") :]
            wrong += [] if re.search(rf"\b{architecture.folder}\b.* \|", refused) else [architecture.folder]
            continue
        _, block = list(blocks(build(architecture, "eager")))[-1]
        gate: Any = getattr(block, "gate", None) or getattr(block, "router", None)
        router = read_router(block)
        rule, has_groups = router.rule, any(hasattr(gate, name) for name in NUM_GROUPS)
        cells = (f"`{rule.score}`", _yes(router.correction_E is not None), _yes(has_groups), f"{rule.epsilon:g}")
        row = rf"^\| {re.escape(' | '.join(cells))} \|.*\b{architecture.folder}\b"
        wrong += [] if re.search(row, page, re.MULTILINE) else [f"{architecture.folder}: {cells}"]
    assert wrong == []


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@pytest.mark.parametrize("folder", ["qwen3_moe", "deepseek_v3", "gpt_oss", "kolibri1", "deepseek_v4", "mistral4"])
def test_gradients_equal_those_through_the_blocks_own_router(folder: str) -> None:
    experts, block = list(blocks(build(architecture_of(folder), "eager")))[-1]
    gate: Any = getattr(block, "gate", None) or getattr(block, "router", None)
    hidden = hidden_states(block).requires_grad_()
    ids_TK, weights_TK, _ = own_choice(block, experts, hidden)
    upstream_TE = torch.randn(TOKENS, read_router(block).weight_EH.shape[0])
    want = torch.autograd.grad((weights_TK * upstream_TE.gather(1, ids_TK)).sum(), (gate.weight, hidden))
    routing = route(block, hidden)
    got = torch.autograd.grad(
        (routing.weights_TK * upstream_TE.gather(1, routing.expert_ids_TK)).sum(), (gate.weight, hidden)
    )
    for name, ours, theirs in zip(("weight", "hidden"), got, want, strict=True):
        assert_agrees(name, ours, theirs, dtype=torch.float32)


def test_groups_of_axk2_can_be_left_where_the_others_are_negative() -> None:
    """Its router counts the experts of other groups as 0, which is more than a score plus a negative bias."""
    experts, block = first_block("axk2")
    gate: Any = block.gate
    gate.e_score_correction_bias.fill_(-0.5)
    hidden = hidden_states(block)
    with torch.no_grad():
        ids_TK, weights_TK, _ = own_choice(block, experts, hidden)
        routing = route(block, hidden)
    group_size = read_router(block).weight_EH.shape[0] // gate.num_group
    leaves = (ids_TK // group_size).amax(dim=1) != (ids_TK // group_size).amin(dim=1)
    assert leaves.any()  # the other groups' experts all count as 0, so which of them is a tie
    ours = Routing(routing.weights_TK[~leaves], routing.expert_ids_TK[~leaves], routing.logits_TE[~leaves])
    assert_same_choice(ours, ids_TK[~leaves], weights_TK[~leaves])
    assert ((routing.expert_ids_TK // group_size).amax(dim=1) != (routing.expert_ids_TK // group_size).amin(dim=1))[
        leaves
    ].all()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in the interpreter: inf - inf
@pytest.mark.parametrize("folder", ["qwen3_moe", "deepseek_v3", "gpt_oss", "minimax_m2"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_launch_beside_scattermoe(folder: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What plain torch chooses; on the CPU in Triton's interpreter, which is off where there is a GPU."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("compiled kernels do not run on the CPU")
    _, block = first_block(folder)
    hidden = hidden_states(block)
    want = route(block, hidden)
    calls, run = [], fused.fused_select_experts
    monkeypatch.setattr(fused, "fused_select_experts", lambda *a, **k: calls.append(1) or run(*a, **k))
    if device == "cpu":
        monkeypatch.setattr(running, "pick_backend", lambda _: "scattermoe")
    running._backend_for.cache_clear()
    got = route(block.to(device), hidden.to(device))
    running._backend_for.cache_clear()
    assert calls == [1]
    assert torch.equal(got.expert_ids_TK.cpu(), want.expert_ids_TK)
    assert_agrees("weights", got.weights_TK.cpu(), want.weights_TK, dtype=torch.float32)


# Adapters


def adapted(folder: str, **options: Any) -> tuple[PeftModel, nn.Module, nn.Module]:
    """A model with an adapter on every router's weight, and its last block."""
    base = build(architecture_of(folder), "eager")
    names = expertune.get_target_parameters(base, router=True)
    targets = [name for name in names if ".experts." not in name]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets)
    model = get_peft_model(base, config, **options)
    randomize_lora_b(model)
    experts, block = list(blocks(model))[-1]
    return model, experts, block


@pytest.mark.parametrize("folder", ["qwen3_moe", "deepseek_v3", "gpt_oss", "afmoe", "hunyuan_v1_moe", "laguna"])
def test_adapters_of_a_parameter_are_seen_through(folder: str) -> None:
    model, experts, block = adapted(folder)
    hidden = hidden_states(block)
    router = read_router(block)
    assert len(router.loras) == 1
    with torch.no_grad():
        assert_same_choice(route(block, hidden), *own_choice(block, experts, hidden)[:2])
        with model.disable_adapter():
            assert read_router(block).loras == ()
            without = route(block, hidden)
            assert_same_choice(without, *own_choice(block, experts, hidden)[:2])
        assert not torch.equal(without.logits_TE, route(block, hidden).logits_TE)
        before = route(block, hidden)
        model.merge_adapter()
        assert read_router(block).loras == ()
        assert_agrees("merged", route(block, hidden).logits_TE, before.logits_TE, dtype=torch.float32)


def test_an_adapter_is_a_second_linear_in_fp32() -> None:
    """Beside a bf16 weight, an adapter far below the weight's last place counts in full."""
    model, _, block = adapted("qwen3_moe")
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float() * (1e-4 if ".lora_B" in name else 1.0)
    hidden = hidden_states(block).bfloat16()
    router = read_router(block)
    assert router.weight_EH.dtype == torch.bfloat16
    assert router.weight_EH.data_ptr() == dict(model.named_parameters())[_weight_name(model)].data_ptr()
    x_TH, lora = hidden.reshape(-1, hidden.shape[-1]).float(), router.loras[0]
    delta_EH = lora.b_EYR[0].float() @ lora.a_ERX[0].float() * lora.scaling
    want = x_TH.double() @ (router.weight_EH.double() + delta_EH.double()).T
    routing = route(block, hidden)
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert_agrees("logits", routing.logits_TE, want.float(), dtype=torch.float32)
    moved = routing.logits_TE - x_TH @ router.weight_EH.float().T
    assert (moved - x_TH @ delta_EH.T).norm() < 0.05 * moved.norm()


def _weight_name(model: nn.Module) -> str:
    return [name for name, _ in model.named_parameters() if name.endswith("gate.base_layer.weight")][-1]


def test_gradients_reach_the_adapter() -> None:
    model, experts, block = adapted("deepseek_v3")
    lora = [parameter for name, parameter in model.named_parameters() if ".gate.lora_" in name]
    hidden = hidden_states(block)
    upstream_TE = torch.randn(TOKENS, 8)

    def gradients(ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((weights_TK * upstream_TE.gather(1, ids_TK)).sum(), lora)

    want = gradients(*own_choice(block, experts, hidden)[:2])
    routing = route(block, hidden)
    for got, expected in zip(gradients(routing.expert_ids_TK, routing.weights_TK), want, strict=True):
        assert_agrees("adapter", got, expected, dtype=torch.float32)


class LinearGateBlock(nn.Module):
    """A block as in Transformers 4: the gate is a plain Linear, the block chooses."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 8, bias=False)
        for name, value in attributes.items():
            setattr(self, name, value)


def test_adapters_of_a_linear_gate() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"mlp": LinearGateBlock(top_k=2, norm_topk_prob=True)}),
        LoraConfig(r=4, target_modules=["gate"], use_rslora=True),
    )
    randomize_lora_b(model)
    block: Any = next(each for each in model.modules() if isinstance(each, LinearGateBlock))
    hidden = torch.randn(TOKENS, 16)
    with torch.no_grad():
        assert_agrees("logits", route(block, hidden).logits_TE, block.gate(hidden), dtype=torch.float32)
        with model.disable_adapter():
            assert_agrees("base", route(block, hidden).logits_TE, block.gate(hidden), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"use_dora": True}, "Dora"), ({"lora_bias": True}, "lora_bias"), ({"lora_dropout": 0.1}, "lora_dropout")],
)
def test_adapters_that_are_no_second_linear_are_refused(options: dict[str, Any], words: str) -> None:
    model = get_peft_model(
        nn.ModuleDict({"mlp": LinearGateBlock(top_k=2)}), LoraConfig(r=4, target_modules=["gate"], **options)
    ).train()
    block = next(each for each in model.modules() if isinstance(each, LinearGateBlock))
    with pytest.raises(ValueError, match=words):
        route(block, torch.zeros(2, 16))


def test_a_router_that_trains_in_full() -> None:
    base = tiny_model("eager")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["gate"])
    model = get_peft_model(base, config)
    experts, block = next(blocks(model))
    copy = next(parameter for name, parameter in model.named_parameters() if "gate.modules_to_save.default" in name)
    with torch.no_grad():
        copy.add_(torch.randn_like(copy))
        hidden = hidden_states(block)
        assert_same_choice(route(block, hidden), *own_choice(block, experts, hidden)[:2])
        with model.disable_adapter():
            assert_same_choice(route(block, hidden), *own_choice(block, experts, hidden)[:2])


# Blocks that are no architecture of the installed Transformers


def test_a_linear_gate_and_what_the_block_or_its_configuration_says() -> None:
    config = SimpleNamespace(num_experts_per_tok=3, norm_topk_prob=False, routed_scaling_factor=2.0)
    rule = read_router(LinearGateBlock(config=config)).rule
    assert (rule.top_k, rule.score, rule.normalize, rule.scaling) == (3, "softmax", False, 2.0)
    rule = read_router(LinearGateBlock(config=config, top_k=2, norm_topk_prob=True)).rule
    assert (rule.top_k, rule.normalize) == (2, True)
    rule = read_router(LinearGateBlock(experts=SimpleNamespace(config=config))).rule
    assert rule.top_k == 3


def test_a_correction_bias_means_sigmoid() -> None:
    """As in the first releases of Transformers 5: the gate has weight and bias, the block the rest."""
    block = SimpleNamespace(
        gate=SimpleNamespace(weight=torch.randn(8, 16), e_score_correction_bias=torch.zeros(8)),
        top_k=2, n_routed_experts=8, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = read_router(block)
    assert router.correction_E is not None
    rule = router.rule
    assert (rule.score, rule.num_groups, rule.top_groups, rule.group_experts) == ("sigmoid", 4, 2, 2)
    assert (rule.normalize, rule.epsilon, rule.scaling, router.output_scaling) == (True, 1e-20, 2.5, 1.0)


@pytest.mark.parametrize(
    ("folder", "scaling"), [("beam", 2.5), ("minimax_m3_vl", 2.0), ("openai_privacy_filter", 3.0), ("deepseek_v3", 1.0)]
)
def test_a_scaling_after_the_experts_is_told_apart(folder: str, scaling: float) -> None:
    _, block = first_block(folder)
    assert read_router(block).output_scaling == scaling


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (SimpleNamespace(), "neither gate nor router"),
        (SimpleNamespace(gate=SimpleNamespace()), "no weight"),
        (SimpleNamespace(gate=SimpleNamespace(weight=torch.zeros(8, 16))), "top_k is missing"),
        (SimpleNamespace(gate=SimpleNamespace(weight=torch.zeros(8, 16), top_k=[2, 3])), "top_k is"),
        (SimpleNamespace(gate=SimpleNamespace(weight=torch.zeros(8, 16), top_k=9)), "top_k: got 9"),
        (SimpleNamespace(gate=SimpleNamespace(weight=torch.zeros(8, 16), top_k=2, num_experts=6)), "num_experts is 6"),
        (SimpleNamespace(gate=SimpleNamespace(weight=torch.zeros(8, 16), top_k=2, n_group=2)), "topk_group is missing"),
        (SimpleNamespace(gate=SimpleNamespace(weight=torch.zeros(8, 16), top_k=2, scoring_func="relu")), "'relu'"),
        (SimpleNamespace(gate=SimpleNamespace(weight=torch.zeros(8, 16), top_k=2, topk_method="x")), "topk_method"),
    ],
)
def test_what_is_missing_is_named(block: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        route(block, torch.zeros(2, 16))


# Shared experts


@pytest.mark.parametrize(
    "folder",
    ["qwen2_moe", "qwen3_next", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "afmoe", "hunyuan_v1_moe", "flint"],
)
def test_shared_experts_are_what_the_block_adds(folder: str) -> None:
    experts, block = first_block(folder)
    hidden = hidden_states(block)
    with torch.no_grad():
        routed = own_choice(block, experts, hidden)[2].view_as(hidden)
        shared = shared_experts(block, hidden)
        assert shared is not None
        assert shared.shape == hidden.shape
        assert shared.abs().max() > 0
        assert_agrees("block", routed + shared, block(hidden), dtype=torch.float32)


def test_shared_experts_without_their_gate() -> None:
    _, block = first_block("qwen2_moe")
    with torch.no_grad():
        hidden = hidden_states(block)
        bare = shared_experts(block, hidden, gated=False)
        gated = shared_experts(block, hidden)
        gate: Any = block.shared_expert_gate
        assert bare is not None
        assert gated is not None
        assert_agrees("gated", torch.sigmoid(gate(hidden)) * bare, gated, dtype=torch.float32)
        assert not torch.equal(bare, gated)


@pytest.mark.parametrize("folder", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_no_shared_experts(folder: str) -> None:
    _, block = first_block(folder)
    assert shared_experts(block, hidden_states(block)) is None


def test_shared_experts_that_the_router_weighs_are_refused() -> None:
    _, block = first_block("inkling")
    with pytest.raises(ValueError, match="from the router"):
        shared_experts(block, torch.zeros(1, 2, 32))
