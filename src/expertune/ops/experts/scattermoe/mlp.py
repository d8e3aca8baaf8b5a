"""The whole expert MLP with LoRA on the fused kernels, as one autograd function.

Formulas are those of `torch_grouped`; here nothing is gathered in memory, each adapter rides in the accumulator of its
base product, and sums over K keep fp32 until they are stored. Bars join what one kernel does:

forward    u1 = A1 x_t | h = W1 x_t + s1 B1 u1 | a = act(h) | u2 = A2 a | z = W2 a + s2 B2 u2 | y = combine(p, z)
backward   v2 = B2^T dy_t | da = W2^T dy_t + s2 A2^T v2 | dh, dp, a | v1 = B1^T dh | dx = combine(W1^T dh + s1 A1^T v1)
           dB2 = s2 p dy_t u2^T | dA2 = s2 p v2 a^T | dB1 = s1 dh u1^T | dA1 = s1 v1 x_t^T         (sums in fp32)

Saved: x (the caller's own), h, u1, u2, the routing weights and the plan. In a backward that frees the graph, dh is
written over h; a always over da. Eager code runs an autograd function, torch.compile traces ops (`compiled`); both are
the same two halves (`halves`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.ops.experts.scattermoe.ahead import compile_ahead
from expertune.ops.experts.scattermoe.compiled import traced_expert_mlp
from expertune.ops.experts.scattermoe.gate_hopper import AdapterSide
from expertune.ops.experts.scattermoe.halves import down_backward, down_forward, up_backward, up_forward
from expertune.ops.experts.scattermoe.products import Products, at_home, check_devices, check_dtype, tensors_of
from expertune.ops.experts.scattermoe.tiling import LinearTile, pick_tile
from expertune.ops.experts.torch_grouped import (
    check_expert_mlp,
    flatten_projection,
    scaling_of,
    unflatten_projection,
)
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan


def scattermoe_expert_mlp(
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
    *,
    tile: LinearTile | None = None,
) -> Tensor:
    """Compute `y_t = sum over K of p (W2 act(W1 x + ...) + ...)`; arguments and gradients of `grouped_expert_mlp`.

    activation: SWIGLU runs in a kernel, any other function through autograd.
    tile: of the four big products; by default `pick_tile` decides by the rows of an expert, the dtype and the GPU.
    Adapter gradients are fp32 sums, stored in the adapters' dtype. Deterministic, also bit for bit.
    """
    check_expert_mlp(x_TH, weights_TK, plan, up, down)
    check_devices(x_TH, "x_TH", plan, weights_TK=weights_TK, **tensors_of("up", up), **tensors_of("down", down))
    check_dtype("up.weight_EYX", up.weight_EYX)
    dtype = up.weight_EYX.dtype
    if torch.compiler.is_compiling():
        return traced_expert_mlp(x_TH.to(dtype), weights_TK, plan, up, down, activation, tile).to(x_TH.dtype)
    tile = tile or pick_tile(plan.num_rows, plan.num_experts, dtype, x_TH.device)
    options = _Options(plan, activation, (scaling_of(up), scaling_of(down)), tile)
    tensors = (x_TH.to(dtype), weights_TK.contiguous(), *flatten_projection(up), *flatten_projection(down))
    if x_TH.is_cuda:
        compile_ahead(tensors, activation, tile)
    return _ScatterMoE.apply(options, *tensors).to(x_TH.dtype)


@dataclass(frozen=True)
class _Options:
    """What is no tensor of autograd's."""

    plan: ExpertPlan
    activation: Activation
    scalings: tuple[float, float]
    tile: LinearTile


class _ScatterMoE(torch.autograd.Function):
    """Input 0 holds no tensors of autograd's; 1: x, 2: routing weights, 3-6: up, 7-10: down."""

    @staticmethod
    def forward(ctx, options, x_TH, weights_TK, *flat):
        up = unflatten_projection(flat[:4], options.scalings[0])
        down = unflatten_projection(flat[4:], options.scalings[1])
        with at_home(x_TH):
            products = Products.of(options.plan, options.tile)
            h_SJ, u1_SR = up_forward(products, x_TH, up)
            y_TH, u2_SR = down_forward(products, h_SJ, weights_TK, down, options.activation)
        ctx.options, ctx.products = options, products
        ctx.save_for_backward(x_TH, weights_TK, h_SJ, u1_SR, u2_SR, *flat)
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):
        options, products = ctx.options, ctx.products
        x_TH, weights_TK, h_SJ, u1_SR, u2_SR, *flat = ctx.saved_tensors
        up = unflatten_projection(flat[:4], options.scalings[0])
        down = unflatten_projection(flat[4:], options.scalings[1])
        need_x, need_weights, *need_flat = ctx.needs_input_grad[1:]
        reuse_h = not torch._C._autograd._get_current_graph_task_keep_graph()
        with at_home(x_TH):
            dh_SJ, dweights_TK, *grads_down, db1_EJR = down_backward(
                products, h_SJ, weights_TK, u2_SR, down, options.activation, dy_TH,
                (True, need_weights, *need_flat[4:]), reuse_h=reuse_h,
                u1=AdapterSide.if_needed(need_flat[3], u1_SR, up.lora),
            )  # fmt: skip
            dx_TH, *grads_up = up_backward(products, x_TH, u1_SR, up, dh_SJ, (need_x, *need_flat[:4]), db1_EJR)
        return None, dx_TH, dweights_TK, *grads_up, *grads_down
