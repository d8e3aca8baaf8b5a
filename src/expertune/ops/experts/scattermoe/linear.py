"""One expert projection with LoRA, fused: the gather in the load, the adapter as one more K step, in one kernel.

    out_s = W[e] x_r(s) + b[e] + B[e] (scaling u_s)                        for row s of expert e

r(s) is s itself or a gather index (the token of the row). u [S, R] is the adapter's thin product (A x, or B^T dy in the
input gradient), scaled as it is loaded. The same kernel is the input gradient: W seen transposed, A in the place of B.

FLOPs: 2 S X Y + 2 S R Y. Bytes, at least: W once, x once for each block of columns through L2, out once.
Persistent: as many programs as the GPU has multiprocessors take tiles in turn, in groups of GROUP_TILES row tiles, so
that the columns of W a group shares are read from L2 (H200, S = 65k: 522 against 500 TFLOP/s without groups).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from expertune.ops.experts.scattermoe.tiles import RowTiles, build_row_tiles
from expertune.ops.experts.types import ExpertProjection
from expertune.ops.plan import ExpertPlan

GROUP_TILES = 8  # row tiles that share a column of W in L2; 4 and 16 are within noise of 8 on an H200
MIN_RANK = 16  # tl.dot needs K of at least 16: smaller ranks are padded with zeros


@dataclass(frozen=True)
class LinearTile:
    """The tile of one launch: rows by columns by K step, warps, pipeline stages."""

    rows: int = 128
    columns: int = 256
    k_step: int = 64
    num_warps: int = 8
    num_stages: int = 3


@triton.jit
def _expert_linear_kernel(
    x_ptr,
    stride_x,
    row_index_ptr,
    weight,
    u_ptr,
    lora_b_ptr,
    stride_b_expert,
    stride_b_row,
    stride_b_rank,
    scaling,
    bias_ptr,
    out_ptr,
    expert_of_tile_ptr,
    first_row_of_tile_ptr,
    num_tiles_ptr,
    row_fence_ptr,
    num_in,
    num_out,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_row_tiles = tl.load(num_tiles_ptr)
    num_column_tiles = tl.cdiv(num_out, BLOCK_Y)
    tiles_in_group = GROUP * num_column_tiles
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        first_of_group = (tile // tiles_in_group) * GROUP
        group_size = tl.minimum(num_row_tiles - first_of_group, GROUP)
        row_tile = first_of_group + (tile % tiles_in_group) % group_size
        first_column = ((tile % tiles_in_group) // group_size) * BLOCK_Y

        expert = tl.load(expert_of_tile_ptr + row_tile)
        rows = tl.load(first_row_of_tile_ptr + row_tile) + tl.arange(0, BLOCK_S)
        in_expert = rows < tl.load(row_fence_ptr + expert + 1)
        sources = tl.load(row_index_ptr + rows, mask=in_expert, other=0) if GATHER else rows
        columns = first_column + tl.arange(0, BLOCK_Y)
        steps = tl.arange(0, BLOCK_X)

        x_ptrs = x_ptr + sources.to(tl.int64)[:, None] * stride_x + steps[None, :]
        acc = tl.zeros((BLOCK_S, BLOCK_Y), dtype=tl.float32)
        for k in tl.range(0, num_in, BLOCK_X):
            x = tl.load(x_ptrs + k, mask=in_expert[:, None] & (k + steps < num_in)[None, :], other=0.0)
            if TRANSPOSED:
                w = weight.load([expert, k, first_column]).reshape(BLOCK_X, BLOCK_Y)
            else:
                w = weight.load([expert, first_column, k]).reshape(BLOCK_Y, BLOCK_X).T
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if RANK > 0:
            ranks = tl.arange(0, RANK)
            u = tl.load(u_ptr + rows.to(tl.int64)[:, None] * RANK + ranks[None, :], mask=in_expert[:, None], other=0.0)
            u = (u.to(tl.float32) * scaling).to(x_ptr.dtype.element_ty)
            b_ptrs = lora_b_ptr + expert.to(tl.int64) * stride_b_expert
            b_ptrs += columns[:, None] * stride_b_row + ranks[None, :] * stride_b_rank
            b = tl.load(b_ptrs, mask=(columns < num_out)[:, None], other=0.0)
            acc = tl.dot(u, b.T, acc, input_precision=PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * num_out + columns, mask=columns < num_out, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * num_out + columns[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_expert[:, None] & (columns < num_out)[None, :])


def launch_expert_linear(
    x_NX: Tensor,
    row_index_S: Tensor | None,
    weight_EYX: Tensor,
    u_SR: Tensor | None,
    lora_b_EYR: Tensor | None,
    scaling: float,
    bias_EY: Tensor | None,
    tiles: RowTiles,
    num_rows: int,
    tile: LinearTile,
) -> Tensor:
    num_out, num_in = weight_EYX.shape[1:]
    out_SY = x_NX.new_empty(num_rows, num_out)
    transposed = weight_EYX.stride(2) != 1
    if transposed:
        weight = TensorDescriptor.from_tensor(weight_EYX.transpose(1, 2), [1, tile.k_step, tile.columns])
    else:
        weight = TensorDescriptor.from_tensor(weight_EYX, [1, tile.columns, tile.k_step])
    _expert_linear_kernel[(_num_programs(x_NX, tiles, num_out, tile),)](
        x_NX,
        x_NX.stride(0),
        row_index_S,
        weight,
        u_SR,
        lora_b_EYR,
        *((0, 0, 0) if lora_b_EYR is None else lora_b_EYR.stride()),
        scaling,
        bias_EY,
        out_SY,
        tiles.expert_of_tile_M,
        tiles.first_row_of_tile_M,
        tiles.num_tiles_1,
        tiles.row_fence_F,
        num_in,
        num_out,
        GATHER=row_index_S is not None,
        HAS_BIAS=bias_EY is not None,
        RANK=0 if u_SR is None else u_SR.shape[1],
        TRANSPOSED=transposed,
        PRECISION="ieee" if x_NX.dtype == torch.float32 else "tf32",
        BLOCK_S=tile.rows,
        BLOCK_Y=tile.columns,
        BLOCK_X=tile.k_step,
        GROUP=GROUP_TILES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_SY


def _num_programs(x_NX: Tensor, tiles: RowTiles, num_out: int, tile: LinearTile) -> int:
    most = tiles.expert_of_tile_M.numel() * triton.cdiv(num_out, tile.columns)
    if x_NX.device.type != "cuda":
        return min(most, 4)  # the interpreter: a few, so that a program takes several tiles
    return min(most, torch.cuda.get_device_properties(x_NX.device).multi_processor_count)


def expert_linear(
    x_NX: Tensor,
    projection: ExpertProjection,
    plan: ExpertPlan,
    *,
    grouped: bool = False,
    tile: LinearTile | None = None,
    tiles: RowTiles | None = None,
) -> Tensor:
    """Compute `W[e] x + b[e] + scaling B[e] (A[e] x)` for every routed row, without copying the rows. No gradients.

    x_NX: [T, in], gathered by token in the load; or, with `grouped`, [S, in] in plan order. The last dimension must be
    contiguous. projection: weight [E, out, in] or a transposed view of [E, in, out], rows of a multiple of 16 bytes.
    tile: the tile of the launch. tiles: from `build_row_tiles(plan, tile.rows)`, to share it between calls.
    Returns [S, out] in plan order, in the dtype of x; sentinel rows are not written.
    Raises ValueError, naming the argument. Deterministic. An expert without rows costs nothing.
    """
    projection.check("projection")
    _check(x_NX, projection, plan, grouped)
    tile = tile or LinearTile()
    tiles = tiles or build_row_tiles(plan, tile.rows)
    if tiles.block_rows != tile.rows:
        raise ValueError(f"tiles: built for {tiles.block_rows} rows, the tile has {tile.rows}")
    index_S = None if grouped else plan.token_of_row_S
    u_SR = b_EYR = None
    scaling = 0.0
    if projection.lora is not None:
        scaling = projection.lora.scaling
        a_ERX, b_EYR = padded_lora(projection, x_NX.dtype)
        thin = LinearTile(rows=tile.rows, columns=max(16, a_ERX.shape[1]), k_step=tile.k_step, num_warps=4)
        u_SR = launch_expert_linear(x_NX, index_S, a_ERX, None, None, 0.0, None, tiles, plan.num_rows, thin)
    return launch_expert_linear(
        x_NX, index_S, projection.weight_EYX, u_SR, b_EYR, scaling, projection.bias_EY, tiles, plan.num_rows, tile
    )


def padded_lora(projection: ExpertProjection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [E, R', in] and B [E, out, R'] in `dtype`, contiguous, padded with zeros to R', a power of two from 16 on."""
    lora = projection.lora
    assert lora is not None
    padding = max(MIN_RANK, triton.next_power_of_2(lora.rank)) - lora.rank
    a_ERX, b_EYR = lora.a_ERX, lora.b_EYR
    if padding:
        a_ERX, b_EYR = F.pad(a_ERX, (0, 0, 0, padding)), F.pad(b_EYR, (0, padding))
    layout = torch.contiguous_format  # a cast lays the copy out anew; without a cast `to` returns the tensor as it is
    return a_ERX.to(dtype, memory_format=layout).contiguous(), b_EYR.to(dtype, memory_format=layout).contiguous()


def _check(x_NX: Tensor, projection: ExpertProjection, plan: ExpertPlan, grouped: bool) -> None:
    weight = projection.weight_EYX
    need = (plan.num_rows if grouped else plan.num_tokens, weight.shape[2])
    if x_NX.shape != need:
        raise ValueError(f"x_NX: got shape {tuple(x_NX.shape)}, need {need}")
    if x_NX.stride(1) != 1:
        raise ValueError("x_NX: the last dimension is not contiguous")
    if weight.dtype != x_NX.dtype:
        raise ValueError(f"projection.weight_EYX: got {weight.dtype}, x_NX has {x_NX.dtype}")
    if 1 not in weight.stride()[1:]:
        raise ValueError("projection.weight_EYX: need contiguous rows or columns")
    wide = [stride * weight.element_size() for stride in weight.stride() if stride != 1]
    if any(stride % 16 for stride in wide) or weight.data_ptr() % 16:
        raise ValueError(f"projection.weight_EYX: strides of {wide} bytes, need multiples of 16")
