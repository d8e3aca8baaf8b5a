"""The whole expert MLP with LoRA on the fused kernels, as one autograd function.

Formulas are those of `torch_grouped`; here nothing is gathered in memory, each adapter rides in the accumulator of its
base product, and sums over K keep fp32 until they are stored. Bars join what one kernel does:

forward    u1 = A1 x_t | h = W1 x_t + s1 B1 u1 | a = act(h) | u2 = A2 a | z = W2 a + s2 B2 u2 | y = combine(p, z)
backward   v2 = B2^T dy_t | da = W2^T dy_t + s2 A2^T v2 | dh, dp, a | v1 = B1^T dh | dx = combine(W1^T dh + s1 A1^T v1)
           dB2 = s2 p dy_t u2^T | dA2 = s2 p v2 a^T | dB1 = s1 dh u1^T | dA1 = s1 v1 x_t^T         (sums in fp32)

Saved: x (the caller's own), h, u1, u2, the routing weights and the plan. In a backward that frees the graph, dh is
written over h; a always over da.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe.combine import combine
from expertune.ops.experts.scattermoe.gate import swiglu, swiglu_backward
from expertune.ops.experts.scattermoe.linear import (
    adapter_step,
    launch_expert_linear,
    launch_thin_linear,
)
from expertune.ops.experts.scattermoe.pack import PackedLora, lay_out_as, pack_lora
from expertune.ops.experts.scattermoe.sums import RowsOf, launch_expert_sum
from expertune.ops.experts.scattermoe.tiles import RowTables, build_row_tables
from expertune.ops.experts.scattermoe.tiling import LinearTile, pick_tile
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

    activation: SWIGLU runs in a kernel, any other function through autograd.
    tile: of the four big products; by default `pick_tile` decides by the rows of an expert, the dtype and the GPU.
    Adapter gradients are fp32 sums, stored in the adapters' dtype. Deterministic, also bit for bit.
    """
    check_expert_mlp(x_TH, weights_TK, plan, up, down)
    dtype = up.weight_EYX.dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"up.weight_EYX: got {dtype}, need bfloat16, float16 or float32")
    tile = tile or pick_tile(plan.num_rows, plan.num_experts, dtype, x_TH.device)
    options = _Options(plan, activation, (scaling_of(up), scaling_of(down)), tile)
    y_TH = _ScatterMoE.apply(
        options, x_TH.to(dtype), weights_TK.contiguous(), *flatten_projection(up), *flatten_projection(down)
    )
    return y_TH.to(x_TH.dtype)


@dataclass(frozen=True)
class _Options:
    """What is no tensor of autograd's."""

    plan: ExpertPlan
    activation: Activation
    scalings: tuple[float, float]
    tile: LinearTile


@dataclass(frozen=True)
class _Products:
    """The products of one call: they share the plan, its tables and the tile."""

    plan: ExpertPlan
    tables: RowTables
    tile: LinearTile

    def thin(self, rows: RowsOf, weight_ERX: Tensor) -> Tensor:
        """W x of rank R."""
        return launch_thin_linear(rows.rows_NX, self._index(rows), weight_ERX, self.tables.tiles, self.plan.num_rows)

    def forward(
        self,
        rows: RowsOf,
        projection: ExpertProjection,
        lora: PackedLora | None,
        u_SR: Tensor | None,
    ) -> Tensor:
        """W x + b + s B u."""
        step = adapter_step(lora, u_SR)
        return self._big(rows, projection.weight_EYX, bias_EY=projection.bias_EY, **step)

    def input_grad(
        self, dout: RowsOf, projection: ExpertProjection, lora: PackedLora | None, v_SR: Tensor | None
    ) -> Tensor:
        """W^T dout + s A^T v."""
        seen_from_behind = lora and PackedLora(lora.b_EYR, lora.a_ERX.transpose(1, 2), lora.scaling, lora.rank)
        return self._big(dout, projection.weight_EYX.transpose(1, 2), **adapter_step(seen_from_behind, v_SR))

    def _big(self, rows: RowsOf, weight_EYX: Tensor, **options: object) -> Tensor:
        return launch_expert_linear(
            rows.rows_NX,
            self._index(rows),
            weight_EYX,
            self.tables.tiles,
            self.plan.num_rows,
            self.tile,
            **options,  # type: ignore[arg-type]
        )

    def _index(self, rows: RowsOf) -> Tensor | None:
        return self.plan.token_of_row_S if rows.gather else None


