"""A process reads its own experts and no others, whatever the checkpoint calls and how it stores them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertune.errors import ConfigError
from expertune.integrations import sharded_model
from expertune.integrations.checkpoint_slices import by_layer, checkpoint_files, fill_in_parts, own_tensors
from expertune.layers.layout import is_experts_module, projection_names
from tests.integrations.architectures import architectures, build

TYPES = ("qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "deepseek_v3")
"""Experts each by themselves under two spellings; stacked, transposed and with biases; a router with a buffer."""


class Stored:
    """A tensor in a file: knows its shape, and counts who reads it."""

    def __init__(self, *shape: int) -> None:
        self.tensor, self.read = torch.arange(float(torch.Size(shape).numel())).reshape(shape), 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        self.read += self.tensor[rows].numel()
        return self.tensor[rows]


def test_only_own_experts_are_read() -> None:
    stored = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": Stored(2, 3) for e in range(12)}
    stored |= {"model.layers.0.mlp.experts.gate_up_proj": Stored(12, 3, 2), "model.norm.weight": Stored(12)}
    stored |= {"model.layers.1.mlp.shared_experts.up_proj.weight": Stored(12, 2)}
    own = own_tensors(stored, range(4, 8), 12)
    assert [own[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in range(4)] == [
        stored[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in range(4, 8)
    ]
    assert len(own) == 4 + 3
    rows = own["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(rows[...], stored["model.layers.0.mlp.experts.gate_up_proj"].tensor[4:8])
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].read == 4 * 3 * 2
    assert rows.get_shape() == [4, 3, 2]
    assert own["model.norm.weight"][...].shape == (12,), "what is no expert's is read as a whole"
    assert own["model.layers.1.mlp.shared_experts.up_proj.weight"][...].shape == (12, 2)
    assert [sorted(part)[0].split(".")[2] for part in list(by_layer(own))[1:]] == ["0", "1"]


def saved(model_type: str, folder: Path) -> PreTrainedModel:
    model = build(next(each for each in architectures() if each.folder == model_type), "eager")
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_parts_together_are_the_model(model_type: str, tmp_path: Path) -> None:
    whole = saved(model_type, tmp_path)
    experts = {name: module for name, module in whole.named_modules() if is_experts_module(module)}
    num_experts = next(getattr(m, projection_names(m)[0]).shape[0] for m in experts.values())
    values = dict(whole.state_dict())
    for index in range(2):
        each = num_experts // 2
        own = range(index * each, (index + 1) * each)
        model = sharded_model._empty_model(str(tmp_path), torch.float32, {})
        mesh: Any = type("Mesh", (), {"sizes": type("Sizes", (), {"expert": 2})})
        sharded_model.cut_experts_modules(model, mesh)
        filled: set[str] = set()
        largest = 0
        for names in fill_in_parts(model, str(tmp_path), torch.float32, torch.device("cpu"), own, num_experts):
            filled |= names
            largest = max(largest, len(names))
        assert largest < len(values), "all was read at once"
        got = model.state_dict()
        for name in filled:
            owner, _, last = name.rpartition(".")
            is_cut = owner in experts and last.removesuffix("_bias") in projection_names(experts[owner])
            want = values[name][own.start : own.stop] if is_cut else values[name]
            assert torch.equal(got[name], want), name
        assert not set(values) - filled - {"lm_head.weight"}, "something was not read"


def test_a_checkpoint_of_another_width_is_refused(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    model = sharded_model._empty_model(str(tmp_path), torch.float32, {})
    experts = next(module for module in model.modules() if is_experts_module(module))
    experts.down_proj = nn.Parameter(torch.empty(1, 2, 3, device="meta"))
    with pytest.raises(ConfigError, match=r"experts\.down_proj is \[.*\] in .*, and the model needs \[1, 2, 3\]"):
        list(fill_in_parts(model, str(tmp_path), torch.float32, torch.device("cpu"), range(8), 8))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no safetensors files, which several processes read in parts"):
        checkpoint_files(str(tmp_path))
