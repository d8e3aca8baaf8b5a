"""Targets are read from the model, and what an adapter missed is found."""

from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import expertune
from expertune.errors import BackendError
from expertune.integrations.targets import doubled_ranks, summarise_trainable
from expertune.layers.backends import note_about, pick_backend, unavailable_reason
from tests.integrations.test_architectures import MODELS, build
from tests.tiny import tiny_model, with_adapter

TARGETS = {
    "mixtral": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    "olmoe": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    "gpt_oss": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    "deepseek_v3": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    "glm4_moe": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    "nemotron_h": ["mixer.experts.down_proj", "mixer.experts.up_proj"],
}


@pytest.mark.parametrize("name", MODELS)
def test_every_expert_is_found_and_adapted(name: str) -> None:
    model = build(name, "expertune")
    assert expertune.get_target_parameters(model) == TARGETS[name]
    adapted = with_adapter(model)
    assert expertune.check_peft_model(adapted) == []
    rows = {row.part: row for row in summarise_trainable(adapted)}
    assert rows["experts"].num_trainable > 0
    assert rows["experts"].num_adapted == rows["experts"].num_modules
    assert rows["attention"].num_trainable > 0
    total = sum(row.num_trainable for row in rows.values())
    assert total == adapted.get_nb_trainable_parameters()[0]


def test_the_router_only_on_request() -> None:
    model = tiny_model("expertune")
    assert "mlp.gate.weight" not in expertune.get_target_parameters(model)
    assert "mlp.gate.weight" in expertune.get_target_parameters(model, router=True)


def test_attention_modules() -> None:
    assert expertune.get_attention_modules(tiny_model("expertune")) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert {"kv_a_proj_with_mqa", "q_a_proj"} <= set(expertune.get_attention_modules(build("deepseek_v3", "expertune")))


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        expertune.get_target_parameters(AutoModelForCausalLM.from_config(config))


def llama4() -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llama4_text", vocab_size=32, hidden_size=16, intermediate_size=16, intermediate_size_mlp=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=2,
        moe_layers=[0],
    )  # fmt: skip


def test_experts_outside_of_the_interface_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(llama4())
    with pytest.raises(ValueError, match="stores experts outside of Transformers' experts interface"):
        expertune.get_target_parameters(model)


def test_what_an_adapter_missed_is_found() -> None:
    model = tiny_model("expertune")
    only_down = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    problems = expertune.check_peft_model(get_peft_model(model, only_down))
    assert problems == [
        f"model.layers.{layer}.mlp.experts.gate_up_proj was asked for and has no adapter" for layer in (0, 1)
    ]


def test_a_frozen_adapter_and_a_trainable_router_are_found() -> None:
    model = with_adapter(tiny_model("expertune"))
    for name, parameter in model.named_parameters():
        if "layers.1.mlp.experts" in name and "lora_A" in name:
            parameter.requires_grad_(False)
        if name.endswith("layers.0.mlp.gate.weight"):
            parameter.requires_grad_(True)
    problems = expertune.check_peft_model(model)
    assert sum("has an adapter that is frozen" in problem for problem in problems) == 2
    assert "model.layers.0.mlp.gate.weight: the router's own weight is trainable" in problems


DOUBLED = "has rank 8 where 4 was asked for: PEFT multiplied it, as target_modules name the stacked projections"


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]])
def test_a_rank_that_peft_doubled_is_found(modules: str | list[str]) -> None:
    model = get_peft_model(tiny_model("expertune"), LoraConfig(r=4, target_modules=modules))
    problems = expertune.check_peft_model(model)
    assert doubled_ranks(model) == [f"model.layers.{layer}.mlp.experts.gate_up_proj {DOUBLED}" for layer in (0, 1)]
    assert set(doubled_ranks(model)) <= set(problems)


def test_a_rank_that_was_asked_for_is_no_finding() -> None:
    for pattern in ({"gate_up_proj": 8}, {r".*layers\.0\.mlp\.experts\.gate_up_proj": 8, "down_proj": 1}):
        assert expertune.check_peft_model(with_adapter(tiny_model("expertune"), rank_pattern=pattern)) == []
    model = with_adapter(tiny_model("expertune"))
    model.peft_config["default"].r = 5  # as if something had changed the ranks behind the configuration's back
    assert len(doubled_ranks(model)) == 4
    assert doubled_ranks(model)[0].endswith("has rank 4 where 5 was asked for")


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "gate"]])
def test_a_router_that_is_adapted_by_accident_is_found(modules: str | list[str]) -> None:
    model = get_peft_model(tiny_model("expertune"), LoraConfig(r=4, target_modules=modules))
    found = [
        line for line in expertune.check_peft_model(model) if "the router has an adapter that nobody named" in line
    ]
    assert [line.split(":")[0] for line in found] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert all(line.endswith("ask for mlp.gate.weight") for line in found)


