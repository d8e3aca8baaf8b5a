"""A saved adapter read from its file, with the names and shapes that PEFT gives it on the base model.

The base model's weights are not needed: PEFT wraps a model on the meta device, which costs seconds and no memory.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertune.layers.layout import is_experts_module, lora_from_peft, projection_names
from expertune.ops.experts.types import ExpertLora

PREFIX = "base_model.model."
"""What PEFT puts in front of every module's name."""


@dataclass(frozen=True)
class SavedLora:
    """One adapted weight.

    key: its name in the file, without ".lora_A.weight". module: the module's name in the base model. parameter: of a
    stacked or bare parameter, "" for a Linear's weight. is_experts: a projection of an experts module.
    interleaved: gate and up rows alternate in it. shape_a, shape_b: what PEFT's layer has: [experts * rank, in],
    [out, rank * experts]. a, b: what the file has, None if it is missing.
    """

    key: str
    module: str
    parameter: str
    is_experts: bool
    interleaved: bool
    num_experts: int
    rank: int
    scaling: float
    shape_a: torch.Size
    shape_b: torch.Size
    a: Tensor | None
    b: Tensor | None

    @property
    def name(self) -> str:
        """The adapted weight's name in the base model."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module

    def by_expert(self) -> ExpertLora:
        """A as [E, R, in] and B as [E, out, R]; both must be there."""
        assert self.a is not None
        assert self.b is not None
        return lora_from_peft(self.a, self.b, self.num_experts, self.scaling)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's file and configuration.

    model_type: of the base model. peft_config: PEFT's LoraConfig. base_model: what the configuration calls it.
    rest: tensors of the file that belong to no LoRA layer of the base model.
    """

    model_type: str
    base_model: str
    peft_config: Any
    loras: tuple[SavedLora, ...]
    rest: dict[str, Tensor]


def open_adapter(folder: Path, base_model: str | None = None, *, trust_remote_code: bool = False) -> SavedAdapter:
    """Read an adapter's folder without the base model's weights; its config.json is enough.

    base_model: a folder or a hub id; None: what the adapter's own configuration names.
    Raises ValueError if the adapter does not fit the base model, and what Transformers raises if there is none.
    """
    from peft import PeftConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    peft_config = PeftConfig.from_pretrained(str(folder))
    name = base_model or peft_config.base_model_name_or_path
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    plain = copy(peft_config)
    plain.init_lora_weights = True  # the others compute something from the base weights
    return read_adapter(get_peft_model(model, plain, low_cpu_mem_usage=True), folder, peft_config=peft_config)


def read_adapter(model: Any, folder: Path, *, peft_config: Any | None = None) -> SavedAdapter:
    """Read the file in `folder` against a PEFT model of the same adapter. The model's own values are not looked at."""
    from peft.utils import load_peft_weights

    tensors = load_peft_weights(str(folder), device="cpu")
    own_config = model.peft_config[model.active_adapter]
    used: set[str] = set()
    loras = []
    for key, layer in model.named_modules():
        if getattr(layer, "lora_A", None):
            loras.append(_saved_lora(key, layer, model.active_adapter, tensors))
            used |= {f"{key}.lora_A.weight", f"{key}.lora_B.weight"}
    return SavedAdapter(
        model_type=str(model.config.model_type),
        base_model=str(own_config.base_model_name_or_path),
        peft_config=own_config if peft_config is None else peft_config,
        loras=tuple(loras),
        rest={name: tensor for name, tensor in tensors.items() if name not in used},
    )


def _saved_lora(key: str, layer: Any, adapter: str, tensors: Mapping[str, Tensor]) -> SavedLora:
    base = layer.get_base_layer()
    parameter = str(getattr(layer, "parameter_name", ""))
    is_experts = is_experts_module(base) and parameter in projection_names(base)
    return SavedLora(
        key=key,
        module=key.replace(".base_layer", "").removeprefix(PREFIX),
        parameter=parameter,
        is_experts=is_experts,
        interleaved=is_experts and not getattr(base, "is_concatenated", True),
        num_experts=int(getattr(layer, "num_experts", 1)),
        rank=int(layer.r[adapter]),
        scaling=float(layer.scaling[adapter]),
        shape_a=layer.lora_A[adapter].weight.shape,
        shape_b=layer.lora_B[adapter].weight.shape,
        a=tensors.get(f"{key}.lora_A.weight"),
        b=tensors.get(f"{key}.lora_B.weight"),
    )
