"""The whole expert MLP with LoRA on the fused kernels, as one autograd function.

Formulas, and what is saved, are those of `torch_grouped`; here nothing is gathered in memory, each adapter rides in the
accumulator of its base product, and sums over K keep fp32 until they are stored. In order:

forward    u1 = A1 x_t | h = W1 x_t + s1 B1 u1 | a = act(h) | u2 = A2 a | z = W2 a + s2 B2 u2 | y = combine(p, z)
backward   v2 = B2^T dy_t | da = W2^T dy_t + s2 A2^T v2 | dh, a, dp | v1 = B1^T dh | dx = combine(W1^T dh + s1 A1^T v1)
           dA2 = s2 v2^T p a | dB2 = s2 dy_t^T p u2 | dA1 = s1 v1^T x_t | dB1 = s1 dh^T u1      (fp32, deterministic)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe.combine import combine
from expertune.ops.experts.scattermoe.gate import swiglu, swiglu_backward
from expertune.ops.experts.scattermoe.linear import MIN_RANK, LinearTile, launch_expert_linear, padded_lora
from expertune.ops.experts.scattermoe.outer import expert_outer
from expertune.ops.experts.scattermoe.tiles import RowTiles, build_row_tiles
from expertune.ops.experts.torch_grouped import (
    check_expert_mlp,
    flatten_projection,
    grouped_outer,
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

    activation: SWIGLU runs in a kernel, any other function through autograd. Widths: multiples of 16 bytes.
    tile: of the four big products. Adapter gradients are fp32 sums, stored in the adapters' dtype.
    """
    check_expert_mlp(x_TH, weights_TK, plan, up, down)
    y_TH = _ScatterMoE.apply(
        plan,
        activation,
        (scaling_of(up), scaling_of(down)),
        tile or LinearTile(),
        x_TH.to(up.weight_EYX.dtype).contiguous(),
        weights_TK.contiguous(),
        *flatten_projection(up),
        *flatten_projection(down),
    )
    return y_TH.to(x_TH.dtype)


class _Adapter(NamedTuple):
    """An adapter as the kernels take it: A [E, R', in] and B [E, out, R'] in the rows' dtype, and the scaling."""

    a_ERX: Tensor
    b_EYR: Tensor
    scaling: float


class _Launcher(NamedTuple):
    """What every product of one call shares."""

    plan: ExpertPlan
    tiles: RowTiles
    tile: LinearTile

    def product(
        self,
        x_NX: Tensor,
        weight_EYX: Tensor,
        *,
        gather: bool,
        u_SR: Tensor | None = None,
        b_EYR: Tensor | None = None,
        scaling: float = 0.0,
        bias_EY: Tensor | None = None,
    ) -> Tensor:
        """W x + b + B (scaling u)."""
        index_S = self.plan.token_of_row_S if gather else None
        return launch_expert_linear(
            x_NX, index_S, weight_EYX, u_SR, b_EYR, scaling, bias_EY, self.tiles, self.plan.num_rows, self.tile
        )

    def thin(self, x_NX: Tensor, weight_ERX: Tensor, *, gather: bool) -> Tensor:
        """The rank-R product: one column of tiles."""
        tile = LinearTile(self.tile.rows, max(MIN_RANK, weight_ERX.shape[1]), self.tile.k_step, num_warps=4)
        return self._replace(tile=tile).product(x_NX, weight_ERX, gather=gather)

    def adapted(
        self, x_NX: Tensor, projection: ExpertProjection, adapter: _Adapter | None, *, gather: bool
    ) -> tuple[Tensor, Tensor | None]:
        """W x + b + B (scaling A x), and u = A x."""
        weight, bias = projection.weight_EYX, projection.bias_EY
        if adapter is None:
            return self.product(x_NX, weight, gather=gather, bias_EY=bias), None
        u_SR, b_EYR = self.thin(x_NX, adapter.a_ERX, gather=gather), adapter.b_EYR
        scaling = adapter.scaling
        return self.product(x_NX, weight, gather=gather, u_SR=u_SR, b_EYR=b_EYR, scaling=scaling, bias_EY=bias), u_SR

    def input_grad(
        self, dout_NY: Tensor, projection: ExpertProjection, adapter: _Adapter | None, *, gather: bool
    ) -> tuple[Tensor, Tensor | None]:
        """W^T dout + A^T (scaling v), and v = B^T dout."""
        weight_EXY = projection.weight_EYX.transpose(1, 2)
        if adapter is None:
            return self.product(dout_NY, weight_EXY, gather=gather), None
        v_SR, a_EXR = self.thin(dout_NY, adapter.b_EYR.transpose(1, 2), gather=gather), adapter.a_ERX.transpose(1, 2)
        return self.product(dout_NY, weight_EXY, gather=gather, u_SR=v_SR, b_EYR=a_EXR, scaling=adapter.scaling), v_SR


def _adapter(projection: ExpertProjection, dtype: torch.dtype) -> _Adapter | None:
    if projection.lora is None:
        return None
    return _Adapter(*padded_lora(projection, dtype), projection.lora.scaling)


