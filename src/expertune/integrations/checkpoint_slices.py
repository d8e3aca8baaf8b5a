"""A checkpoint read in parts: from its safetensors files into a model, layer by layer, only the experts that are owned.

What a checkpoint calls its weights and how it stores experts (one tensor each, or stacked) is Transformers' knowledge:
its conversion fills the model, and gets to see only the tensors, and of stacked ones only the rows, that this process
needs. Nothing is read before it is used, so a process never holds more than one layer beside its own share.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from expertune.errors import ConfigError

_ONE_EXPERT = re.compile(r"(?P<before>(?:^|.*\.)experts\.)(?P<id>\d+)(?P<after>\..*)")
_STACKED = re.compile(r"(?:^|.*\.)experts\.[^.]+(?:\.[^.]+)?$")
_LAYER = re.compile(r"(?:^|.*?\.)layers\.(\d+)\.")


class _Rows:
    """Some rows of a tensor in a file; reading happens where Transformers writes `tensor[...]`."""

    def __init__(self, stored: Any, rows: range) -> None:
        self.stored, self.rows = stored, rows

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        return self.stored[self.rows.start : self.rows.stop]

    def get_dtype(self) -> str:
        return str(self.stored.get_dtype())

    def get_shape(self) -> list[int]:
        return [len(self.rows), *self.stored.get_shape()[1:]]


def fill_in_parts(
    model: nn.Module, base_model: str, dtype: torch.dtype, device: torch.device, experts: range, num_experts: int
) -> Iterator[set[str]]:
    """Fill a model on the meta device from a checkpoint; yields after each part, first what is in no layer.

    model: a PreTrainedModel whose experts modules have room for the experts of `experts` alone, of `num_experts`.
    base_model: folder or hub id. device: where the tensors go. Each yield names the parameters and buffers that hold
    their values by then; the caller may take them out of the model.
    Raises ConfigError if there are no safetensors files, or if weights do not fit the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    load_config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),  # type: ignore[operator]
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
    )
    with ExitStack() as open_files:
        stored: dict[str, Any] = {}
        for path in checkpoint_files(base_model):
            file = open_files.enter_context(safe_open(path, framework="pt", device="cpu"))
            stored |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for part in by_layer(own_tensors(stored, experts, num_experts)):
            everything = set(model.state_dict())
            info, _ = convert_and_load_state_dict_in_model(model, part, load_config, None)
            if info.mismatched_keys:
                name, got, need = sorted(info.mismatched_keys)[0]
                raise ConfigError(
                    f"base_model: {name} is {list(got)} in {base_model}, and the model needs {list(need)}: the "
                    "checkpoint is of another model, or stores experts in a way that cannot be read in parts; with "
                    "expert_parallel_size: 1 it is read as a whole"
                )
            problems = [*info.error_msgs, *info.conversion_errors.values()]
            if problems:
                raise ConfigError(f"base_model: {base_model} cannot be read: {problems[0]}")
            yield everything - set(info.missing_keys)


def own_tensors(stored: Mapping[str, Any], experts: range, num_experts: int) -> dict[str, Any]:
    """The stored tensors that a process with these experts reads, under the names of a model that has no others.

    A tensor of one expert is left out or gets the number that it has here; of stacked ones the rows are taken.
    """
    if len(experts) == num_experts:
        return dict(stored)
    own: dict[str, Any] = {}
    for name, tensor in stored.items():
        of_one = _ONE_EXPERT.fullmatch(name)
        if of_one is None:
            is_stacked = _STACKED.fullmatch(name) is not None and tensor.get_shape()[0] == num_experts
            own[name] = _Rows(tensor, experts) if is_stacked else tensor
        elif int(of_one["id"]) in experts:
            own[f"{of_one['before']}{int(of_one['id']) - experts.start}{of_one['after']}"] = tensor
    return own


def by_layer(tensors: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The tensors in parts that a model's conversion can take one by one: outside of layers, then layer by layer."""
    parts: dict[int, dict[str, Any]] = {-1: {}}
    for name, tensor in tensors.items():
        layer = _LAYER.match(name)
        parts.setdefault(int(layer[1]) if layer else -1, {})[name] = tensor
    for number in sorted(parts):
        yield parts[number]


def checkpoint_files(base_model: str) -> list[str]:
    """The safetensors files of a folder or a hub id, downloaded if need be; ConfigError if there are none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    def found(name: str) -> str | None:
        return cached_file(
            base_model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
        )

    index = found(SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        files, _ = get_checkpoint_shard_files(base_model, index)
        return list(files)
    single = found(SAFE_WEIGHTS_NAME)
    if single is None:
        raise ConfigError(
            f"base_model: {base_model} has no safetensors files, which several processes read in parts; save it anew "
            "with Transformers 5, or train in one process"
        )
    return [single]
