"""Sums over the rows of each expert: the adapters' gradients.

    sum[e] [R, X] = scaling * sum over rows s of e of  p_s left_s [R]  rows_r(s) [X]                       (dA, or dB^T)

r(s) is s itself or a gather index; p is the routing weight where it is wanted. A program owns BLOCK_X columns of one
chunk of an expert's rows (at most CHUNK_ROWS) and keeps its part of the sum in registers. The parts of an expert with
several chunks are added in a fixed order by the program that finishes last, so results do not depend on the order of
programs: no atomic addition, the same bits every time, exact zeros for an expert without rows.

Bytes: rows once, left X / BLOCK_X times. H200, 65536 gathered rows of 2048: 53 us, 5 TB/s out of L2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.experts.scattermoe.launches import describe_rows
from expertune.ops.experts.scattermoe.linear import precision
from expertune.ops.experts.scattermoe.tiles import RowTable, load_entry, num_entries
from expertune.ops.experts.scattermoe.tiling import RowsTile
from expertune.ops.integers import cdiv
from expertune.ops.plan import ExpertPlan
from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

THIN_TILE = RowsTile(32, 256, num_warps=4)  # H200: 53 us; 64 x 256 with 8 warps 58, 128 x 128 57 to 65
WIDE_TILE = RowsTile(64, 128, num_warps=4)  # ranks from 64 on. H200: 78 us; 128 x 128 86, 64 x 256 85, 32 x 256 99
BLOCK_RANK = 64  # ranks of one program
SLICE_COLUMNS = 32  # of which the last program adds the parts at a time


@triton.jit
def is_last(counter_ptr, expected):
    """Whether this program is the last of `expected` to arrive; what the others stored before is then visible."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
    if arrived == expected:
        tl.store(counter_ptr, 0)  # ready for the next launch
    return arrived == expected


