"""What forward and backward are made of: the products of one call, which share the plan, its tables and the tile."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertune.ops.experts.scattermoe.hopper import launch_hopper_linear, takes
from expertune.ops.experts.scattermoe.linear import adapter_step, launch_expert_linear, launch_thin_linear
from expertune.ops.experts.scattermoe.pack import PackedLora, empty_transposed, lay_out_as, pack_lora
from expertune.ops.experts.scattermoe.sums import RowsOf, launch_expert_sum
from expertune.ops.experts.scattermoe.tiles import CHUNK_ROWS, RowTables, build_row_tables
from expertune.ops.experts.scattermoe.tiling import LinearTile, pick_tile
from expertune.ops.experts.torch_grouped import grouped_outer
from expertune.ops.experts.types import ExpertLora, ExpertProjection
from expertune.ops.plan import ExpertPlan, build_plan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def build_plan_and_tables(
    expert_ids_TK: Tensor,
    projection: ExpertProjection,
    *,
    sentinels: bool = False,
    num_live_rows: int | None = None,
    tile: LinearTile | None = None,
) -> ExpertPlan:
    """`build_plan` with the tables that `scattermoe_expert_mlp` and `pieces` read, all in two launches on a GPU.

    projection: one of those that the plan is for. tile: as they will get it; the plan of another tile serves as well,
    for a launch more. torch.compile traces a plan without tables: its ops build their own.
    """
    weight_EYX = projection.weight_EYX
    check_dtype("projection.weight_EYX", weight_EYX)
    num_experts = weight_EYX.shape[0]
    if torch.compiler.is_compiling():
        return build_plan(expert_ids_TK, num_experts, sentinels=sentinels, num_live_rows=num_live_rows)
    num_rows = expert_ids_TK.numel() if num_live_rows is None else num_live_rows
    tile = tile or pick_tile(num_rows, num_experts, weight_EYX.dtype, weight_EYX.device)
    rows = tile.rows, CHUNK_ROWS
    return build_plan(expert_ids_TK, num_experts, sentinels=sentinels, num_live_rows=num_live_rows, table_rows=rows)


class Grads(NamedTuple):
    """Gradients of a projection, None where not needed; as autograd takes the projection itself."""

    weight_EYX: Tensor | None = None
    bias_EY: Tensor | None = None
    a_ERX: Tensor | None = None
    b_EYR: Tensor | None = None


NO_GRADS = Grads()


@dataclass(frozen=True)
class Products:
    """The products of one call. fused: the adapter rides in the base product's accumulator; else it is added to it."""

    plan: ExpertPlan
    tables: RowTables
    tile: LinearTile
    fused: bool = True

    @classmethod
    def of(cls, plan: ExpertPlan, tile: LinearTile) -> "Products":
        return cls(plan, build_row_tables(plan, tile.rows), tile)

    def rows_of(self, x_NX: Tensor, *, grouped: bool) -> RowsOf:
        """Rows [S, X] in plan order if `grouped`, else tokens [T, X] as the rows they are routed to."""
        return RowsOf(dense(x_NX), None if grouped else self.plan.token_of_row_S)

    def thin(self, rows: RowsOf, weight_ERX: Tensor) -> Tensor:
        """W x of rank R' [S, R']."""
        return launch_thin_linear(*rows, weight_ERX, self.tables.tiles, self.plan.num_rows)

    def forward(
        self,
        rows: RowsOf,
        projection: ExpertProjection,
        lora: PackedLora | None,
        u_SR: Tensor | None,
        out_index_S: Tensor | None = None,
    ) -> Tensor:
        """W x + b + s B u, stored at out_index if there is one; rows of no expert are not written."""
        bias_EY = projection.bias_EY
        return self._with_adapter(rows, projection.weight_EYX, lora, u_SR, bias_EY=bias_EY, out_index_S=out_index_S)

    def input_grad(
        self, dout: RowsOf, projection: ExpertProjection, lora: PackedLora | None, v_SR: Tensor | None
    ) -> Tensor:
        """W^T dout + s A^T v [S, in]."""
        seen_from_behind = lora and PackedLora(lora.b_EYR, lora.a_ERX.transpose(1, 2), lora.scaling, lora.rank)
        return self._with_adapter(dout, projection.weight_EYX.transpose(1, 2), seen_from_behind, v_SR)

    def a_grad(self, v_SR: Tensor, x: RowsOf, lora: ExpertLora, p_S: Tensor | None) -> Tensor:
        """s sum of p v x^T over the rows of each expert."""
        da_ERX = lora.a_ERX.new_empty(lora.a_ERX.shape)
        launch_expert_sum(v_SR, x, da_ERX, lora.scaling, self.plan, self.tables.chunks, p_S=p_S)
        return da_ERX

    def b_grad(self, u_SR: Tensor, dout: RowsOf, lora: ExpertLora, p_S: Tensor | None) -> Tensor:
        """s sum of p dout u^T over the rows of each expert, with the strides of B."""
        db_ERY = empty_transposed(lora.b_EYR)
        launch_expert_sum(u_SR, dout, db_ERY, lora.scaling, self.plan, self.tables.chunks, p_S=p_S)
        return lay_out_as(db_ERY.transpose(1, 2), lora.b_EYR)

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
        """Gradients of weight, bias, A and B, each only if needed; p is a factor of every row, put on the thin side.

        found: those of A or B that are there already. x: None where A's is, and the weight's is not needed.
        """
        lora, (need_weight, need_bias, need_a, need_b) = projection.lora, need
        dweight, dbias, da, db = None, None, found.a_ERX, found.b_EYR
        if need_weight or need_bias:  # full fine-tuning: torch's grouped products on gathered rows
            dout_SY = dout.gathered()
            if p_S is not None:
                dout_SY = (dout_SY * p_S.unsqueeze(1)).to(dout_SY.dtype)
            dweight = grouped_outer(dout_SY, x.gathered(), self.plan) if need_weight and x else None
            ones_S8 = dout_SY.new_ones(self.plan.num_rows, 8)  # 8 columns: one would break grouped_mm's alignment rule
            dbias = grouped_outer(ones_S8, dout_SY, self.plan)[:, 0] if need_bias else None
        if lora is not None and need_a and da is None and v_SR is not None and x:
            da = self.a_grad(v_SR, x, lora, p_S)
        if lora is not None and need_b and db is None and u_SR is not None:
            db = self.b_grad(u_SR, dout, lora, p_S)
        return Grads(dweight, dbias, da, db)

    def _with_adapter(
        self,
        rows: RowsOf,
        weight_EYX: Tensor,
        lora: PackedLora | None,
        u_SR: Tensor | None,
        *,
        bias_EY: Tensor | None = None,
        out_index_S: Tensor | None = None,
    ) -> Tensor:
        step = adapter_step(lora, u_SR) if self.fused else {}
        out_SY = self._launch(rows, weight_EYX, bias_EY=bias_EY, out_index_S=out_index_S, **step)
        if self.fused or lora is None or u_SR is None:
            return out_SY
        return out_SY.add_(self._launch(RowsOf(u_SR, None), lora.b_EYR, out_index_S=out_index_S), alpha=lora.scaling)

    def _launch(
        self, rows: RowsOf, weight_EYX: Tensor, out_index_S: Tensor | None = None, **options: Any
    ) -> Tensor:  # fmt: skip
        adapter = options.get("u_SR"), options.get("lora_b_EYR")
        where = self.tables.tiles, self.plan.num_rows
        if self.tile.hopper and out_index_S is None and takes(*rows, weight_EYX, *adapter):
            return launch_hopper_linear(*rows, weight_EYX, *where, **options)
        return launch_expert_linear(*rows, weight_EYX, *where, self.tile, out_index_S=out_index_S, **options)


