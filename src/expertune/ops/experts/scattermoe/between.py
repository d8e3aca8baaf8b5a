"""What lies between the two projections: the activation, and on Hopper the adapters' work on its rows with it."""

from typing import NamedTuple

import torch
from torch import Tensor

from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe import gate_hopper
from expertune.ops.experts.scattermoe.gate import swiglu, swiglu_backward
from expertune.ops.experts.scattermoe.gate_hopper import AdapterSide, swiglu_backward_sums, swiglu_thin
from expertune.ops.experts.scattermoe.pack import PackedLora, lay_out_as
from expertune.ops.experts.scattermoe.products import Products, dense
from expertune.ops.experts.scattermoe.sums import RowsOf
from expertune.ops.experts.types import Activation
from expertune.ops.plan import ExpertPlan


class Between(NamedTuple):
    """dh [S, J] scaled by p; the routing weights' gradient [T, K]; a [S, I].

    lora_a_ERI, up_b_EJR: gradients of the down projection's A and the up projection's B where they came out of the same
    pass; a is None then.
    """

    dh_SJ: Tensor
    dweights_TK: Tensor
    a_SI: Tensor | None
    lora_a_ERI: Tensor | None = None
    up_b_EJR: Tensor | None = None


def activate(
    products: Products, h_SJ: Tensor, activation: Activation | None, lora: PackedLora | None
) -> tuple[RowsOf, Tensor | None]:
    """(a [S, I], u2 = A2 a [S, R'] if there is an adapter). activation: None if h is a."""
    if isinstance(activation, Gate) and lora and _takes(products, h_SJ, lora.a_ERX.shape[1]):
        a_SI, u2_SR = swiglu_thin(h_SJ, lora.a_ERX, products.tables.tiles)
        return RowsOf(a_SI, None), u2_SR
    if isinstance(activation, Gate):
        a_SI = swiglu(h_SJ, products.plan)
    else:
        a_SI = dense(h_SJ if activation is None else activation(h_SJ))
    a = RowsOf(a_SI, None)
    return a, products.thin(a, lora.a_ERX) if lora else None


def activate_backward(
    products: Products,
    h_SJ: Tensor,
    da_SI: Tensor,
    p_S: Tensor,
    weights_TK: Tensor,
    activation: Activation | None,
    *,
    need_a: bool,
    reuse_h: bool,
    v2: AdapterSide | None,
    u1: AdapterSide | None,
) -> Between:
    """Through the activation, from da before the factor p.

    need_a: whether a itself is wanted. reuse_h: dh may be written over h; a may be over da in any case. v2, u1: with
    their adapters, if the gradients of A2 and of B1 are wanted; they come with it where that costs no pass of its own.
    """
    plan, dtype = products.plan, weights_TK.dtype
    if not isinstance(activation, Gate):
        return _function_backward(activation, h_SJ, da_SI, p_S, weights_TK, plan)
    if not need_a and v2 and u1 and _takes(products, h_SJ, v2.thin_SR.shape[1], u1.thin_SR.shape[1]):
        dh_SJ, dweights_TK, da2_ERI, db1_ERJ = swiglu_backward_sums(
            h_SJ, da_SI, p_S, v2, u1, plan, products.tables.chunks, weights_dtype=dtype, reuse=reuse_h
        )
        return Between(dh_SJ, dweights_TK, None, da2_ERI, lay_out_as(db1_ERJ.transpose(1, 2), u1.lora.b_EYR))
    need_a = need_a or v2 is not None
    dh_SJ, a_SI, dweights_TK = swiglu_backward(
        h_SJ, da_SI, p_S, plan, weights_dtype=dtype, need_a=need_a, reuse=reuse_h
    )
    return Between(dh_SJ, dweights_TK, a_SI)


def _takes(products: Products, h_SJ: Tensor, *padded_ranks: int) -> bool:
    return products.tile.hopper and gate_hopper.takes(h_SJ, *padded_ranks)


def _function_backward(
    activation: Activation | None,
    h_SJ: Tensor,
    da_SI: Tensor,
    p_S: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
) -> Between:
    """Of an activation that is a plain function of torch, or None: a is h."""
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
    return Between(dense(dh_SJ), dweights_TK, dense(a_SI.detach()))