@triton.jit
def load_chunk(chunks_ptr, capacity, row_fence_ptr, chunk, CHUNK_S: tl.constexpr):
    """(expert, first row, end row, first chunk of the expert, number of its chunks)."""
    expert, first_row, end_row = load_entry(chunks_ptr, capacity, chunk)
    start, end = tl.load(row_fence_ptr + expert), tl.load(row_fence_ptr + expert + 1)
    first_chunk = chunk - (first_row - start) // CHUNK_S
    return expert, first_row, end_row, first_chunk, tl.maximum((end - start + CHUNK_S - 1) // CHUNK_S, 1)


@triton.jit
def store_sum(
    acc, scale, out_ptr, stride_r, stride_x, rank, parts_ptr, counter_ptr, first_column, end_column, ranks,
    chunk, first_chunk, num_chunks, RANK: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_R: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Store `scale * acc` [columns, ranks], or, if the expert has several chunks, let the last of them add up all.

    It adds SLICE columns at a time, from memory: with all of them at once this, and not the sum, would decide how many
    registers a program has (177 for 70 at rank 16, 219 for 123 at rank 64), and so how many run side by side.
    """
    columns = first_column + tl.arange(0, BLOCK_X)
    if num_chunks == 1:
        out_ptrs = out_ptr + columns.to(tl.int64)[:, None] * stride_x + ranks.to(tl.int64)[None, :] * stride_r
        mask = (columns < end_column)[:, None] & (ranks < rank)[None, :]
        tl.store(out_ptrs, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part_size = end_column * RANK
        parts_ptr += first_chunk.to(tl.int64) * part_size
        own_ptrs = parts_ptr + (chunk - first_chunk).to(tl.int64) * part_size + columns[:, None] * RANK + ranks[None, :]
        tl.store(own_ptrs, acc, mask=(columns < end_column)[:, None] & (ranks < rank)[None, :])
        if is_last(counter_ptr, num_chunks):
            for start in tl.range(first_column, tl.minimum(first_column + BLOCK_X, end_column), SLICE):
                some = start + tl.arange(0, SLICE)
                mask = (some < end_column)[:, None] & (ranks < rank)[None, :]
                part_ptrs = parts_ptr + some[:, None] * RANK + ranks[None, :]
                total = tl.zeros((SLICE, BLOCK_R), dtype=tl.float32)
                for _ in tl.range(0, num_chunks):
                    total += tl.load(part_ptrs, mask=mask, other=0.0)
                    part_ptrs += part_size
                out_ptrs = out_ptr + some.to(tl.int64)[:, None] * stride_x + ranks.to(tl.int64)[None, :] * stride_r
                tl.store(out_ptrs, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=describe_rows("expert_sum", "width", "RANK"), do_not_specialize=["capacity", "scaling"])
def _expert_sum_kernel(
    left_ptr,
    rows_ptr,
    stride_rows,
    row_index_ptr,
    p_ptr,
    scaling,
    sum_ptr,
    stride_sum_e,
    stride_sum_r,
    stride_sum_x,
    parts_ptr,
    counters_ptr,
    row_fence_ptr,
    chunks_ptr,
    capacity,
    width,
    rank,
    GATHER: tl.constexpr,
    HAS_P: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK_S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICE: tl.constexpr,
):
    wait_for_earlier_kernels()
    block, chunk, num_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if chunk >= num_entries(chunks_ptr, capacity):
        return
    expert, first_row, end_row, first_chunk, num_chunks = load_chunk(
        chunks_ptr, capacity, row_fence_ptr, chunk, CHUNK_S
    )
    columns = block * BLOCK_X + tl.arange(0, BLOCK_X)
    in_width = columns < width
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_X, BLOCK_R), dtype=tl.float32)
    for first in tl.range(first_row, end_row, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        in_rows = rows < end_row
        sources = tl.load(row_index_ptr + rows, mask=in_rows, other=0) if GATHER else rows
        row_ptrs = rows_ptr + sources.to(tl.int64)[:, None] * stride_rows + columns[None, :]
        values = tl.load(row_ptrs, mask=in_rows[:, None] & in_width[None, :], other=0.0)
        left_ptrs = left_ptr + rows.to(tl.int64)[:, None] * RANK + ranks[None, :]
        left = tl.load(left_ptrs, mask=in_rows[:, None], other=0.0)
        if HAS_P:
            p = tl.load(p_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * p[:, None]).to(left.dtype)
        acc = tl.dot(values.T, left, acc, input_precision=PRECISION)

    counter_ptr = counters_ptr + (expert * tl.num_programs(2) + tl.program_id(2)) * num_blocks + block
    out_ptr = sum_ptr + expert.to(tl.int64) * stride_sum_e
    store_sum(
        acc, scaling, out_ptr, stride_sum_r, stride_sum_x, rank, parts_ptr, counter_ptr, block * BLOCK_X, width, ranks,
        chunk, first_chunk, num_chunks, RANK, BLOCK_X, BLOCK_R, SLICE,
    )  # fmt: skip


_expert_sum = Launcher(_expert_sum_kernel)


class RowsOf(NamedTuple):
    """The routed rows [S, X]: rows_NX in plan order, or, with an index [S], the row of rows_NX that each one reads."""

    rows_NX: Tensor
    index_S: Tensor | None

    def gathered(self) -> Tensor:
        """[S, X] in memory: for torch's own products."""
        return self.rows_NX if self.index_S is None else self.rows_NX[self.index_S]


def launch_expert_sum(
    left_SR: Tensor,
    rows: RowsOf,
    out_ERX: Tensor,
    scaling: float,
    plan: ExpertPlan,
    chunks: RowTable,
    *,
    p_S: Tensor | None = None,
) -> None:
    """Fill out [E, R, X] (any strides) with the sums.

    left_SR: [S, R'] contiguous, R' the padded rank. p_S: a factor of each row, or None.
    """
    padded, width, device = left_SR.shape[1], rows.rows_NX.shape[1], left_SR.device
    tile = THIN_TILE if padded < BLOCK_RANK else WIDE_TILE
    block_r, block_x = min(padded, BLOCK_RANK), tile.columns // (2 if left_SR.dtype == torch.float32 else 1)
    num_blocks, rank_blocks = cdiv(width, block_x), padded // block_r
    counters = chunks.counters(plan.num_experts * rank_blocks * num_blocks)
    num_parts = chunks.num_parts(plan.num_rows)
    _expert_sum(
        (num_blocks, chunks.capacity, rank_blocks), left_SR, rows.rows_NX, rows.rows_NX.stride(0),
        rows.index_S, p_S, scaling, out_ERX, *out_ERX.stride(),
        torch.empty(num_parts, padded, width, device=device, dtype=torch.float32), counters, plan.row_fence_F,
        chunks.entries_4M, chunks.capacity, width, out_ERX.shape[1], rows.index_S is not None, p_S is not None, padded,
        precision(left_SR), chunks.block_rows, tile.rows, block_x, block_r, SLICE_COLUMNS,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
