"""Bytes that are counted on the meta device are those of real tensors."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expertune.errors import ConfigError
from expertune.estimate.ledger import bytes_of
from expertune.estimate.model import adapt_on_meta, build_on_meta, count
from expertune.estimate.optimizers import _KEPT, optimizer_bytes
from expertune.layers.layout import is_experts_module
from expertune.train.config import TrainConfig
from expertune.train.config.run_keys import Optimizer
from expertune.train.model import add_adapter
from tests.estimate.settings import config_of
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_r": 3, "bf16": False},
        {"lora_target_parameters": []},
        {"lora_target_modules": []},
        {"lora_router": True},
        {"lora_modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_a_real_model(tmp_path: Path, changes: dict[str, object], tied: bool) -> None:
    model_config = tiny_config(tie_word_embeddings=tied)
    config = config_of(tmp_path, model_config, **changes)
    counted = count(build_on_meta(config))
    dtype = torch.float32 if changes.get("bf16") is False else torch.bfloat16
    bare = AutoModelForCausalLM.from_config(model_config, dtype=dtype, experts_implementation="expertune")
    experts = [p for module in bare.modules() if is_experts_module(module) for p in module.parameters()]
    everything = [*bare.parameters(), *bare.buffers()]
    frozen = (bytes_of(experts), bytes_of(everything) - bytes_of(experts))
    num_parameters = sum(p.numel() for p in bare.parameters())
    model = add_adapter(bare, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_experts = [p for name, p in trained.items() if ".experts." in name]
    if "lora_modules_to_save" not in changes:  # else a copy of the base's weight is frozen beside the trained one
        assert (counted.experts, counted.others) == frozen
        assert counted.num_parameters == num_parameters
    assert counted.expert_adapters == bytes_of(of_experts)
    assert counted.expert_adapters + counted.other_adapters == bytes_of(trained.values())
    assert counted.num_trainable == model.get_nb_trainable_parameters()[0]
    assert counted.num_experts == 8


def test_optimizer_states_are_those_of_adamw(tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny_config(), lora_r=16)
    model = add_adapter(AutoModelForCausalLM.from_config(tiny_config(), experts_implementation="expertune"), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    real = sum(value.numel() * value.element_size() for value in moments)
    counted = count(adapt_on_meta(AutoConfig.from_pretrained(config.base_model), config))
    assert optimizer_bytes("adamw_torch_fused").kept * counted.num_trainable == real


def test_every_optimizer_of_the_configuration_is_known() -> None:
    from typing import get_args

    assert set(get_args(Optimizer)) == set(_KEPT)
    with pytest.raises(ConfigError, match="optimizer: got lomo"):
        optimizer_bytes("lomo")


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny_config())
    (Path(config.base_model) / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"base_model: .* is no model's folder \(no config.json\)"):
        build_on_meta(config)


def test_an_adapter_to_go_on_from_is_refused(tmp_path: Path) -> None:
    config: TrainConfig = config_of(tmp_path, tiny_config()).model_copy(update={"lora_model_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="lora_model_dir: "):
        build_on_meta(config)
