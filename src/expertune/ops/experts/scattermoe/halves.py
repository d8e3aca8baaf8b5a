"""The halves of the expert MLP, up to h and from h on, forward and backward: plain functions on the fused kernels.

They know nothing of autograd. The autograd function of `mlp` runs both in one node; the ops of `compiled` are one each,
so that torch.compile can trace an activation of its own between them. Formulas: see `mlp`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from expertune.ops.experts.scattermoe.between import activate, activate_backward
from expertune.ops.experts.scattermoe.combine import combine
from expertune.ops.experts.scattermoe.gate_hopper import AdapterSide
from expertune.ops.experts.scattermoe.products import Grads, Products, bias_part, packed
from expertune.ops.experts.scattermoe.sums import RowsOf
from expertune.ops.experts.types import Activation, ExpertProjection


def up_forward(products: Products, x_TH: Tensor, up: ExpertProjection) -> tuple[Tensor, Tensor | None]:
    """(h [S, J], u1 [S, R'] or None) of x [T, H]; sentinel rows are not written."""
    x, lora = products.rows_of(x_TH, grouped=False), packed(up)
    u1_SR = products.thin(x, lora.a_ERX) if lora else None
    return products.forward(x, up, lora, u1_SR), u1_SR


def down_forward(
    products: Products, h_SJ: Tensor, weights_TK: Tensor, down: ExpertProjection, activation: Activation | None
) -> tuple[Tensor, Tensor | None]:
    """(y [T, H], u2 [S, R'] or None) of h [S, J]. activation: None if h is a, the activation being done already."""
    lora = packed(down)
    a, u2_SR = activate(products, h_SJ, activation, lora)
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
    u1: AdapterSide | None = None,
) -> tuple[Any, ...]:
    """Gradients of h (scaled by p), of the routing weights, of weight, bias, A and B of `down`, and of the other B.

    needs: which of the first six; dh always comes, the others are None if not needed. reuse_h: dh may be written over
    h. u1: with the up projection's adapter, if the gradient of its B is wanted. Where that would cost a pass of its
    own, it is None, and `up_backward` makes it.
    """
    plan, (_, need_weights, *need_down), lora = products.plan, needs, packed(down)
    need_weight, _, need_lora_a, _ = need_down
    dy = products.rows_of(dy_TH, grouped=False)
    p_S = weights_TK.reshape(-1).index_select(0, plan.slot_of_row_S)  # indexing takes the host twice as long
    v2_SR = products.thin(dy, lora.b_EYR.transpose(1, 2)) if lora else None
    da_SI = products.input_grad(dy, down, lora, v2_SR)
    del lora
    v2 = AdapterSide.if_needed(need_lora_a, v2_SR, down.lora)
    between = activate_backward(
        products, h_SJ, da_SI, p_S, weights_TK, activation, need_a=need_weight, reuse_h=reuse_h, v2=v2, u1=u1
    )
    del da_SI
    a = None if between.a_SI is None else RowsOf(between.a_SI, None)
    found = Grads(a_ERX=between.lora_a_ERI)
    grads = products.parameter_grads(dy, v2_SR, a, u2_SR, down, need_down, p_S, found)
    dweights_TK = between.dweights_TK if need_weights else None
    if dweights_TK is not None and down.bias_EY is not None:
        dweights_TK = dweights_TK + bias_part(dy.rows_NX, down.bias_EY, plan).to(dweights_TK.dtype)
    return between.dh_SJ, dweights_TK, *grads, between.up_b_EJR


def up_backward(
    products: Products,
    x_TH: Tensor,
    u1_SR: Tensor | None,
    up: ExpertProjection,
    dh_SJ: Tensor,
    needs: Sequence[bool],
    b_grad_EJR: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, and of weight, bias, A and B of `up`; None if not needed. b_grad: that of B, if it is there."""
    dx_TH, v1_SR, (need_x, *need_up) = None, None, needs
    dh, x, lora = products.rows_of(dh_SJ, grouped=True), products.rows_of(x_TH, grouped=False), packed(up)
    if lora and (need_x or need_up[2]):
        v1_SR = products.thin(dh, lora.b_EYR.transpose(1, 2))
    if need_x:
        dx_TH = combine(products.input_grad(dh, up, lora, v1_SR), None, products.plan)
    return dx_TH, *products.parameter_grads(dh, v1_SR, x, u1_SR, up, need_up, found=Grads(b_EYR=b_grad_EJR))
