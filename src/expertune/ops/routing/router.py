"""A router's logits: its linear, and an adapter of its weight as a second linear, all of it in fp32.

    logits = W x + b + sum of s B (A x)

The adapter is never added to the weight: in bf16 that would round away what it changes, where a router needs it most.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.ops.experts.types import ExpertLora


def router_logits(
    hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None, *, loras: Sequence[ExpertLora] = ()
) -> Tensor:
    """The logits of a router, in fp32 whatever its dtypes are (fp64 if one is), also under autocast.

    hidden_TH: [T, H]. weight_EH: [E, H]. bias_E: [E] or None. loras: a [1, R, H] and b [1, E, R] each, any number.
    Raises ValueError if the shapes do not belong together.
    """
    num_experts = weight_EH.shape[0]
    if weight_EH.dim() != 2:
        raise ValueError(f"weight_EH: got shape {tuple(weight_EH.shape)}, need [experts, hidden]")
    if hidden_TH.dim() != 2 or hidden_TH.shape[1] != weight_EH.shape[1]:
        raise ValueError(f"hidden_TH: got shape {tuple(hidden_TH.shape)}, need [tokens, {weight_EH.shape[1]}]")
    if bias_E is not None and bias_E.shape != (num_experts,):
        raise ValueError(f"bias_E: got shape {tuple(bias_E.shape)}, need ({num_experts},)")
    dtype = torch.promote_types(torch.promote_types(hidden_TH.dtype, weight_EH.dtype), torch.float32)
    x_TH = hidden_TH.to(dtype)
    with torch.autocast(hidden_TH.device.type, enabled=False):
        logits_TE = F.linear(x_TH, weight_EH.to(dtype), None if bias_E is None else bias_E.to(dtype))
    return add_second_linear(logits_TE, x_TH, loras)


def add_second_linear(logits: Tensor, x: Tensor, loras: Sequence[ExpertLora]) -> Tensor:
    """`logits + sum of s B A x`, computed in fp32 and rounded to the dtype of the logits.

    logits: [..., E]. x: [..., H]; a DTensor takes plain adapters as replicated. loras: a [1, R, H], b [1, E, R].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = logits.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        for lora in loras:
            a_RH, b_ER = (_beside(x, factor[0].to(dtype)) for factor in (lora.a_ERX, lora.b_EYR))
            total = total + F.linear(F.linear(x.to(dtype), a_RH), b_ER) * lora.scaling
    return total.to(logits.dtype)


def _beside(x: Tensor, factor: Tensor) -> Tensor:
    """The factor as x needs it: a DTensor on x's mesh where x is one."""
    mesh = getattr(x, "device_mesh", None)
    if mesh is None or hasattr(factor, "device_mesh"):
        return factor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)