def test_a_router_that_is_adapted_on_purpose_is_no_finding() -> None:
    model = tiny_model("expertune")
    targets = expertune.get_target_parameters(model, router=True)
    model = with_adapter(model, target_parameters=targets)
    assert expertune.check_peft_model(model) == []
    assert expertune.check_peft_model(model, targets) == []


def test_experts_outside_of_the_interface_are_found_in_an_adapted_model() -> None:
    model = AutoModelForCausalLM.from_config(llama4())
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    outside = "model.layers.0.feed_forward.experts is outside of Transformers' experts interface"
    assert [line.split(":")[0] for line in expertune.check_peft_model(model)] == [outside]
    assert expertune.check_peft_model(model, []) == [], "attention only is what one can do there"


def test_backends_say_why_they_cannot_run() -> None:
    assert unavailable_reason("expertune", "cpu") is None
    assert unavailable_reason("torch_grouped", "cpu") is None
    assert "needs an NVIDIA GPU of compute capability 9.x or newer (Hopper)" in str(
        unavailable_reason("sonicmoe", "cpu")
    )
    assert "compute capability 8.x" in str(unavailable_reason("scattermoe", "cpu"))
    assert pick_backend("cpu") == "torch_grouped"
    with pytest.raises(ValueError, match="there are expertune, scattermoe, sonicmoe, torch_grouped"):
        unavailable_reason("magic")


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert "NVIDIA A100 has 8.0" in str(unavailable_reason("sonicmoe"))
    assert pick_backend("cuda") == "scattermoe"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "needs an NVIDIA GPU of compute capability 8.x" in str(unavailable_reason("scattermoe"))
    assert pick_backend("cuda") == "torch_grouped"


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("expertune.layers.backends.find_spec", lambda name: None)
    assert "needs the package triton, which is not installed" in str(unavailable_reason("scattermoe"))
    assert pick_backend("cuda") == "torch_grouped"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, tuple[int, int]], None]:
    """Make the machine have a GPU of a name and a capability."""

    def have(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    return have


@pytest.mark.parametrize("name", ["scattermoe", "sonicmoe", "sonicmoe_materialize"])
def test_a_triton_without_gluon_is_named(
    name: str,
    on_a_gpu: Callable[[str, tuple[int, int]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_a_gpu("NVIDIA H200", (9, 0))
    installed = {"triton": "3.6.0"}

    def version(package: str) -> str:
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr("expertune.layers.backends.metadata.version", version)
    assert unavailable_reason(name) is None
    need = f"{name} needs the package triton 3.6 or newer with its gluon dialect"
    installed["triton"] = "3.5.1"
    assert unavailable_reason(name) == f"{need}; triton 3.5.1 is installed. Use experts_implementation: expertune"
    assert pick_backend() == "torch_grouped"
    del installed["triton"]
    installed["pytorch-triton"] = "3.2.0+git0d4682f0"
    assert "triton 3.2.0+git0d4682f0 is installed" in str(unavailable_reason(name))
    installed["triton"] = "4.0.0"
    spec = ModuleSpec("triton", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("expertune.layers.backends.find_spec", lambda _: spec)
    assert f"{need}; triton 4.0.0 is installed, without gluon for Hopper" in str(unavailable_reason(name))


def test_auto_never_picks_what_only_a_name_should_choose(on_a_gpu: Callable[[str, tuple[int, int]], None]) -> None:
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        on_a_gpu("a GPU", capability)
        assert pick_backend() == "scattermoe"


def test_what_sonicmoe_does_on_a_gpu_newer_than_hopper_is_said(
    on_a_gpu: Callable[[str, tuple[int, int]], None],
) -> None:
    on_a_gpu("NVIDIA H200", (9, 0))
    assert note_about("sonicmoe") is None
    for name, capability in (("NVIDIA B300", (10, 3)), ("NVIDIA GeForce RTX 5090", (12, 0))):
        on_a_gpu(name, capability)
        assert unavailable_reason("sonicmoe") is None
        said = f"its Hopper kernel does not run on {name} ({capability[0]}.{capability[1]}): scattermoe's kernels run"
        assert said in str(note_about("sonicmoe"))
        assert note_about("scattermoe") is None


def test_a_backend_that_was_asked_for_by_name_is_refused_where_it_cannot_run() -> None:
    model = tiny_model("scattermoe")
    with pytest.raises(BackendError, match=r"experts_implementation='scattermoe': .* the model is on the CPU"):
        model(torch.tensor([[1, 2, 3]]))
