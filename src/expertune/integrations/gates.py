"""Which known gate an experts module computes, so that a kernel can compute it itself."""

from typing import cast

import torch.nn.functional as F
from torch import nn

from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.types import Activation


def activation_of(experts: nn.Module) -> Activation:
    """The function between the projections: SWIGLU where it is exactly that, otherwise the module's own, unchanged.

    Exactly: Transformers' default gating, gate and up stacked one after the other, and SiLU for its activation. A gate
    of the module's own (gpt-oss) or another activation is never guessed.
    """
    if not experts.has_gate:
        return cast(Activation, experts.act_fn)
    own = cast(Activation, experts._apply_gate)
    stacked = bool(getattr(experts, "is_concatenated", True))
    return SWIGLU if stacked and _is_default_gate(experts) and _is_silu(experts.act_fn) else own


def _is_default_gate(experts: nn.Module) -> bool:
    from transformers.integrations.moe import _default_apply_gate  # torch 2.11 cannot trace an import of the module

    return getattr(experts._apply_gate, "__func__", None) is _default_apply_gate


def _is_silu(function: object) -> bool:
    from transformers.activations import SiLUActivation

    return function is F.silu or type(function) in (nn.SiLU, SiLUActivation)