class _ScatterMoE(torch.autograd.Function):
    """Input 0 holds no tensors of autograd's; 1: x, 2: routing weights, 3-6: up, 7-10: down."""

    @staticmethod
    def forward(ctx, options, x_TH, weights_TK, *flat):  # type: ignore[no-untyped-def]
        up = unflatten_projection(flat[:4], options.scalings[0])
        down = unflatten_projection(flat[4:], options.scalings[1])
        y_TH, saved, tables = _forward(options, x_TH, weights_TK, up, down)
        ctx.options, ctx.tables = options, tables
        ctx.save_for_backward(x_TH, weights_TK, *saved, *flat)
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):  # type: ignore[no-untyped-def]
        options = ctx.options
        x_TH, weights_TK, h_SJ, u1_SR, u2_SR, *flat = ctx.saved_tensors
        up = unflatten_projection(flat[:4], options.scalings[0])
        down = unflatten_projection(flat[4:], options.scalings[1])
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        grads = _backward(
            options, ctx.tables, x_TH, weights_TK, (h_SJ, u1_SR, u2_SR), up, down, dy_TH,
            ctx.needs_input_grad[1:], reuse_h=not keep_graph,
        )  # fmt: skip
        return None, *grads


def _forward(
    options: _Options, x_TH: Tensor, weights_TK: Tensor, up: ExpertProjection, down: ExpertProjection
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor | None], RowTables]:
    """(y, what the backward needs: h, u1, u2, and the row tables)."""
    plan, activation = options.plan, options.activation
    products = _Products(plan, build_row_tables(plan, options.tile.rows), options.tile)
    x = RowsOf(_dense(x_TH), gather=True)
    lora_up, lora_down = _packed(up), _packed(down)
    u1_SR = products.thin(x, lora_up.a_ERX) if lora_up else None
    h_SJ = products.forward(x, up, lora_up, u1_SR)
    a_SI = swiglu(h_SJ, plan) if isinstance(activation, Gate) else _dense(activation(h_SJ))
    del lora_up
    a = RowsOf(a_SI, gather=False)
    u2_SR = products.thin(a, lora_down.a_ERX) if lora_down else None
    z_SH = products.forward(a, down, lora_down, u2_SR)
    del a, a_SI, lora_down
    return combine(z_SH, weights_TK, plan), (h_SJ, u1_SR, u2_SR), products.tables


