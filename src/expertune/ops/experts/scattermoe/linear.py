"""One expert projection with LoRA, fused: the gather in the load, the adapter as one more K step, in one kernel.

    out_s = W[e] x_r(s) + b[e] + B[e] (scaling u_s)                        for row s of expert e

r(s) is s itself or a gather index (the token of the row). u [S, R] is the adapter's thin product (A x, or B^T dy in the
input gradient), scaled as it is loaded. The same kernel is the input gradient: W seen transposed, A in the place of B.

FLOPs: 2 S X Y + 2 S R Y. Bytes, at least: W once, x once for each block of columns through L2, out once.
Persistent: as many programs as the GPU has multiprocessors take tiles in turn, in groups of GROUP_TILES row tiles, so
that the columns of W a group shares are read from L2. What a program needs to begin its next tile (expert, rows, gather
indices) is loaded a tile ahead, u and B before the main loop. Weights, grouped rows and results move through tensor
descriptors where their rows are 16-byte aligned, gathered rows by pointers that move on; a result's descriptor ends at
the expert's last row, so that stores need no mask. H200, Qwen3-30B-A3B, four products: 2400 us plain, 2030 with all of
this, dense cuBLAS 1640 (docs/log.md).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from expertune.ops.experts.scattermoe.launches import describe_linear
from expertune.ops.experts.scattermoe.pack import PackedLora
from expertune.ops.experts.scattermoe.tiles import RowTable, load_entry, num_entries
from expertune.ops.experts.scattermoe.tiling import MIN_RANK, LinearTile
from expertune.ops.integers import cdiv
from expertune.ops.triton_launch import (
    Launcher,
    has_descriptors,
    make_descriptor,
    num_multiprocessors,
    wait_for_earlier_kernels,
)

GROUP_TILES = 8  # row tiles that share a column of W in L2; 4 and 16 are within noise of 8 on an H200
BLOCK_RANK = 64  # a larger rank is multiplied in steps: 64 columns of B beside the main loop's buffers fill an SM
DESCRIPTOR_BYTES = 16  # what a tensor descriptor asks of the address and of every stride but the last
# A descriptor of a result views it as [., ., rows, columns] where the first two strides cancel: with coordinates
# (FAR, end, FAR - end + row, column) the address is that of `row`, and a row from `end` on is out of bounds, so the
# hardware drops it (the trick of triton.tools.ragged_tma).
FAR = tl.constexpr(2**30)


@triton.jit
def _locate(tile, num_row_tiles, num_column_tiles, GROUP: tl.constexpr, BLOCK_Y: tl.constexpr):
    """(row tile, first column) of a tile: all columns of a group of row tiles come before the next group."""
    tiles_in_group = GROUP * num_column_tiles
    first_of_group = (tile // tiles_in_group) * GROUP
    group_size = tl.minimum(num_row_tiles - first_of_group, GROUP)
    row_tile = first_of_group + (tile % tiles_in_group) % group_size
    return row_tile, ((tile % tiles_in_group) // group_size) * BLOCK_Y


@triton.jit
def _tile(
    x_ptr, x_desc, stride_x, w_ptr, w_desc, stride_w_expert, stride_w_out, stride_w_in,
    u_ptr, lora_b_ptr, stride_b_expert, stride_b_out, stride_b_rank, scaling, bias_ptr,
    out_ptr, out_desc, out_index_ptr, num_in, num_out,
    expert, first_row, end_row, first_column, sources,
    X_DESCRIPTOR: tl.constexpr, W_DESCRIPTOR: tl.constexpr, OUT_DESCRIPTOR: tl.constexpr,
    SCATTER: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    steps, ranks = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_R)
    rows = first_row + tl.arange(0, BLOCK_S)
    in_rows = rows < end_row
    columns = first_column + tl.arange(0, BLOCK_Y)
    in_columns = columns < num_out
    if RANK > 0:
        u_ptrs = u_ptr + rows.to(tl.int64)[:, None] * RANK + ranks[None, :]
        b_ptrs = lora_b_ptr + expert.to(tl.int64) * stride_b_expert
        b_ptrs += columns[:, None] * stride_b_out + ranks[None, :] * stride_b_rank
        if RANK == BLOCK_R:  # in registers before the main loop
            u = tl.load(u_ptrs, mask=in_rows[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=in_columns[:, None], other=0.0)

    if not X_DESCRIPTOR:
        x_row_ptrs = x_ptr + sources.to(tl.int64)[:, None] * stride_x
        x_ptrs = x_row_ptrs + steps[None, :]
    acc = tl.zeros((BLOCK_S, BLOCK_Y), dtype=tl.float32)
    for k in tl.range(0, num_in, BLOCK_X):
        if X_DESCRIPTOR:
            x = x_desc.load([first_row, k])
        elif WHOLE:  # a mask, or an address computed anew in each step, costs a wide tile 4 %
            x = tl.load(x_ptrs)
            x_ptrs += BLOCK_X
        else:  # rows that are not loaded make a half or a narrow tile faster: loads bound it
            mask = in_rows[:, None] & (k + steps < num_in)[None, :]
            x = tl.load(x_row_ptrs + (k + steps)[None, :], mask=mask, other=0.0)
        if not W_DESCRIPTOR:
            w_ptrs = w_ptr + expert.to(tl.int64) * stride_w_expert
            w_ptrs += (k + steps).to(tl.int64)[:, None] * stride_w_in + columns.to(tl.int64)[None, :] * stride_w_out
            w = tl.load(w_ptrs, mask=(k + steps < num_in)[:, None] & in_columns[None, :], other=0.0)
        elif TRANSPOSED:
            w = w_desc.load([expert, k, first_column]).reshape(BLOCK_X, BLOCK_Y)
        else:
            w = w_desc.load([expert, first_column, k]).reshape(BLOCK_Y, BLOCK_X).T
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if RANK > 0:
        if RANK == BLOCK_R:
            u = (u.to(tl.float32) * scaling).to(DTYPE)
            # the mask once more: what is used as loaded goes to shared memory before the main loop, beside its buffers
            b = tl.where(in_columns[:, None], b, 0.0)
            acc = tl.dot(u, b.T, acc, input_precision=PRECISION)
        else:
            for r in tl.range(0, RANK, BLOCK_R, num_stages=1):
                u = tl.load(u_ptrs + r, mask=in_rows[:, None], other=0.0)
                b = tl.load(b_ptrs + r * stride_b_rank, mask=in_columns[:, None], other=0.0)
                u = (u.to(tl.float32) * scaling).to(DTYPE)
                acc = tl.dot(u, b.T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * num_out + columns, mask=in_columns, other=0.0)
        acc += bias.to(tl.float32)[None, :]

    out = acc.to(DTYPE)
    if OUT_DESCRIPTOR:
        row = first_row - end_row + FAR
        out_desc.store([FAR, end_row, row, first_column], out.reshape(1, 1, BLOCK_S, BLOCK_Y))
    else:
        targets = tl.load(out_index_ptr + rows, mask=in_rows, other=0) if SCATTER else rows
        out_ptrs = out_ptr + targets.to(tl.int64)[:, None] * num_out + columns[None, :]
        tl.store(out_ptrs, out, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(launch_metadata=describe_linear, do_not_specialize=["tiles_capacity", "scaling"])
def _expert_linear_kernel(
    x_ptr, x_desc, stride_x, row_index_ptr, w_ptr, w_desc, stride_w_expert, stride_w_out, stride_w_in,
    u_ptr, lora_b_ptr, stride_b_expert, stride_b_out, stride_b_rank, scaling, bias_ptr,
    out_ptr, out_desc, out_index_ptr, tiles_ptr, tiles_capacity, num_in, num_out,
    X_DESCRIPTOR: tl.constexpr, W_DESCRIPTOR: tl.constexpr, OUT_DESCRIPTOR: tl.constexpr, GATHER: tl.constexpr,
    SCATTER: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    num_row_tiles = num_entries(tiles_ptr, tiles_capacity)
    num_column_tiles = tl.cdiv(num_out, BLOCK_Y)
    num_tiles = num_row_tiles * num_column_tiles
    step, first_tile = tl.num_programs(0), tl.program_id(0)
    if first_tile >= num_tiles:
        return
    lanes = tl.arange(0, BLOCK_S)

    row_tile, first_column = _locate(first_tile, num_row_tiles, num_column_tiles, GROUP, BLOCK_Y)
    expert, first_row, end_row = load_entry(tiles_ptr, tiles_capacity, row_tile)
    sources = first_row + lanes % (end_row - first_row)  # past the end: rows of the tile once more, not stored
    if GATHER:
        sources = tl.load(row_index_ptr + sources).to(tl.int32)
    next_row_tile, next_column = _locate(
        tl.minimum(first_tile + step, num_tiles - 1), num_row_tiles, num_column_tiles, GROUP, BLOCK_Y
    )
    next_expert, next_first_row, next_end_row = load_entry(tiles_ptr, tiles_capacity, next_row_tile)

    for tile in tl.range(first_tile, num_tiles, step):
        next_sources = next_first_row + lanes % (next_end_row - next_first_row)
        if GATHER:
            next_sources = tl.load(row_index_ptr + next_sources).to(tl.int32)
        later_row_tile, later_column = _locate(
            tl.minimum(tile + 2 * step, num_tiles - 1), num_row_tiles, num_column_tiles, GROUP, BLOCK_Y
        )
        later_expert, later_first_row, later_end_row = load_entry(tiles_ptr, tiles_capacity, later_row_tile)

        if HALVES and end_row - first_row <= BLOCK_S // 2:
            half_sources, _ = tl.split(sources.reshape(2, BLOCK_S // 2).trans())
            _tile(
                x_ptr, x_desc, stride_x, w_ptr, w_desc, stride_w_expert, stride_w_out, stride_w_in,
                u_ptr, lora_b_ptr, stride_b_expert, stride_b_out, stride_b_rank, scaling, bias_ptr,
                out_ptr, out_desc, out_index_ptr, num_in, num_out,
                expert, first_row, end_row, first_column, half_sources,
                False, W_DESCRIPTOR, False, SCATTER, HAS_BIAS, RANK, TRANSPOSED, DTYPE, PRECISION,
                BLOCK_S // 2, BLOCK_Y, BLOCK_X, BLOCK_R, False,
            )  # fmt: skip
        else:
            _tile(
                x_ptr, x_desc, stride_x, w_ptr, w_desc, stride_w_expert, stride_w_out, stride_w_in,
                u_ptr, lora_b_ptr, stride_b_expert, stride_b_out, stride_b_rank, scaling, bias_ptr,
                out_ptr, out_desc, out_index_ptr, num_in, num_out,
                expert, first_row, end_row, first_column, sources,
                X_DESCRIPTOR, W_DESCRIPTOR, OUT_DESCRIPTOR, SCATTER, HAS_BIAS, RANK, TRANSPOSED, DTYPE,
                PRECISION, BLOCK_S, BLOCK_Y, BLOCK_X, BLOCK_R, WHOLE,
            )  # fmt: skip

        expert, first_row, end_row = next_expert, next_first_row, next_end_row
        first_column, sources = next_column, next_sources
        next_expert, next_first_row, next_end_row = later_expert, later_first_row, later_end_row
        next_column = later_column


_expert_linear = Launcher(_expert_linear_kernel)


def launch_expert_linear(
    x_NX: Tensor,
    row_index_S: Tensor | None,
    weight_EYX: Tensor,
    tiles: RowTable,
    num_rows: int,
    tile: LinearTile,
    *,
    u_SR: Tensor | None = None,
    lora_b_EYR: Tensor | None = None,
    scaling: float = 0.0,
    bias_EY: Tensor | None = None,
    out_index_S: Tensor | None = None,
) -> Tensor:
    """Allocate out [num_rows, Y] and launch; rows of no tile are not written."""
    num_out, num_in = weight_EYX.shape[1:]
    bias_EY = None if bias_EY is None else bias_EY.contiguous()
    out_SY, dtype, device = x_NX.new_empty(num_rows, num_out), x_NX.dtype, x_NX.device
    rank = 0 if u_SR is None else u_SR.shape[1]
    strides = weight_EYX.stride()
    transposed = strides[2] != 1
    may = tile.descriptors and num_rows > 0 and has_descriptors(device)
    x_desc = w_desc = out_desc = None
    if may:
        stored = weight_EYX.transpose(1, 2) if transposed else weight_EYX
        if fits_descriptor(stored):
            block = [1, tile.k_step, tile.columns] if transposed else [1, tile.columns, tile.k_step]
            w_desc = _descriptor(stored, stored.shape, stored.stride(), block)
        if row_index_S is None and fits_descriptor(x_NX):
            x_desc = _descriptor(x_NX, x_NX.shape, x_NX.stride(), [tile.rows, tile.k_step])
        if out_index_S is None and fits_descriptor(out_SY):
            out_desc = _descriptor(out_SY, *clipped_view(out_SY), [1, 1, tile.rows, tile.columns])
    _expert_linear(
        (_num_programs(device, tiles, num_out, tile),),
        x_NX, x_desc, x_NX.stride(0), row_index_S, weight_EYX, w_desc, *strides,
        u_SR, lora_b_EYR, *((0, 0, 0) if lora_b_EYR is None else lora_b_EYR.stride()), scaling, bias_EY,
        out_SY, out_desc, out_index_S, tiles.entries_4M, tiles.capacity, num_in, num_out,
        x_desc is not None, w_desc is not None, out_desc is not None, row_index_S is not None,
        out_index_S is not None, bias_EY is not None, rank, transposed, TRITON_DTYPES[dtype], precision(x_NX),
        tile.rows, tile.columns, tile.k_step, max(MIN_RANK, min(rank, BLOCK_RANK)),
        tile.columns > BLOCK_RANK and num_in % tile.k_step == 0, GROUP_TILES, tile.halves,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out_SY


def launch_thin_linear(
    x_NX: Tensor, row_index_S: Tensor | None, a_ERX: Tensor, tiles: RowTable, num_rows: int
) -> Tensor:
    """u = A x [num_rows, R]: the same kernel, one narrow column of tiles, several programs on each multiprocessor."""
    k_step = 32 if x_NX.dtype == torch.float32 else 64
    columns = min(a_ERX.shape[1], BLOCK_RANK)  # a wider tile takes more shared memory than small GPUs have
    tile = LinearTile(tiles.block_rows, columns, k_step, num_warps=4, programs_per_sm=3)
    return launch_expert_linear(x_NX, row_index_S, a_ERX, tiles, num_rows, tile)


TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def precision(rows: Tensor) -> str:
    """fp32 products stay fp32: no TF32."""
    return "ieee" if rows.dtype == torch.float32 else "tf32"


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can hold it: last dimension dense, address and other strides of 16 bytes each."""
    *wide, last = tensor.stride()
    return last == 1 and is_aligned(tensor, wide)


