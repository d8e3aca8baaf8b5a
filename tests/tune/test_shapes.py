"""Sizes out of the configurations of real model classes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import PretrainedConfig

from expertune.errors import ConfigError
from expertune.tune.shapes import shape_of_config, shape_of_model

# What each class calls its sizes; where two intermediate sizes exist the dense layers' is 999.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3MoeConfig": {
        "num_experts": 6, "moe_intermediate_size": 48, "intermediate_size": 999, "num_experts_per_tok": 3,
    },
    "MixtralConfig": {"num_local_experts": 6, "intermediate_size": 48, "num_experts_per_tok": 3},
    "Glm4MoeConfig": {
        "n_routed_experts": 6, "moe_intermediate_size": 48, "intermediate_size": 999, "num_experts_per_tok": 3,
    },
    "OlmoeConfig": {"num_experts": 6, "intermediate_size": 48, "num_experts_per_tok": 3},
    "GptOssConfig": {"num_local_experts": 6, "intermediate_size": 48, "num_experts_per_tok": 3},
    "DeepseekV3Config": {
        "n_routed_experts": 6, "moe_intermediate_size": 48, "intermediate_size": 999, "num_experts_per_tok": 3,
    },
    "Qwen3_5MoeTextConfig": {"num_experts": 6, "moe_intermediate_size": 48, "num_experts_per_tok": 3},
}  # fmt: skip


def config_of(name: str, **changes: Any) -> PretrainedConfig:
    if not hasattr(transformers, name):
        pytest.skip(f"this version of Transformers has no {name}")
    return getattr(transformers, name)(hidden_size=64, num_hidden_layers=2, **(MODELS[name] | changes))


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_a_saved_model(name: str, tmp_path: Path) -> None:
    config_of(name).save_pretrained(tmp_path / "my model")
    shape = shape_of_model(str(tmp_path / "my model"))
    assert (shape.num_experts, shape.hidden, shape.intermediate, shape.top_k) == (6, 64, 48, 3)
    assert shape.name == "my model"


def test_sizes_of_a_model_of_several_parts() -> None:
    text = config_of("Qwen3_5MoeTextConfig")
    whole = transformers.Qwen3_5MoeConfig(text_config=text.to_dict())
    shape = shape_of_config(whole, "org/name")
    assert (shape.num_experts, shape.hidden, shape.intermediate, shape.top_k) == (6, 64, 48, 3)
    assert shape.name == "name"


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    transformers.LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"\(LlamaConfig\) has none of n_routed_experts, .* give the sizes with --shape"
    ):
        shape_of_model(str(tmp_path))


@pytest.mark.parametrize("value", [[3, 3], 0, "3", True])
def test_a_size_that_is_no_number(value: object) -> None:
    config: Any = SimpleNamespace(num_experts=6, hidden_size=64, moe_intermediate_size=48, num_experts_per_tok=value)
    config.get_text_config = lambda: config
    with pytest.raises(ConfigError, match=r"m has num_experts_per_tok: .*, need one whole number"):
        shape_of_config(config, "m")


def test_more_experts_per_token_than_experts() -> None:
    with pytest.raises(ConfigError, match="m says 7 of 6 experts"):
        shape_of_config(config_of("MixtralConfig", num_experts_per_tok=7), "m")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no model's folder \(no config.json\)"):
        shape_of_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(ConfigError, match="has no configuration that Transformers can read: "):
        shape_of_model(str(tmp_path))
