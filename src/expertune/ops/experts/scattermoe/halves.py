"""The halves of the expert MLP, up to h and from h on, forward and backward: plain functions on the fused kernels.

They know nothing of autograd. The autograd function of `mlp` runs both in one node; the ops of `compiled` are one each,
so that torch.compile can trace an activation of its own between them. Formulas: see `mlp`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe.combine import combine
from expertune.ops.experts.scattermoe.gate import swiglu, swiglu_backward
from expertune.ops.experts.scattermoe.linear import adapter_step, launch_expert_linear, launch_thin_linear
from expertune.ops.experts.scattermoe.pack import PackedLora, lay_out_as, pack_lora
from expertune.ops.experts.scattermoe.sums import RowsOf, launch_expert_sum
from expertune.ops.experts.scattermoe.tiles import RowTables, build_row_tables
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.torch_grouped import grouped_outer
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan


@contextmanager
def at_home(rows: Tensor) -> Iterator[None]:
    """Make the tensors' GPU the current one and switch autocast off.

    Triton launches on the current device, which is another one when a model is split over GPUs. The dtype is the
    weights': a product that autocast lowered would meet operands of another.
    """
    kind = rows.device.type
    with torch.cuda.device_of(rows):
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield


@dataclass(frozen=True)
class Products:
    """The products of one call: they share the plan, its tables and the tile."""

    plan: ExpertPlan
    tables: RowTables
    tile: LinearTile

    @classmethod
    def of(cls, plan: ExpertPlan, tile: LinearTile) -> "Products":
        return cls(plan, build_row_tables(plan, tile.rows), tile)

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


def up_forward(products: Products, x_TH: Tensor, up: ExpertProjection) -> tuple[Tensor, Tensor | None]:
    """(h [S, J], u1 [S, R'] or None) of x [T, H]; sentinel rows are not written."""
    x, lora = RowsOf(dense(x_TH), gather=True), packed(up)
    u1_SR = products.thin(x, lora.a_ERX) if lora else None
    return products.forward(x, up, lora, u1_SR), u1_SR


def down_forward(
    products: Products, h_SJ: Tensor, weights_TK: Tensor, down: ExpertProjection, activation: Activation | None
) -> tuple[Tensor, Tensor | None]:
    """(y [T, H], u2 [S, R'] or None) of h [S, J]. activation: None if h is a, the activation being done already."""
    a, lora = RowsOf(_activated(h_SJ, activation, products.plan), gather=False), packed(down)
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
    dy, lora = RowsOf(dense(dy_TH), gather=True), packed(down)
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
    grads = _parameter_grads(products, dy, v2_SR, RowsOf(a_SI, gather=False), u2_SR, down, need_down, p_S)
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
    dh, x, lora = RowsOf(dense(dh_SJ), gather=False), RowsOf(dense(x_TH), gather=True), packed(up)
    if lora and (need_x or need_up[2]):
        v1_SR = products.thin(dh, lora.b_EYR.transpose(1, 2))
    if need_x:
        dx_TH = combine(products.input_grad(dh, up, lora, v1_SR), None, products.plan)
    return dx_TH, *_parameter_grads(products, dh, v1_SR, x, u1_SR, up, need_up, None)


def _parameter_grads(
    products: Products,
    dout: RowsOf,
    v_SR: Tensor | None,
    rows: RowsOf,
    u_SR: Tensor | None,
    projection: ExpertProjection,
    need: Sequence[bool],
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
    dweights_TK = dp_S[plan.row_of_slot_S].view_as(weights_TK).to(weights_TK.dtype)
    return dense(dh_SJ), dense(a_SI.detach()), dweights_TK


def bias_part(dy_TH: Tensor, bias_EH: Tensor, plan: ExpertPlan) -> Tensor:
    """<dy_t, b[e]> of every slot [T, K]: what the bias adds to the routing weights' gradient."""
    dp_S = (dy_TH[plan.token_of_row_S].float() * bias_EH[plan.expert_of_row()]).sum(dim=-1)
    if plan.has_sentinels:
        dp_S = dp_S.masked_fill(plan.sentinel_rows().squeeze(1), 0)
    return dp_S[plan.row_of_slot_S].view(plan.num_tokens, plan.top_k)


def _activated(h_SJ: Tensor, activation: Activation | None, plan: ExpertPlan) -> Tensor:
    if isinstance(activation, Gate):
        return swiglu(h_SJ, plan)
    return dense(h_SJ if activation is None else activation(h_SJ))


def _gathered(rows: RowsOf, plan: ExpertPlan) -> Tensor:
    return rows.rows_NX[plan.token_of_row_S] if rows.gather else rows.rows_NX


def packed(projection: ExpertProjection) -> PackedLora | None:
    return None if projection.lora is None else pack_lora(projection.lora, projection.weight_EYX.dtype)


def dense(rows_NX: Tensor) -> Tensor:
    """Rows whose last dimension is dense, as the kernels load them."""
    return rows_NX if rows_NX.stride(-1) == 1 and rows_NX.stride(0) >= rows_NX.shape[1] else rows_NX.contiguous()