def is_aligned(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether the address and these strides are what a tensor descriptor asks of them."""
    size = tensor.element_size()
    if tensor.data_ptr() % DESCRIPTOR_BYTES:
        return False
    return not any([stride * size % DESCRIPTOR_BYTES for stride in strides])  # noqa: C419 - a list is half the cost


def _descriptor(tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]) -> TensorDescriptor:
    return make_descriptor(TensorDescriptor, tensor, shape, strides, block_shape=block)


def clipped_view(out_SY: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of out with two leading dimensions whose strides cancel modulo 2^64 bytes: see FAR."""
    num_out, stride = out_SY.shape[1], out_SY.stride(0)
    return [2**31 - 2**16, 2**31 - 2**16, FAR.value, num_out], [2**34 - stride, stride, stride, 1]


def _num_programs(device: torch.device, tiles: RowTable, num_out: int, tile: LinearTile) -> int:
    most = tiles.capacity * cdiv(num_out, tile.columns)
    if device.type != "cuda":
        return min(most, 4)  # the interpreter: a few, so that a program takes several tiles
    return min(most, num_multiprocessors(device) * tile.programs_per_sm)


def adapter_step(lora: PackedLora | None, u_SR: Tensor | None) -> dict[str, object]:
    """The adapter's part of `launch_expert_linear`'s arguments, nothing without an adapter."""
    if lora is None:
        return {}
    return {"u_SR": u_SR, "lora_b_EYR": lora.b_EYR, "scaling": lora.scaling}
