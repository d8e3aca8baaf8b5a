"""How checkpoints store experts and adapters, turned into the one layout of `ops`: [experts, out, in], without copies.

Source of the adapter layout: PEFT 0.21, `peft.tuners.lora.layer.ParamWrapper.get_delta_weight`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expertune.ops.experts.types import ExpertLora, ExpertProjection

DOWN = "down_proj"


def is_experts_module(module: nn.Module) -> bool:
    """Whether the module holds stacked experts in the form of Transformers' experts interface."""
    if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")):
        return False
    weights = [getattr(module, name, None) for name in projection_names(module)]
    return all(isinstance(weight, Tensor) and weight.dim() == 3 for weight in weights)


def projection_names(experts: nn.Module) -> tuple[str, str]:
    """The parameters of the up and the down projection: gated experts stack gate and up in one."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), DOWN


def read_projection(experts: nn.Module, name: str, lora: ExpertLora | None) -> ExpertProjection:
    """View one projection of an experts module as [E, out, in], with its bias if the module has biases."""
    weight: Tensor = getattr(experts, name)
    bias: Tensor | None = getattr(experts, f"{name}_bias") if getattr(experts, "has_bias", False) else None
    return ExpertProjection(weight.transpose(1, 2) if experts.is_transposed else weight, bias, lora)


def lora_from_peft(weight_a: Tensor, weight_b: Tensor, num_experts: int, scaling: float) -> ExpertLora:
    """View PEFT's adapter of a 3-D parameter as an ExpertLora.

    weight_a: [E * R, in], expert slowest. weight_b: [out, R * E], expert fastest.
    """
    a_ERX = weight_a.view(num_experts, -1, weight_a.shape[-1])
    b_EYR = weight_b.view(weight_b.shape[0], -1, num_experts).permute(2, 0, 1)
    return ExpertLora(a_ERX, b_EYR, scaling)


def sum_loras(loras: Sequence[ExpertLora]) -> ExpertLora:
    """One adapter that equals the sum of several: ranks concatenated, each scaling folded into its B."""
    if len(loras) == 1:
        return loras[0]
    a_ERX = torch.cat([lora.a_ERX for lora in loras], dim=1)
    b_EYR = torch.cat([lora.b_EYR * lora.scaling for lora in loras], dim=2)
    return ExpertLora(a_ERX, b_EYR, 1.0)
