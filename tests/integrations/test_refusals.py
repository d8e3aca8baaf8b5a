"""A model that would ignore our names is refused when it is loaded or built; others are left alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama4 import modeling_llama4
from transformers.models.mixtral import modeling_mixtral

import expertune
from expertune.errors import ConfigError, UnsupportedModelError
from expertune.integrations.refusals import experts_outside_of_the_interface
from expertune.layers.backends import IMPLEMENTATIONS
from expertune.train.config import TrainConfig
from expertune.train.model import load_model
from tests.integrations.architectures import architectures, modeling_files, outsiders
from tests.tiny import tiny_model

# Of Transformers 5.23; a release may add some, or give one of these the decorator.
UNDECORATED = {
    "dbrx": "DbrxExperts",
    "doge": "DogeCDMoE",
    "jetmoe": "JetMoeParallelExperts",
    "llama4": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
    "nllb_moe": "NllbMoeExperts",
    "step3p7": "Step3p7Experts",
    "switch_transformers": "SwitchTransformersExperts",
    "vitpose_backbone": "VitPoseNaiveMoe",
}
SIZES: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
        "moe_layers": [0],
    },
    "dbrx": {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 32},
    "jetmoe": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_local_experts": 2},
    "switch_transformers": {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}  # fmt: skip


def config_of(name: str) -> Any:
    return AutoConfig.for_model(name, **SIZES[name])


def tiny_llama() -> Any:
    return LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def models_in(path: Path) -> list[type[PreTrainedModel]]:
    module = __import__(f"transformers.models.{path.parent.name}.{path.stem}", fromlist=["_"])
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    ]


def test_every_moe_model_without_the_decorator_is_known() -> None:
    found = outsiders()
    assert "None" not in found.values()
    assert "llama4" in found
    assert {name: found[name] for name in UNDECORATED if name in found}.items() <= UNDECORATED.items()


def test_no_model_with_the_decorator_is_refused() -> None:
    for architecture in architectures():
        assert experts_outside_of_the_interface(architecture.model_class) is None, architecture


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_refused_when_built(implementation: str) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=rf"^Llama4ForCausalLM: experts_implementation='{implementation}' would be accepted and ignored, for its "
        r"experts \(Llama4TextExperts\) .*\. Load it without experts_implementation",
    ):
        AutoModelForCausalLM.from_config(config_of("llama4_text"), experts_implementation=implementation)


@pytest.mark.parametrize("name", SIZES)
def test_refused_whichever_way_it_is_asked_for(name: str) -> None:
    config = config_of(name)
    config._experts_implementation = "expertune"
    model_class = next(
        each
        for path, _ in modeling_files()
        if path.parent.name == name.removesuffix("_text")
        for each in models_in(path)
        if each.__name__.endswith(("ForCausalLM", "ForConditionalGeneration"))
    )
    with pytest.raises(ValueError, match=r"would be accepted and ignored"):  # ValueError: as for an unknown name
        model_class(config)


def test_refused_before_a_file_is_looked_for(tmp_path: Path) -> None:
    config_of("llama4_text").save_pretrained(tmp_path)  # no weights: looking for them would be an OSError
    for implementation in ("expertune", {"": "expertune"}):
        with pytest.raises(UnsupportedModelError, match="Llama4TextExperts"):
            AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_switching_is_refused_and_the_model_stays_as_it_was() -> None:
    model = AutoModelForCausalLM.from_config(config_of("llama4_text"))
    before = model.config._experts_implementation
    with pytest.raises(UnsupportedModelError):
        model.set_experts_implementation("torch_grouped")
    assert model.config._experts_implementation == before
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()


def test_other_names_are_transformers_business() -> None:
    for implementation in ("eager", "batched_mm", None):
        AutoModelForCausalLM.from_config(config_of("llama4_text"), experts_implementation=implementation)
    with pytest.raises(ValueError, match="is not supported"):
        AutoModelForCausalLM.from_config(config_of("llama4_text"), experts_implementation="nonsense")


def test_a_file_of_ones_own_that_borrows_decorated_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnMoE(nn.Module):
        pass

    OwnMoE.__module__ = modeling_mixtral.__name__
    monkeypatch.setattr(modeling_mixtral, "OwnMoE", OwnMoE, raising=False)
    assert experts_outside_of_the_interface(modeling_mixtral.MixtralForCausalLM) is None
    assert experts_outside_of_the_interface(nn.Linear) is None


def test_a_dense_model_is_warned_about_once_loaded(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_llama()).save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no experts: experts_implementation='expertune' changes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", experts_implementation="expertune")
    tiny_model("eager").save_pretrained(tmp_path / "moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="expertune")


def test_the_trainer_says_what_to_write(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config_of("llama4_text")).save_pretrained(tmp_path)
    config = TrainConfig(base_model=str(tmp_path), datasets=[{"path": "x"}], bf16=False)
    with pytest.raises(ConfigError, match=r"^base_model: Llama4ForCausalLM: .*lora_target_parameters: \[\] adapts"):
        load_model(config)
    attention_only = load_model(config.model_copy(update={"lora_target_parameters": []}))
    assert type(attention_only) is modeling_llama4.Llama4ForCausalLM


def test_installing_and_uninstalling() -> None:
    hooked = PreTrainedModel.get_correct_experts_implementation, PreTrainedModel.from_pretrained.__func__
    expertune.register()
    assert hooked == (PreTrainedModel.get_correct_experts_implementation, PreTrainedModel.from_pretrained.__func__)
    expertune.unregister()
    try:
        own = PreTrainedModel.get_correct_experts_implementation, PreTrainedModel.from_pretrained.__func__
        assert own == (hooked[0].expertune_original, hooked[1].expertune_original.__func__)
        expertune.unregister()
        assert PreTrainedModel.get_correct_experts_implementation is own[0]
    finally:
        expertune.register()
    with pytest.raises(UnsupportedModelError):
        AutoModelForCausalLM.from_config(config_of("llama4_text"), experts_implementation="expertune")