class _ScatterMoE(torch.autograd.Function):
    """Inputs 0-3 are no tensors (plan, activation, scalings, tile); 4: x, 5: routing weights, 6-9: up, 10-13: down."""

    @staticmethod
    def forward(ctx, plan, activation, scalings, tile, x_TH, weights_TK, *flat):
        up, down = unflatten_projection(flat[:4], scalings[0]), unflatten_projection(flat[4:], scalings[1])
        launch = _Launcher(plan, build_row_tiles(plan, tile.rows), tile)
        h_SJ, u1_SR = launch.adapted(x_TH, up, _adapter(up, x_TH.dtype), gather=True)
        a_SI = swiglu(h_SJ, plan) if isinstance(activation, Gate) else activation(h_SJ)
        z_SH, u2_SR = launch.adapted(a_SI, down, _adapter(down, x_TH.dtype), gather=False)
        ctx.launch, ctx.activation, ctx.scalings = launch, activation, scalings
        ctx.save_for_backward(x_TH, weights_TK, h_SJ, u1_SR, u2_SR, *flat)
        return combine(z_SH, weights_TK, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):
        launch, plan = ctx.launch, ctx.launch.plan
        x_TH, weights_TK, h_SJ, u1_SR, u2_SR, *flat = ctx.saved_tensors
        up, down = unflatten_projection(flat[:4], ctx.scalings[0]), unflatten_projection(flat[4:], ctx.scalings[1])
        need_x, need_weights = ctx.needs_input_grad[4:6]
        need_up, need_down = ctx.needs_input_grad[6:10], ctx.needs_input_grad[10:14]
        dy_TH = dy_TH.contiguous()
        p_S = weights_TK.reshape(-1)[plan.slot_of_row_S]

        da_SI, v2_SR = launch.input_grad(dy_TH, down, _adapter(down, x_TH.dtype), gather=True)
        dh_SJ, a_SI, dp_S = _gate_backward(ctx.activation, h_SJ, da_SI, p_S, plan)
        del da_SI
        grads_down = _parameter_grads(dy_TH, True, v2_SR, a_SI, False, u2_SR, down, plan, need_down, p_S)
        if need_weights and down.bias_EY is not None:
            rows_SH = dy_TH[plan.token_of_row_S].float() * down.bias_EY[plan.expert_of_row()]
            dp_S = dp_S + rows_SH.sum(dim=-1)
        if plan.has_sentinels:
            dp_S = dp_S.masked_fill(plan.sentinel_rows().squeeze(1), 0)
        dweights_TK = dp_S[plan.row_of_slot_S].view_as(weights_TK).to(weights_TK.dtype) if need_weights else None
        dx_TH, v1_SR = None, None
        if need_x or any(need_up):
            dx_rows_SH, v1_SR = launch.input_grad(dh_SJ, up, _adapter(up, x_TH.dtype), gather=False)
            dx_TH = combine(dx_rows_SH, None, plan) if need_x else None
        grads_up = _parameter_grads(dh_SJ, False, v1_SR, x_TH, True, u1_SR, up, plan, need_up, None)
        return None, None, None, None, dx_TH, dweights_TK, *grads_up, *grads_down


def _gate_backward(
    activation: Activation, h_SJ: Tensor, da_SI: Tensor, p_S: Tensor, plan: ExpertPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh scaled by p, a, dp): in one kernel for a known gate, else through autograd of the function."""
    if isinstance(activation, Gate):
        return swiglu_backward(h_SJ, da_SI, p_S, plan)
    with torch.enable_grad():
        leaf_SJ = h_SJ.detach().requires_grad_()
        a_SI = activation(leaf_SJ)
    dp_S = (da_SI.float() * a_SI.detach()).sum(dim=-1)
    (dh_SJ,) = torch.autograd.grad(a_SI, leaf_SJ, da_SI * p_S.unsqueeze(1).to(da_SI.dtype))
    return dh_SJ.contiguous(), a_SI.detach(), dp_S


def _parameter_grads(
    dout_NY: Tensor,
    gather_dout: bool,
    v_SR: Tensor | None,
    in_NX: Tensor,
    gather_in: bool,
    u_SR: Tensor | None,
    projection: ExpertProjection,
    plan: ExpertPlan,
    need: tuple[bool, ...],
    p_S: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias, A and B, each only if needed; the routing weight goes to the thin side."""
    lora, (need_weight, need_bias, need_a, need_b) = projection.lora, need
    dweight = dbias = da = db = None
    if need_weight or need_bias:  # full fine-tuning: torch's grouped products on gathered rows
        dout_SY = dout_NY[plan.token_of_row_S] if gather_dout else dout_NY
        in_SX = in_NX[plan.token_of_row_S] if gather_in else in_NX
        scaled_SY = dout_SY if p_S is None else (dout_SY * p_S.unsqueeze(1)).to(dout_SY.dtype)
        dweight = grouped_outer(scaled_SY, in_SX, plan) if need_weight else None
        dbias = grouped_outer(scaled_SY.new_ones(plan.num_rows, 8), scaled_SY, plan)[:, 0] if need_bias else None
    if lora is not None and need_a and v_SR is not None:
        da = expert_outer(v_SR, in_NX, plan, gather=gather_in, scale_S=p_S)[:, : lora.rank]
        da = da.mul_(lora.scaling).to(lora.a_ERX.dtype)
    if lora is not None and need_b and u_SR is not None:
        db = expert_outer(u_SR, dout_NY, plan, gather=gather_dout, scale_S=p_S)[:, : lora.rank].transpose(1, 2)
        db = db.mul_(lora.scaling).to(lora.b_EYR.dtype)
    return dweight, dbias, da, db
