"""The halves of the expert MLP, up to h and from h on, forward and backward: plain functions on the fused kernels.

They know nothing of autograd. The autograd function of `mlp` runs both in one node; the ops of `compiled` are one each,
so that torch.compile can trace an activation of its own between them. Formulas: see `mlp`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe.combine import combine
from expertune.ops.experts.scattermoe.gate import swiglu, swiglu_backward
from expertune.ops.experts.scattermoe.products import Products, bias_part, dense, packed
from expertune.ops.experts.scattermoe.sums import RowsOf
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan


def up_forward(products: Products, x_TH: Tensor, up: ExpertProjection) -> tuple[Tensor, Tensor | None]:
    """(h [S, J], u1 [S, R'] or None) of x [T, H]; sentinel rows are not written."""
    x, lora = products.rows_of(x_TH, grouped=False), packed(up)
    u1_SR = products.thin(x, lora.a_ERX) if lora else None
    return products.forward(x, up, lora, u1_SR), u1_SR


def down_forward(
    products: Products, h_SJ: Tensor, weights_TK: Tensor, down: ExpertProjection, activation: Activation | None
) -> tuple[Tensor, Tensor | None]:
    """(y [T, H], u2 [S, R'] or None) of h [S, J]. activation: None if h is a, the activation being done already."""
    a, lora = RowsOf(_activated(h_SJ, activation, products.plan), None), packed(down)
    u2_SR = products.thin(a, lora.a_ERX) if lora else None
    z_SH = products.forward(a, down, lora, u2_SR)
    del a, lora
    return combine(z_SH, weights_TK, products.plan), u2_SR


def down_backward(
    products: Products,
    h_SJ: Tensor,
    weights_TK: Tensor,
    u2_SR: Tensor | None,
    down: ExpertProjection,
    activation: Activation | None,
    dy_TH: Tensor,
    needs: Sequence[bool],
    *,
    reuse_h: bool,
) -> tuple[Any, ...]:
    """Gradients of h (scaled by p), of the routing weights, and of weight, bias, A and B of `down`.

    needs: which of them; dh always comes, the others are None if not needed. reuse_h: dh may be written over h.
    """
    plan, (_, need_weights, *need_down) = products.plan, needs
    dy, lora = products.rows_of(dy_TH, grouped=False), packed(down)
    p_S = weights_TK.reshape(-1)[plan.slot_of_row_S]
    v2_SR = products.thin(dy, lora.b_EYR.transpose(1, 2)) if lora else None
    da_SI = products.input_grad(dy, down, lora, v2_SR)
    del lora
    if isinstance(activation, Gate):
        need_a = need_down[0] or (need_down[2] and down.lora is not None)
        dh_SJ, a_SI, dweights_TK = swiglu_backward(
            h_SJ, da_SI, p_S, plan, weights_dtype=weights_TK.dtype, need_a=need_a, reuse=reuse_h
        )
    else:
        dh_SJ, a_SI, dweights_TK = _function_backward(activation, h_SJ, da_SI, p_S, weights_TK, plan)
    del da_SI
    grads = products.parameter_grads(dy, v2_SR, RowsOf(a_SI, None), u2_SR, down, need_down, p_S)
    if need_weights and down.bias_EY is not None:
        dweights_TK = dweights_TK + bias_part(dy.rows_NX, down.bias_EY, plan).to(dweights_TK.dtype)
    return dh_SJ, dweights_TK if need_weights else None, *grads


def up_backward(
    products: Products,
    x_TH: Tensor,
    u1_SR: Tensor | None,
    up: ExpertProjection,
    dh_SJ: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, and of weight, bias, A and B of `up`; None if not needed."""
    dx_TH, v1_SR, (need_x, *need_up) = None, None, needs
    dh, x, lora = products.rows_of(dh_SJ, grouped=True), products.rows_of(x_TH, grouped=False), packed(up)
    if lora and (need_x or need_up[2]):
        v1_SR = products.thin(dh, lora.b_EYR.transpose(1, 2))
    if need_x:
        dx_TH = combine(products.input_grad(dh, up, lora, v1_SR), None, products.plan)
    return dx_TH, *products.parameter_grads(dh, v1_SR, x, u1_SR, up, need_up)


def _function_backward(
    activation: Activation | None,
    h_SJ: Tensor,
    da_SI: Tensor,
    p_S: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh scaled by p, a, dweights) of an activation that is a plain function of torch, or None: a is h."""
    dh_SJ, a_SI = da_SI * p_S.unsqueeze(1).to(da_SI.dtype), h_SJ
    if activation is not None:
        with torch.enable_grad():
            leaf_SJ = h_SJ.detach().requires_grad_()
            a_SI = activation(leaf_SJ)
        (dh_SJ,) = torch.autograd.grad(a_SI, leaf_SJ, dh_SJ)
    dp_S = (da_SI.float() * a_SI.detach()).sum(dim=-1)
    if plan.has_sentinels:
        dp_S = dp_S.masked_fill(plan.sentinel_rows().squeeze(1), 0)
    dweights_TK = plan.to_slots(dp_S).view_as(weights_TK).to(weights_TK.dtype)
    return dense(dh_SJ), dense(a_SI.detach()), dweights_TK


def _activated(h_SJ: Tensor, activation: Activation | None, plan: ExpertPlan) -> Tensor:
    if isinstance(activation, Gate):
        return swiglu(h_SJ, plan)
    return dense(h_SJ if activation is None else activation(h_SJ))