def _backward(
    options: _Options,
    tables: RowTables,
    x_TH: Tensor,
    weights_TK: Tensor,
    saved: tuple[Tensor, Tensor | None, Tensor | None],
    up: ExpertProjection,
    down: ExpertProjection,
    dy_TH: Tensor,
    needs: tuple[bool, ...],
    *,
    reuse_h: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the routing weights, and of weight, bias, A and B of both projections; None if not needed."""
    plan = options.plan
    need_x, need_weights, need_up, need_down = needs[0], needs[1], needs[2:6], needs[6:10]
    h_SJ, u1_SR, u2_SR = saved
    products = _Products(plan, tables, options.tile)
    dy, x = RowsOf(_dense(dy_TH), gather=True), RowsOf(_dense(x_TH), gather=True)
    p_S = weights_TK.reshape(-1)[plan.slot_of_row_S]
    lora_up, lora_down = _packed(up), _packed(down)

    v2_SR = products.thin(dy, lora_down.b_EYR.transpose(1, 2)) if lora_down else None
    da_SI = products.input_grad(dy, down, lora_down, v2_SR)
    del lora_down
    if isinstance(options.activation, Gate):
        need_a = need_down[0] or (need_down[2] and down.lora is not None)
        dh_SJ, a_SI, dweights_TK = swiglu_backward(
            h_SJ, da_SI, p_S, plan, weights_dtype=weights_TK.dtype, need_a=need_a, reuse=reuse_h
        )
    else:
        dh_SJ, a_SI, dweights_TK = _function_backward(options.activation, h_SJ, da_SI, p_S, weights_TK, plan)
    del da_SI
    grads_down = _parameter_grads(products, dy, v2_SR, RowsOf(a_SI, gather=False), u2_SR, down, need_down, p_S)
    del a_SI
    if not need_weights:
        dweights_TK = None
    elif down.bias_EY is not None:
        dweights_TK = dweights_TK + _bias_part(dy.rows_NX, down.bias_EY, plan).to(dweights_TK.dtype)

    dx_TH, v1_SR, dh = None, None, RowsOf(dh_SJ, gather=False)
    if lora_up and (need_x or need_up[2]):
        v1_SR = products.thin(dh, lora_up.b_EYR.transpose(1, 2))
    if need_x:
        dx_TH = combine(products.input_grad(dh, up, lora_up, v1_SR), None, plan)
    grads_up = _parameter_grads(products, dh, v1_SR, x, u1_SR, up, need_up, None)
    return dx_TH, dweights_TK, *grads_up, *grads_down


def _parameter_grads(
    products: _Products,
    dout: RowsOf,
    v_SR: Tensor | None,
    rows: RowsOf,
    u_SR: Tensor | None,
    projection: ExpertProjection,
    need: tuple[bool, ...],
    p_S: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias, A and B, each only if needed; the routing weight goes to the thin side."""
    plan, chunks, lora = products.plan, products.tables.chunks, projection.lora
    need_weight, need_bias, need_a, need_b = need
    dweight = dbias = da = db = None
    if need_weight or need_bias:  # full fine-tuning: torch's grouped products on gathered rows
        dout_SY = _gathered(dout, plan)
        if p_S is not None:
            dout_SY = (dout_SY * p_S.unsqueeze(1)).to(dout_SY.dtype)
        dweight = grouped_outer(dout_SY, _gathered(rows, plan), plan) if need_weight else None
        ones_S8 = dout_SY.new_ones(plan.num_rows, 8)  # 8 columns: one would break grouped_mm's alignment rule
        dbias = grouped_outer(ones_S8, dout_SY, plan)[:, 0] if need_bias else None
    if lora is not None and need_a and v_SR is not None:
        da = torch.empty_like(lora.a_ERX, memory_format=torch.contiguous_format)
        launch_expert_sum(v_SR, rows, da, lora.scaling, plan, chunks, p_S=p_S)
    if lora is not None and need_b and u_SR is not None:
        db_ERY = torch.empty_like(lora.b_EYR.transpose(1, 2), memory_format=torch.contiguous_format)
        launch_expert_sum(u_SR, dout, db_ERY, lora.scaling, plan, chunks, p_S=p_S)
        db = lay_out_as(db_ERY.transpose(1, 2), lora.b_EYR)
    return dweight, dbias, da, db


def _function_backward(
    activation: Activation, h_SJ: Tensor, da_SI: Tensor, p_S: Tensor, weights_TK: Tensor, plan: ExpertPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh scaled by p, a, dweights) of an activation that is a plain function of torch."""
    with torch.enable_grad():
        leaf_SJ = h_SJ.detach().requires_grad_()
        a_SI = activation(leaf_SJ)
    (dh_SJ,) = torch.autograd.grad(a_SI, leaf_SJ, da_SI * p_S.unsqueeze(1).to(da_SI.dtype))
    dp_S = (da_SI.float() * a_SI.detach()).sum(dim=-1)
    if plan.has_sentinels:
        dp_S = dp_S.masked_fill(plan.sentinel_rows().squeeze(1), 0)
    dweights_TK = dp_S[plan.row_of_slot_S].view_as(weights_TK).to(weights_TK.dtype)
    return _dense(dh_SJ), _dense(a_SI.detach()), dweights_TK


def _bias_part(dy_TH: Tensor, bias_EH: Tensor, plan: ExpertPlan) -> Tensor:
    """<dy_t, b[e]> of every slot [T, K]: what the bias adds to the routing weights' gradient."""
    dp_S = (dy_TH[plan.token_of_row_S].float() * bias_EH[plan.expert_of_row()]).sum(dim=-1)
    if plan.has_sentinels:
        dp_S = dp_S.masked_fill(plan.sentinel_rows().squeeze(1), 0)
    return dp_S[plan.row_of_slot_S].view(plan.num_tokens, plan.top_k)


def _gathered(rows: RowsOf, plan: ExpertPlan) -> Tensor:
    return rows.rows_NX[plan.token_of_row_S] if rows.gather else rows.rows_NX


def _packed(projection: ExpertProjection) -> PackedLora | None:
    return None if projection.lora is None else pack_lora(projection.lora, projection.weight_EYX.dtype)


def _dense(rows_NX: Tensor) -> Tensor:
    """Rows whose last dimension is dense, as the kernels load them."""
    return rows_NX if rows_NX.stride(-1) == 1 and rows_NX.stride(0) >= rows_NX.shape[1] else rows_NX.contiguous()
