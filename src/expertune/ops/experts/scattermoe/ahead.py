"""Every kernel of an expert MLP, compiled side by side before the first of them is launched.

A model's first call would compile one variant after the other, forward and backward, each as its launch comes. Here the
same functions run once, on a few tokens and the call's own weights, while launches only compile (`compile_only`). What
decides about a variant is in `Call`; the number of tokens does not (see `triton_launch`), so that one dry run serves a
model's layers of one shape, and batches of any length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe.gate_hopper import AdapterSide
from expertune.ops.experts.scattermoe.halves import down_backward, down_forward, up_backward, up_forward
from expertune.ops.experts.scattermoe.products import NO_GRADS, Grads, Products
from expertune.ops.experts.scattermoe.sums import RowsOf
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.torch_grouped import unflatten_projection
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan
from expertune.ops.triton_launch import compile_only, is_first

NUM_TOKENS = 64  # of the dry run; any number but 0 compiles the same kernels
Parameter = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]
"""Shape, strides, dtype, whether a gradient is wanted: plain, for each call builds eight to look itself up."""


class Call(NamedTuple):
    """What decides which kernels a call launches, and in which specialisations.

    x_stride: between the rows of x, as kernels read them. gate: the activation, if a kernel computes it. parameters: of
    up, then of down, as `flatten_projection` has them. backward: whether there can be one.
    """

    x_stride: int
    x_needs_grad: bool
    weights_dtype: torch.dtype
    top_k: int
    parameters: tuple[Parameter | None, ...]
    gate: Gate | None
    tile: LinearTile
    backward: bool


def compile_ahead(tensors: Sequence[Tensor | None], activation: Activation, tile: LinearTile) -> None:
    """Compile what an expert MLP launches, unless that was done before.

    tensors: what `mlp` hands to autograd, on a GPU: x, the routing weights, and up and down, flattened.
    """
    x_TH, _, *flat = tensors
    assert x_TH is not None
    call = call_of(tensors, activation, tile)
    if is_first(x_TH.device, call):
        with torch.cuda.device(x_TH.device), compile_only():
            dry_run(call, flat)


def call_of(tensors: Sequence[Tensor | None], activation: Activation, tile: LinearTile) -> Call:
    """What `compile_ahead` looks up, in every step: some microseconds."""
    x_TH, weights_TK, *flat = tensors
    assert x_TH is not None
    assert weights_TK is not None
    (_, width), (x_stride, x_step) = x_TH.shape, x_TH.stride()
    parameters = [
        None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
        for tensor in flat
    ]
    needs_grad = [tensor is not None and tensor.requires_grad for tensor in tensors]
    return Call(
        x_stride if x_step == 1 and x_stride >= width else width,  # others are made contiguous
        x_TH.requires_grad,
        weights_TK.dtype,
        weights_TK.shape[1],
        tuple(parameters),
        activation if isinstance(activation, Gate) else None,
        tile,
        torch.is_grad_enabled() and any(needs_grad),
    )


@torch.no_grad()
def dry_run(call: Call, flat: Sequence[Tensor | None], num_tokens: int = NUM_TOKENS) -> None:
    """Go through forward and backward while nothing is launched: what is read was never written, and nobody minds.

    flat: the parameters of up and down, as in `call`. Real tensors, for those on meta cost a second of imports.
    """
    up, down = unflatten_projection(flat[:4], scaling=1.0), unflatten_projection(flat[4:], scaling=1.0)
    (num_experts, _, width), device = up.weight_EYX.shape, up.weight_EYX.device
    x_TH = torch.empty_strided((num_tokens, width), (call.x_stride, 1), dtype=up.weight_EYX.dtype, device=device)
    weights_TK = torch.empty(num_tokens, call.top_k, dtype=call.weights_dtype, device=device)
    products = _LaunchesOnly.of(_plan(num_tokens, call.top_k, num_experts, device), call.tile)
    activation = call.gate or _shaped_to(down.weight_EYX.shape[2])

    h_SJ, u1_SR = up_forward(products, x_TH, up)
    y_TH, u2_SR = down_forward(products, h_SJ, weights_TK, down, activation)
    if call.backward:
        needs = [like is not None and like[3] for like in call.parameters]
        u1 = AdapterSide.if_needed(needs[3], u1_SR, up.lora)
        dh_SJ, *_, db_EJR = down_backward(
            products, h_SJ, weights_TK, u2_SR, down, activation, y_TH, (True, False, *needs[4:]), reuse_h=True, u1=u1
        )
        up_backward(products, x_TH, u1_SR, up, dh_SJ, (call.x_needs_grad, *needs[:4]), db_EJR)


class _LaunchesOnly(Products):
    """Products without those that are torch's own: they need no compilation."""

    def parameter_grads(
        self,
        dout: RowsOf,
        v_SR: Tensor | None,
        x: RowsOf | None,
        u_SR: Tensor | None,
        projection: ExpertProjection,
        need: Sequence[bool],
        p_S: Tensor | None = None,
        found: Grads = NO_GRADS,
    ) -> Grads:
        return super().parameter_grads(dout, v_SR, x, u_SR, projection, (False, False, *need[2:]), p_S, found)


def _plan(num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> ExpertPlan:
    rows_S = torch.zeros(num_tokens * top_k, dtype=torch.int64, device=device)  # torch's own indexing reads them
    fence_F = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    return ExpertPlan(num_tokens, top_k, num_experts, rows_S, rows_S, rows_S, fence_F, has_sentinels=False)


def _shaped_to(num_columns: int) -> Activation:
    """In the place of a function of the user's, which may do more than compute: a contiguous result of its shape."""
    return lambda h_SJ: h_SJ[:, :num_columns].contiguous()
