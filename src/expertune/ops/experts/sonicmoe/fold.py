"""An adapter folded into the weight of each expert, for products that take a dense weight only.

    W_eff[e] = W[e] + s B[e] A[e]              formed in fp32, rounded once to the dtype of W, with the strides of W
    dA[e] = s B[e]^T dW[e]      dB[e] = s dW[e] A[e]^T      dW of W_eff; sums in fp32, an expert without rows gets zeros

FLOPs: 2 E Y X R forward, 4 E Y X R backward, beside a dense dW, 2 S Y X. Bytes: W read, W_eff written, dW read, E Y X
values each, however few tokens there are. Saved for the backward: A and B; W_eff is what the products save. fp32
copies are of a few experts at a time, never of the whole weight.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expertune.ops.experts.types import ExpertLora, ExpertProjection
from expertune.ops.integers import cdiv

CHUNK_VALUES = 2**24  # of the weights that are in fp32 at a time: 64 MiB, and enough work for a launch


def fold_projection(projection: ExpertProjection) -> ExpertProjection:
    """The projection with its adapter folded into a new weight; without an adapter it comes back as it is.

    The result's weight asks for a gradient where the adapter does. The base's own weight gets one, that of W_eff, only
    if it requires it; frozen, none is formed.
    """
    if projection.lora is None:
        return projection
    return ExpertProjection(fold(projection.weight_EYX, projection.lora), projection.bias_EY)


def fold(weight_EYX: Tensor, lora: ExpertLora) -> Tensor:
    """W + s B A [E, out, in] in the dtype and the strides of W; differentiable, any strides of A and B."""
    with torch.autocast(weight_EYX.device.type, enabled=False):
        return _Fold.apply(weight_EYX, lora.a_ERX, lora.b_EYR, lora.scaling)


class _Fold(torch.autograd.Function):
    """Inputs: W, A, B, scaling."""

    @staticmethod
    def forward(ctx, weight_EYX, a_ERX, b_EYR, scaling):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a_ERX, b_EYR)
        ctx.scaling = scaling
        wide = _wide_dtype(weight_EYX)
        folded_EYX = torch.empty_like(weight_EYX)
        for experts in _chunks(weight_EYX):
            a, b, weight = (each[experts].to(wide) for each in (a_ERX, b_EYR, weight_EYX))
            folded_EYX[experts].copy_(torch.baddbmm(weight, b, a, alpha=scaling))
        return folded_EYX

    @staticmethod
    def backward(ctx, dweight_EYX):  # type: ignore[no-untyped-def]
        a_ERX, b_EYR = ctx.saved_tensors
        need_weight, need_a, need_b, _ = ctx.needs_input_grad
        wide = _wide_dtype(dweight_EYX)
        da_ERX = torch.empty_like(a_ERX) if need_a else None
        db_EYR = torch.empty_like(b_EYR) if need_b else None
        with torch.autocast(dweight_EYX.device.type, enabled=False):
            for experts in _chunks(dweight_EYX) if need_a or need_b else ():
                dweight = dweight_EYX[experts].to(wide)
                if da_ERX is not None:
                    da_ERX[experts].copy_((b_EYR[experts].to(wide).transpose(1, 2) @ dweight).mul_(ctx.scaling))
                if db_EYR is not None:
                    db_EYR[experts].copy_((dweight @ a_ERX[experts].to(wide).transpose(1, 2)).mul_(ctx.scaling))
        return dweight_EYX if need_weight else None, da_ERX, db_EYR, None


def _chunks(weight_EYX: Tensor) -> Iterator[slice]:
    num_experts, num_out, num_in = weight_EYX.shape
    step = max(1, CHUNK_VALUES // max(1, num_out * num_in))
    for chunk in range(cdiv(num_experts, step)):
        yield slice(chunk * step, (chunk + 1) * step)


def _wide_dtype(weight_EYX: Tensor) -> torch.dtype:
    """fp32, or fp64 for a weight of that."""
    return torch.promote_types(weight_EYX.dtype, torch.float32)