def bias_part(dy_TH: Tensor, bias_EH: Tensor, plan: ExpertPlan) -> Tensor:
    """<dy_t, b[e]> of every slot [T, K]: what the bias adds to the routing weights' gradient."""
    dp_S = (dy_TH[plan.token_of_row_S].float() * bias_EH[plan.expert_of_row()]).sum(dim=-1)
    if plan.has_sentinels:
        dp_S = dp_S.masked_fill(plan.sentinel_rows().squeeze(1), 0)
    return plan.to_slots(dp_S).view(plan.num_tokens, plan.top_k)


def packed(projection: ExpertProjection) -> PackedLora | None:
    return None if projection.lora is None else pack_lora(projection.lora, projection.weight_EYX.dtype)


def dense(rows_NX: Tensor) -> Tensor:
    """Rows whose last dimension is dense, as the kernels load them."""
    return rows_NX if rows_NX.stride(-1) == 1 and rows_NX.stride(0) >= rows_NX.shape[1] else rows_NX.contiguous()


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the kernels know the dtype."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, need bfloat16, float16 or float32")


def check_devices(rows: Tensor, rows_name: str, plan: ExpertPlan, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all are where `rows` is: a kernel reads garbage in another device's memory, or dies."""
    for name, tensor in {"plan": plan.row_fence_F, **tensors}.items():
        if tensor is not None and tensor.device != rows.device:
            raise ValueError(f"{name}: on {tensor.device}, {rows_name} is on {rows.device}")


def tensors_of(name: str, projection: ExpertProjection) -> dict[str, Tensor | None]:
    """The tensors of a projection, by the names that errors give them."""
    lora = projection.lora
    return {
        f"{name}.weight_EYX": projection.weight_EYX,
        f"{name}.bias_EY": projection.bias_EY,
        f"{name}.lora.a_ERX": None if lora is None else lora.a_ERX,
        f"{name}.lora.b_EYR": None if lora is None else lora.b_EYR,
    }
