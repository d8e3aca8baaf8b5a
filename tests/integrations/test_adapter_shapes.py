"""Every shape of adapter that PEFT makes: ours and PEFT's own fold on eager have the same outputs and gradients."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import expertune
from expertune.errors import BackendError
from expertune.integrations import adapters, experts, notices
from expertune.layers.layout import is_experts_module
from expertune.ops.experts import torch_grouped
from tests.comparing import relative_error
from tests.integrations import architectures, parity
from tests.integrations.architectures import Architecture
from tests.integrations.test_architectures import build
from tests.tiny import VOCAB, randomize_lora_b, tiny_model, with_adapter

OUTPUT, GRADIENT = 1e-5, 3e-5
"""fp32, two layers, relative in norm. The seeds here reach 1e-6 and 4e-6."""
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = "mlp.gate.weight"


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (3, 19), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranks of the adapters on up and down, 0 without, that each call of our experts got unfolded."""
    calls: list[tuple[int, int]] = []
    run = experts.run_expert_mlp

    def noting(backend: Any, x: Any, weights: Any, plan: Any, up: Any, down: Any, *rest: Any, **options: Any) -> Tensor:
        calls.append((up.lora.rank if up.lora else 0, down.lora.rank if down.lora else 0))
        return run(backend, x, weights, plan, up, down, *rest, **options)

    monkeypatch.setattr(experts, "run_expert_mlp", noting)
    return calls


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have every parametrisation refused from then on: that is how PEFT forms W + s B A."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a weight was parametrised, so W + s B A was formed")

    return lambda: monkeypatch.setattr(parametrize, "register_parametrization", refuse)


@pytest.fixture
def said() -> Iterator[Callable[[], list[str]]]:
    """What expertune has warned of since the test began."""
    notices.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(each.message) for each in caught if "expertune" in str(each.message)]
    notices.warn_once.cache_clear()


def everything(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Logits, loss and all gradients of a model."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert relative_error(got[key], value) < (OUTPUT if key in ("logits", "loss") else GRADIENT), key


SHAPES: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "both projections": ({}, [(4, 4), (4, 4)]),
    "experts only": ({"target_modules": []}, [(4, 4), (4, 4)]),
    "up only": ({"target_parameters": BOTH[:1]}, [(4, 0), (4, 0)]),
    "down only": ({"target_parameters": BOTH[1:]}, [(0, 4), (0, 4)]),
    "attention only": ({"target_parameters": None}, [(0, 0), (0, 0)]),
    "one layer's experts": ({"target_parameters": [f"layers.1.{name}" for name in BOTH]}, [(0, 0), (4, 4)]),
    "rank 1": ({"r": 1}, [(1, 1), (1, 1)]),
    "rank above the width": ({"r": 80}, [(80, 80), (80, 80)]),
    "rsLoRA": ({"use_rslora": True}, [(4, 4), (4, 4)]),
    "a rank for each projection": ({"rank_pattern": {"gate_up_proj": 2, "down_proj": 6}}, [(2, 6), (2, 6)]),
    "a rank for a layer": ({"rank_pattern": {r".*layers\.0\.mlp\.experts\.down_proj": 8}}, [(4, 8), (4, 4)]),
    "alpha_pattern": ({"alpha_pattern": {"gate_up_proj": 1, "q_proj": 5}}, [(4, 4), (4, 4)]),
    "patterns with rsLoRA": (
        {"use_rslora": True, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {"down_proj": 2}},
        [(4, 9), (4, 9)],
    ),
    "with the router": ({"target_parameters": [*BOTH, ROUTER]}, [(4, 4), (4, 4)]),
    "the router only": ({"target_parameters": [ROUTER], "target_modules": []}, [(0, 0), (0, 0)]),
    "the head trained whole": ({"modules_to_save": ["lm_head"]}, [(4, 4), (4, 4)]),
    "the router trained whole": ({"modules_to_save": ["gate"]}, [(4, 4), (4, 4)]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_as_pefts_fold(
    name: str, ids: Tensor, handed: list[tuple[int, int]], unfolded: Callable[[], None]
) -> None:
    options, ranks = SHAPES[name]
    want = everything(with_adapter(tiny_model("eager"), **options), ids)
    assert not handed
    model = with_adapter(tiny_model("expertune"), **options)
    unfolded()
    got = everything(model, ids)
    assert handed == ranks
    assert_same(got, want)
    for module in options.get("modules_to_save", ()):
        assert any(f"{module}.modules_to_save" in key for key in got)
        assert not any(f"{module}.original_module" in key for key in got)


def test_attention_only_computes_no_gradient_of_an_expert(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Any] = []
    outer = torch_grouped.grouped_outer
    monkeypatch.setattr(torch_grouped, "grouped_outer", lambda *a: sums.append(a[1].shape) or outer(*a))
    got = everything(with_adapter(tiny_model("expertune"), target_parameters=None), ids)
    assert not sums
    assert not any("experts" in key for key in got)
    everything(with_adapter(tiny_model("expertune"), target_modules=[]), ids)
    assert len(sums) == 2 * 4  # the canary: A and B of two projections, in each layer ...
    widths = {width for _, width in sums}
    assert widths <= {4, 32, 64}, "... and thin: one side of each sum is the rank"


@pytest.mark.parametrize(("base", "adapter"), [("float32", "bfloat16"), ("float64", "float32"), ("float64", "float64")])
def test_adapters_of_another_dtype_than_the_base(
    base: str, adapter: str, ids: Tensor, handed: list[tuple[int, int]]
) -> None:
    results = {}
    for implementation in ("eager", "expertune"):
        model = with_adapter(tiny_model(implementation).to(getattr(torch, base)), target_modules=[])
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, adapter))
        results[implementation] = everything(model, ids)
    assert handed == [(4, 4), (4, 4)]
    got, want = results["expertune"], results["eager"]
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        # a gradient is rounded once, at the end, to the adapter's dtype; two roundings of equals differ by one unit
        assert relative_error(got[key], value) < (2**-8 if value.dtype == torch.bfloat16 else GRADIENT), key


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_a_bf16_base_is_as_close_to_fp32_as_pefts_fold(adapter: str, handed: list[tuple[int, int]]) -> None:
    """One layer's experts on fixed routing: in a whole model rounding would send tokens elsewhere."""

    def run(implementation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        model = with_adapter(tiny_model(implementation, num_hidden_layers=1))
        module = model.get_base_model().model.layers[0].mlp.experts
        for name, parameter in module.named_parameters():
            kept = getattr(torch, adapter) if ".lora_" in name else torch.bfloat16
            parameter.data = parameter.data.bfloat16().to(kept if dtype == torch.bfloat16 else dtype)
        generator = torch.Generator().manual_seed(3)
        x_TH, dy_TH = (torch.randn(96, 64, generator=generator).bfloat16().to(dtype) for _ in range(2))
        ids_TK = torch.rand(96, 8, generator=generator).topk(2).indices
        weights_TK = torch.rand(96, 2, generator=generator).bfloat16().to(dtype).requires_grad_()
        y_TH = module(x_TH.requires_grad_(), ids_TK, weights_TK)
        y_TH.backward(dy_TH)
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return {"y": y_TH.detach(), "dx": x_TH.grad, "dweights": weights_TK.grad, **grads}

    truth = run("eager", torch.float32)
    pefts, ours = run("eager", torch.bfloat16), run("expertune", torch.bfloat16)
    assert handed == [(4, 4)]
    assert ours.keys() == pefts.keys() == truth.keys()
    for key, value in truth.items():
        assert ours[key].dtype == pefts[key].dtype, key
        assert relative_error(ours[key], value) <= max(1.5 * relative_error(pefts[key], value), 6e-3), key


# Several adapters, switching, disabling, merging.


def with_second(implementation: str, **changes: Any) -> PeftModel:
    """A model with the adapters "default" (rank 4) and "second" (rank 2, rsLoRA), on experts, attention and router."""
    model = with_adapter(tiny_model(implementation), target_parameters=[*BOTH, ROUTER])
    first = model.peft_config["default"]
    options = {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_parameters": first.target_parameters}
    model.add_adapter("second", LoraConfig(**(options | {"target_modules": first.target_modules} | changes)))
    randomize_lora_b(model, seed=5)
    return model


def test_two_adapters_at_once_and_each_alone(
    ids: Tensor, handed: list[tuple[int, int]], unfolded: Callable[[], None]
) -> None:
    orders = (["default"], ["second"], ["default", "second"], ["second", "default"])
    pefts, ours = with_second("eager"), with_second("expertune", rank_pattern={"down_proj": 5})
    pefts = with_second("eager", rank_pattern={"down_proj": 5})
    want = []
    for active in orders:
        pefts.base_model.set_adapter(active)
        want.append(everything(pefts, ids))
    unfolded()
    for active, expected in zip(orders, want, strict=True):
        handed.clear()
        ours.base_model.set_adapter(active)
        assert_same(everything(ours, ids), expected)
        ranks = {"default": (4, 4), "second": (2, 5)}
        assert handed == [(sum(ranks[a][0] for a in active), sum(ranks[a][1] for a in active))] * 2


ACTIONS: dict[str, Callable[[PeftModel], object]] = {
    "merge": lambda model: model.merge_adapter(),
    "merge safely": lambda model: model.merge_adapter(safe_merge=True),
    "merge the one that is not active": lambda model: model.merge_adapter(["second"]),
    "merge both": lambda model: model.merge_adapter(["default", "second"]),
    "merge and unmerge": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "disable what is merged": lambda model: (model.merge_adapter(), model.base_model.disable_adapter_layers()),
    "disable and enable": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "delete one": lambda model: model.delete_adapter("default"),
    "delete the other": lambda model: model.delete_adapter("second"),
    "merge and unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_merging_disabling_and_deleting(name: str, ids: Tensor, handed: list[tuple[int, int]]) -> None:
    logits = []
    for implementation in ("eager", "expertune"):
        model = with_second(implementation)
        result = ACTIONS[name](model)
        with torch.no_grad():
            logits.append((result if isinstance(result, nn.Module) else model)(input_ids=ids).logits)
    assert relative_error(logits[1], logits[0]) < OUTPUT
    rank = {"delete one": 2, "merge and unmerge": 4, "disable and enable": 4, "delete the other": 4}.get(name, 0)
    assert handed == [(rank, rank)] * 2


def test_the_context_that_disables(ids: Tensor, handed: list[tuple[int, int]]) -> None:
    base, model = tiny_model("expertune"), with_second("expertune")
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert set(handed) == {(0, 0)}
    want = base(input_ids=ids).logits
    assert relative_error(model(input_ids=ids).logits, want) > 0.05
    assert handed[-1] == (4, 4)


def outcome(function: Callable[[], Any]) -> tuple[type, str]:
    """What a call comes to: its error, or "done"."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return type(None), "done"


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties"])
def test_add_weighted_adapter_is_refused_or_not_as_by_peft(combination: str, ids: Tensor) -> None:
    def add(model: PeftModel) -> None:
        model.add_weighted_adapter(
            ["default", "second"], [0.7, 0.4], "mixed", combination_type=combination, density=0.5
        )
        model.set_adapter("mixed")

    pefts, ours = with_second("eager", r=4), with_second("expertune", r=4)
    assert outcome(lambda: add(ours)) == outcome(lambda: add(pefts))
    assert_same(everything(ours, ids), everything(pefts, ids))


REFUSED: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "bias of LoRA": {"lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True, "target_modules": []},
    "rank 0": {"r": 0},
    "a vector": {"target_parameters": ["input_layernorm.weight"]},
    "a parameter that is not there": {"target_parameters": ["mlp.experts.nothing"], "target_modules": []},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_refuses_is_refused_in_its_words(name: str) -> None:
    def build_with(implementation: str) -> Callable[[], PeftModel]:
        options = {"r": 4, "target_modules": ["q_proj"], "target_parameters": BOTH} | REFUSED[name]
        return lambda: get_peft_model(tiny_model(implementation), LoraConfig(**options))

    pefts, ours = outcome(build_with("eager")), outcome(build_with("expertune"))
    assert pefts[1] != "done"
    assert ours == pefts


def test_what_peft_refuses_later_is_refused_in_its_words(ids: Tensor) -> None:
    def other_parameters(model: PeftModel) -> None:
        model.add_adapter("third", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH[:1]))

    def mixed_batch(model: PeftModel) -> None:
        model.eval()(input_ids=ids, adapter_names=["default"] * len(ids))

    for action in (other_parameters, mixed_batch):
        pefts = outcome(lambda: action(with_adapter(tiny_model("eager"))))  # noqa: B023
        ours = outcome(lambda: action(with_adapter(tiny_model("expertune"))))  # noqa: B023
        assert pefts[0] is ValueError
        assert ours == pefts


# Routers.


def with_router_adapters(architecture: Architecture, implementation: str) -> PeftModel:
    model = architectures.build(architecture, implementation)
    targets = expertune.get_target_parameters(model, router=True)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets))
    randomize_lora_b(adapted)
    return adapted


@pytest.mark.parametrize("architecture", architectures.architectures(), ids=str)
def test_the_router_of_every_architecture(architecture: Architecture, said: Callable[[], list[str]]) -> None:
    if architecture.folder in ("inkling", "zaya"):
        with pytest.raises(ValueError, match="its router is none that is recognised"):
            with_router_adapters(architecture, "expertune")
        return
    want = parity.run(architecture, with_router_adapters(architecture, "eager"))
    model = with_router_adapters(architecture, "expertune")
    assert expertune.check_peft_model(model) == []
    got = parity.run(architecture, model)
    assert want.folds >= 3, "PEFT folds up, down and router"
    assert got.folds == 0
    assert len([key for key in got.gradients if "experts" not in key]) >= 2, "A and B of a router"
    errors = parity.compare(got, want)
    assert errors.output < parity.OUTPUT_TOLERANCE
    assert errors.gradient < parity.GRADIENT_TOLERANCE, errors.worst
    assert not said()


def test_a_router_that_is_a_linear_module_is_pefts_own(ids: Tensor, handed: list[tuple[int, int]]) -> None:
    def adapted(implementation: str) -> PeftModel:
        model = tiny_hunyuan(implementation)
        return with_adapter(model, target_modules=["q_proj", "gate.wg"])

    ours = adapted("expertune")
    assert_same(everything(ours, ids), everything(adapted("eager"), ids))
    assert handed
    assert expertune.check_peft_model(ours) == []
    assert any("gate.wg.lora_A" in name for name, _ in ours.named_parameters())


def tiny_hunyuan(implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "hunyuan_v1_moe", vocab_size=VOCAB, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, moe_topk=2,
        moe_intermediate_size=32, num_shared_expert=1, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, experts_implementation=implementation)


def test_a_routers_adapter_is_not_rounded_to_the_weights_bf16() -> None:
    """A router that computes in fp32 from bf16 weights: PEFT rounds W + s B A to bf16, the second linear nothing."""

    def logits(implementation: str, dtype: torch.dtype) -> Tensor:
        model = build("deepseek_v3", implementation)
        targets = expertune.get_target_parameters(model, router=True)
        wrapper = with_adapter(model, target_parameters=targets).get_base_model().model.layers[1].mlp.gate
        weight = wrapper.get_param()
        weight.data = weight.data.bfloat16().to(dtype)
        assert wrapper.lora_A["default"].weight.dtype == torch.float32
        adapted, *_ = wrapper(torch.randn(64, 64, generator=torch.Generator().manual_seed(2)))
        assert adapted.dtype == torch.float32
        return adapted.detach()

    truth = logits("eager", torch.float32)
    assert relative_error(logits("expertune", torch.bfloat16), truth) < OUTPUT
    assert relative_error(logits("eager", torch.bfloat16), truth) > 50 * OUTPUT


def test_a_router_under_autocast_is_computed_as_without_an_adapter(ids: Tensor) -> None:
    model = with_adapter(tiny_model("expertune"), target_parameters=[*BOTH, ROUTER])
    router = model.get_base_model().model.layers[0].mlp.gate
    x_TH = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    want, *_ = router(x_TH)
    with torch.autocast("cpu", torch.bfloat16):
        got, *_ = router(x_TH)
        plain, *_ = router.get_base_layer()(x_TH)
    assert got.dtype == plain.dtype
    assert relative_error(got, want) < 1e-2


def test_a_router_whose_weight_is_a_dtensor(tmp_path: Any) -> None:
    """One process, a mesh of one: enough for torch to refuse a plain tensor beside a DTensor, which PEFT's fold has."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        results = {}
        for implementation in ("eager", "expertune"):
            options = {"target_parameters": [*BOTH, ROUTER], "target_modules": []}
            model = with_adapter(tiny_model(implementation, num_hidden_layers=1), **options)
            wrapper = model.get_base_model().model.layers[0].mlp.gate
            x_TH = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
            want, *_ = wrapper(x_TH)
            want.square().sum().backward()
            grads = [wrapper.lora_A["default"].weight.grad.clone(), wrapper.lora_B["default"].weight.grad.clone()]
            wrapper.zero_grad()
            router = wrapper.get_base_layer()
            router.weight = nn.Parameter(
                distribute_tensor(router.weight.data, mesh, [Replicate()]), requires_grad=False
            )

            def forward(wrapper: nn.Module = wrapper, x_TH: Tensor = x_TH) -> Tensor:
                got, *_ = wrapper(DTensor.from_local(x_TH, mesh, [Replicate()]))
                assert isinstance(got, DTensor)
                got.square().sum().backward()
                return got.to_local()

            if implementation == "eager":
                results[implementation] = outcome(forward)
                continue
            assert relative_error(forward(), want) < OUTPUT
            for factor, gradient in zip((wrapper.lora_A, wrapper.lora_B), grads, strict=True):
                assert relative_error(factor["default"].weight.grad, gradient) < GRADIENT
        assert "mixed torch.Tensor and DTensor" in results["eager"][1]
    finally:
        dist.destroy_process_group()


# What is not fused.


def test_a_bias_goes_to_pefts_fold_and_is_named_once(
    ids: Tensor, said: Callable[[], list[str]], handed: list[tuple[int, int]]
) -> None:
    def adapted(implementation: str) -> PeftModel:
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"]
        return with_adapter(build("gpt_oss", implementation), target_parameters=targets)

    want = everything(adapted("eager"), ids)
    model = adapted("expertune")
    for _ in range(2):
        assert_same(everything(model, ids), want)
    assert set(handed) == {(4, 0)}
    (message,) = said()
    assert "PEFT's fold" in message
    assert "gate_up_proj_bias is not one of the projections gate_up_proj and down_proj" in message


def test_another_parameter_goes_to_pefts_fold_and_is_named_once(
    ids: Tensor, said: Callable[[], list[str]], handed: list[tuple[int, int]]
) -> None:
    options = {"target_modules": [], "target_parameters": [*BOTH, "self_attn.q_proj.weight"]}
    want = everything(with_adapter(tiny_model("eager"), **options), ids)
    assert not said()
    model = with_adapter(tiny_model("expertune"), **options)
    for _ in range(2):
        assert_same(everything(model, ids), want)
    assert set(handed) == {(4, 4)}
    (message,) = said()
    assert "PEFT's fold" in message
    assert "Linear.weight belongs neither to experts in Transformers' experts interface nor to a router" in message


def test_a_weight_in_8_bits_is_named_once(said: Callable[[], list[str]]) -> None:
    model = with_adapter(tiny_model("expertune"))
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    weight = wrapper.get_param()
    weight.data = weight.data.to(torch.float8_e4m3fn)
    name = wrapper.parameter_name
    assert adapters.unfused_reason(wrapper) == f"{name} is stored as torch.float8_e4m3fn"
    with wrapper._activate_lora(["default"]):
        assert parametrize.is_parametrized(wrapper.get_base_layer(), name), "PEFT's own fold"
    with wrapper._activate_lora(["default"]):
        pass
    (message,) = said()
    assert f"{name} is stored as torch.float8_e4m3fn" in message


def test_a_router_with_another_product_gets_the_folded_weight(ids: Tensor, said: Callable[[], list[str]]) -> None:
    def with_matmul(implementation: str) -> PeftModel:
        model = with_adapter(tiny_model(implementation), target_parameters=[*BOTH, ROUTER])
        for layer in model.get_base_model().model.layers:
            router = layer.mlp.gate.get_base_layer()

            def forward(x: Tensor, router: Any = router) -> tuple[Tensor, Tensor, Tensor]:
                logits = torch.mm(x.view(-1, router.weight.shape[-1]), router.weight.float().t())
                weights, chosen = logits.softmax(-1).topk(2)
                return logits, weights / weights.sum(-1, keepdim=True), chosen

            router.forward = forward
        return model

    want = everything(with_matmul("eager"), ids)
    assert_same(everything(with_matmul("expertune"), ids), want)
    (message,) = said()
    assert "Qwen3MoeTopKRouter uses its weight in t, not in F.linear alone" in message


def test_an_adapter_that_nothing_would_apply_is_an_error(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    model = with_adapter(tiny_model("expertune"))
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "expertune", grouped_mm_experts_forward)
    with pytest.raises(
        BackendError, match=r"Qwen3MoeExperts: .* something else computed the experts, without the adapter"
    ):
        model(input_ids=ids)
    with model.disable_adapter():
        model(input_ids=ids)


def test_a_copied_and_a_pickled_model_are_the_same(ids: Tensor, unfolded: Callable[[], None]) -> None:
    model = with_adapter(tiny_model("expertune"), target_parameters=[*BOTH, ROUTER])
    unfolded()
    want = everything(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(everything(twin, ids), want)


def test_switching_the_implementation_of_an_adapted_model(
    ids: Tensor, handed: list[tuple[int, int]], unfolded: Callable[[], None]
) -> None:
    model = with_adapter(tiny_model("eager"), target_parameters=[*BOTH, ROUTER])
    want = everything(model, ids)
    assert not handed
    model.get_base_model().set_experts_implementation("torch_grouped")
    unfolded()
    assert_same(everything(model, ids), want)
    assert handed == [(4, 4), (4, 4)]
    assert any(is_experts_module(module) for module in model.modules())
