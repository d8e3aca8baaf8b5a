"""SwiGLU with the adapters' work on its rows in the same pass: for Hopper, in Triton's gluon dialect.

    forward     a = silu(g) u                       u2_s = A2[e] a_s                               h [S, 2I] = g then u
    backward    dh_s, dp_s as in `gate`             dA2[e] = s2 sum over s of v2_s (p_s a_s)^T
                                                    dB1[e] = s1 sum over s of dh_s u1_s^T          for the rows s of e

Apart, `gate` writes a and dh, and thin products and sums read them back: 100 and 300 MB at S = 65536, I = 768. Here
values go from registers to shared memory, where the tensor cores take them; the backward writes no a at all. In plain
Triton this lost by far: a value that is both stored and multiplied is computed in two layouts.

The forward's program owns BLOCK_S rows and walks the columns. The backward's owns BLOCK_X columns of a, g and u of one
chunk of an expert's rows, and walks the rows; of dp it has a part, and those of all columns are added in order by
another launch. Both load a step ahead: without that the forward lost to separate kernels, and the backward won less.
Chunks are added as in `sums`: in order, by the last program to finish. No atomics, the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from expertune.ops.experts.scattermoe.launches import describe_rows
from expertune.ops.experts.scattermoe.linear import TRITON_DTYPES
from expertune.ops.experts.scattermoe.pack import empty_transposed
from expertune.ops.experts.scattermoe.tiles import RowTable
from expertune.ops.experts.scattermoe.tiling import fits_one_pass, pick_backward_tile, pick_forward_tile
from expertune.ops.experts.types import ExpertLora
from expertune.ops.integers import cdiv
from expertune.ops.plan import ExpertPlan
from expertune.ops.triton_launch import Launcher, is_hopper, wait_for_earlier_kernels

SLICE = gl.constexpr(16)  # columns whose chunks are added at a time
ROWS_OF_DP = 1024  # whose parts one program adds

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name after Triton 3.6, and before


@gluon.jit
def _load_columns(h_ptrs, lora_a_ptrs, first, lanes, width, in_rows):
    """(gate, up, A2) of BLOCK_X columns from `first` on; zeros beyond the width and the rows."""
    in_width = (first + lanes < width)[None, :]
    gate = gl.load(h_ptrs + first, mask=in_rows & in_width, other=0.0)
    up = gl.load(h_ptrs + (first + width), mask=in_rows & in_width, other=0.0)
    return gate, up, gl.load(lora_a_ptrs + first, mask=in_width, other=0.0)


@gluon.jit(launch_metadata=describe_rows("swiglu_thin", "width", "RANK"), do_not_specialize=["capacity"])
def _swiglu_thin_kernel(
    h_ptr, a_ptr, lora_a_ptr, u2_ptr, tiles_ptr, capacity, width,
    RANK: gl.constexpr, TILE_ROWS: gl.constexpr, DTYPE: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_X: gl.constexpr,
):  # fmt: skip
    tl.extra.cuda.gdc_wait()
    PARTS: gl.constexpr = TILE_ROWS // BLOCK_S
    entry, part = gl.program_id(0) // PARTS, gl.program_id(0) % PARTS
    if entry < gl.load(tiles_ptr + 3 * capacity):
        expert, end_row = gl.load(tiles_ptr + entry), gl.load(tiles_ptr + 2 * capacity + entry)
        first_row = gl.load(tiles_ptr + capacity + entry) + part * BLOCK_S
        if first_row < end_row:
            LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
            GROUPS: gl.constexpr = gl.num_warps() // 4  # of four warps, which share the ranks
            ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, RANK // GROUPS, 16])
            A_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_S, BLOCK_X], DTYPE)
            W_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([RANK, BLOCK_X], DTYPE)
            a_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_S, BLOCK_X], A_TILE)
            w_smem = gl.allocate_shared_memory(DTYPE, [RANK, BLOCK_X], W_TILE)
            rows = first_row + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, LAYOUT))
            lanes = gl.arange(0, BLOCK_X, layout=gl.SliceLayout(0, LAYOUT))
            ranks = gl.arange(0, RANK, layout=gl.SliceLayout(1, LAYOUT))
            in_rows = (rows < end_row)[:, None]
            h_ptrs = h_ptr + rows.to(gl.int64)[:, None] * (2 * width) + lanes[None, :]
            a_ptrs = a_ptr + rows.to(gl.int64)[:, None] * width + lanes[None, :]
            w_ptrs = lora_a_ptr + expert.to(gl.int64) * RANK * width + ranks[:, None] * width + lanes[None, :]
            acc = warpgroup_mma_init(gl.zeros((BLOCK_S, RANK), gl.float32, layout=ACC))
            gate, up, w = _load_columns(h_ptrs, w_ptrs, 0, lanes, width, in_rows)
            for first in range(0, width, BLOCK_X):
                later = _load_columns(h_ptrs, w_ptrs, first + BLOCK_X, lanes, width, in_rows)
                gate, up = gate.to(gl.float32), up.to(gl.float32)
                a = (gate * (1 / (1 + gl.exp(-gate))) * up).to(DTYPE)
                gl.store(a_ptrs + first, a, mask=in_rows & (first + lanes < width)[None, :])
                acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
                _barrier()  # in every warp: the product before has read its operands
                a_smem.store(a)
                w_smem.store(w)
                fence_async_shared()
                _barrier()
                acc = warpgroup_mma(a_smem, w_smem.permute((1, 0)), acc, is_async=True)
                gate, up, w = later
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            out_rows = first_row + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, ACC))
            out_ranks = gl.arange(0, RANK, layout=gl.SliceLayout(0, ACC))
            out_ptrs = u2_ptr + out_rows.to(gl.int64)[:, None] * RANK + out_ranks[None, :]
            gl.store(out_ptrs, acc.to(DTYPE), mask=(out_rows < end_row)[:, None])


_swiglu_thin = Launcher(_swiglu_thin_kernel)


@gluon.jit
def _thin_rows(ptr, rows, in_rows, RANK: gl.constexpr, LAYOUT: gl.constexpr):
    ranks = gl.arange(0, RANK, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(ptr + rows.to(gl.int64)[:, None] * RANK + ranks[None, :], mask=in_rows[:, None], other=0.0)


@gluon.jit
def _load_step(
    sources, first, end_row, columns, width, BLOCK_S: gl.constexpr,
    RANK1: gl.constexpr, RANK2: gl.constexpr, LAYOUT: gl.constexpr, THIN: gl.constexpr,
):  # fmt: skip
    """(gate, up, da, p, u1, v2) of BLOCK_S rows; sources: where h, da, p, u1 and v2 lie. Zeros beyond the rows."""
    h_ptr, da_ptr, p_ptr, u1_ptr, v2_ptr = sources
    rows = first + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, LAYOUT))
    mask = (rows < end_row)[:, None] & (columns < width)[None, :]
    h_ptrs = h_ptr + (rows.to(gl.int64)[:, None] * (2 * width) + columns[None, :])
    gate = gl.load(h_ptrs, mask=mask, other=0.0)
    up = gl.load(h_ptrs + width, mask=mask, other=0.0)
    da = gl.load(da_ptr + (rows.to(gl.int64)[:, None] * width + columns[None, :]), mask=mask, other=0.0)
    p = gl.load(p_ptr + rows, mask=rows < end_row, other=0.0)
    thin_rows = first + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, THIN))
    u1 = _thin_rows(u1_ptr, thin_rows, thin_rows < end_row, RANK1, THIN)
    return gate, up, da, p, u1, _thin_rows(v2_ptr, thin_rows, thin_rows < end_row, RANK2, THIN)


@gluon.jit
def _store_sum(
    acc,
    scale,
    out_ptr,
    parts_ptr,
    counter_ptr,
    columns_of,
    place,
    RANK: gl.constexpr,
    ACC: gl.constexpr,
    BLOCK_X: gl.constexpr,
):
    """`scale * acc` to out [rank, stride]; of several chunks, the last to come adds all of them, a few columns at once.

    columns_of = (first column, end column, stride of a rank, rank)       place = (chunk, first of the expert, how many)
    """
    first, end, stride, rank = columns_of
    chunk, first_chunk, num_chunks = place
    ranks = gl.arange(0, RANK, layout=gl.SliceLayout(0, ACC))
    columns = first + gl.arange(0, BLOCK_X, layout=gl.SliceLayout(1, ACC))
    mask = (columns < end)[:, None] & (ranks < rank)[None, :]
    if num_chunks == 1:
        out_ptrs = out_ptr + ranks[None, :].to(gl.int64) * stride + columns[:, None]
        gl.store(out_ptrs, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part_size = stride.to(gl.int64) * RANK
        parts_ptr += first_chunk * part_size
        gl.store(
            parts_ptr + (chunk - first_chunk) * part_size + columns[:, None] * RANK + ranks[None, :], acc, mask=mask
        )
        _barrier()
        if gl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1 == num_chunks:
            gl.store(counter_ptr, 0)
            ADDED: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [gl.num_warps(), 1], [1, 0])
            some_ranks = gl.arange(0, RANK, layout=gl.SliceLayout(0, ADDED))
            for start in range(first, gl.minimum(first + BLOCK_X, end), SLICE):
                some = start + gl.arange(0, SLICE, layout=gl.SliceLayout(1, ADDED))
                of_both = (some < end)[:, None] & (some_ranks < rank)[None, :]
                part_ptrs = parts_ptr + some[:, None] * RANK + some_ranks[None, :]
                total = gl.zeros((SLICE, RANK), gl.float32, layout=ADDED)
                for i in range(num_chunks):
                    total += gl.load(part_ptrs + i * part_size, mask=of_both, other=0.0)
                out_ptrs = out_ptr + some_ranks[None, :].to(gl.int64) * stride + some[:, None]
                gl.store(out_ptrs, (total * scale).to(out_ptr.dtype.element_ty), mask=of_both)


@gluon.jit(
    launch_metadata=describe_rows("swiglu_backward_sums", "width", "RANK1", "RANK2"),
    do_not_specialize=["capacity", "num_rows", "scaling1", "scaling2", "rank1", "rank2"],
)
def _swiglu_backward_sums_kernel(
    h_ptr, da_ptr, p_ptr, dh_ptr, u1_ptr, v2_ptr, dp_ptr, da2_ptr, db1_ptr, parts2_ptr, parts1_ptr, counters_ptr,
    row_fence_ptr, chunks_ptr, capacity, num_rows, width, scaling1, scaling2, rank1, rank2,
    RANK1: gl.constexpr, RANK2: gl.constexpr, CHUNK_S: gl.constexpr, DTYPE: gl.constexpr,
    BLOCK_S: gl.constexpr, BLOCK_X: gl.constexpr,
):  # fmt: skip
    tl.extra.cuda.gdc_wait()
    block, chunk, num_blocks = gl.program_id(0), gl.program_id(1), gl.num_programs(0)
    if chunk < gl.load(chunks_ptr + 3 * capacity):
        expert = gl.load(chunks_ptr + chunk)
        first_row, end_row = gl.load(chunks_ptr + capacity + chunk), gl.load(chunks_ptr + 2 * capacity + chunk)
        start = gl.load(row_fence_ptr + expert)
        num_chunks = gl.maximum((gl.load(row_fence_ptr + expert + 1) - start + CHUNK_S - 1) // CHUNK_S, 1)
        place = (chunk, chunk - (first_row - start) // CHUNK_S, num_chunks)

        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
        THIN: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [gl.num_warps(), 1], [1, 0])
        ACC1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, RANK1, 16])
        ACC2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, RANK2, 16])
        WIDE_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_S, BLOCK_X], DTYPE)
        U1_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_S, RANK1], DTYPE)
        V2_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_S, RANK2], DTYPE)
        a_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_S, BLOCK_X], WIDE_TILE)
        dgate_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_S, BLOCK_X], WIDE_TILE)
        dup_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_S, BLOCK_X], WIDE_TILE)
        u1_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_S, RANK1], U1_TILE)
        v2_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_S, RANK2], V2_TILE)
        acc_a = warpgroup_mma_init(gl.zeros((BLOCK_X, RANK2), gl.float32, layout=ACC2))
        acc_dgate = warpgroup_mma_init(gl.zeros((BLOCK_X, RANK1), gl.float32, layout=ACC1))
        acc_dup = warpgroup_mma_init(gl.zeros((BLOCK_X, RANK1), gl.float32, layout=ACC1))
        first_column = block * BLOCK_X
        columns = first_column + gl.arange(0, BLOCK_X, layout=gl.SliceLayout(0, LAYOUT))
        in_width = (columns < width)[None, :]

        sources = (h_ptr, da_ptr, p_ptr, u1_ptr, v2_ptr)
        gate, up, da, p, u1, v2 = _load_step(
            sources, first_row, end_row, columns, width, BLOCK_S, RANK1, RANK2, LAYOUT, THIN
        )
        for first in range(first_row, end_row, BLOCK_S):
            later = _load_step(sources, first + BLOCK_S, end_row, columns, width, BLOCK_S, RANK1, RANK2, LAYOUT, THIN)
            rows = first + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, LAYOUT))
            in_rows = rows < end_row
            mask = in_rows[:, None] & in_width
            h_offsets = rows.to(gl.int64)[:, None] * (2 * width) + columns[None, :]
            gate, up, da, p = gate.to(gl.float32), up.to(gl.float32), da.to(gl.float32), p.to(gl.float32)[:, None]

            sigmoid = 1 / (1 + gl.exp(-gate))
            silu = gate * sigmoid
            dp = gl.sum(da * silu * up, axis=1)
            dgate = (p * da * up * sigmoid * (1 + gate * (1 - sigmoid))).to(DTYPE)
            dup = (p * da * silu).to(DTYPE)
            gl.store(dh_ptr + h_offsets, dgate, mask=mask)
            gl.store(dh_ptr + h_offsets + width, dup, mask=mask)
            gl.store(dp_ptr + block.to(gl.int64) * num_rows + rows, dp, mask=in_rows)

            acc_a, acc_dgate, acc_dup = warpgroup_mma_wait(num_outstanding=0, deps=[acc_a, acc_dgate, acc_dup])
            _barrier()  # in every warp: the products before have read their operands
            a_smem.store((p * silu * up).to(DTYPE))
            dgate_smem.store(dgate)
            dup_smem.store(dup)
            u1_smem.store(u1)
            v2_smem.store(v2)
            fence_async_shared()
            _barrier()
            acc_a = warpgroup_mma(a_smem.permute((1, 0)), v2_smem, acc_a, is_async=True)
            acc_dgate = warpgroup_mma(dgate_smem.permute((1, 0)), u1_smem, acc_dgate, is_async=True)
            acc_dup = warpgroup_mma(dup_smem.permute((1, 0)), u1_smem, acc_dup, is_async=True)
            gate, up, da, p, u1, v2 = later
        acc_a, acc_dgate, acc_dup = warpgroup_mma_wait(num_outstanding=0, deps=[acc_a, acc_dgate, acc_dup])

        counter_ptr = counters_ptr + 3 * (expert * num_blocks + block)
        da2_ptr += expert.to(gl.int64) * rank2 * width
        db1_ptr += expert.to(gl.int64) * rank1 * 2 * width
        of_a = (first_column, width, width, rank2)
        of_dgate = (first_column, width, 2 * width, rank1)
        of_dup = (width + first_column, 2 * width, 2 * width, rank1)
        _store_sum(acc_a, scaling2, da2_ptr, parts2_ptr, counter_ptr, of_a, place, RANK2, ACC2, BLOCK_X)
        _store_sum(acc_dgate, scaling1, db1_ptr, parts1_ptr, counter_ptr + 1, of_dgate, place, RANK1, ACC1, BLOCK_X)
        _store_sum(acc_dup, scaling1, db1_ptr, parts1_ptr, counter_ptr + 2, of_dup, place, RANK1, ACC1, BLOCK_X)


_swiglu_backward_sums = Launcher(_swiglu_backward_sums_kernel)


@triton.jit(do_not_specialize=["num_rows"])
def _add_dp_kernel(
    dp_ptr, slot_of_row_ptr, dweights_ptr, row_fence_ptr, num_experts, num_rows, num_blocks, BLOCK: tl.constexpr
):  # fmt: skip
    wait_for_earlier_kernels()
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < tl.load(row_fence_ptr + num_experts)
    dp_ptrs, dp = dp_ptr + rows, tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.range(0, num_blocks):
        dp += tl.load(dp_ptrs, mask=mask, other=0.0)
        dp_ptrs += num_rows
    slots = tl.load(slot_of_row_ptr + rows, mask=mask, other=0)
    tl.store(dweights_ptr + slots, dp.to(dweights_ptr.dtype.element_ty), mask=mask)


_add_dp = Launcher(_add_dp_kernel)


class AdapterSide(NamedTuple):
    """What a gradient of an adapter's A or B takes beside the rows that are here: v2 or u1 [S, R'], and the adapter."""

    thin_SR: Tensor
    lora: ExpertLora

    @classmethod
    def if_needed(cls, needed: bool, thin_SR: Tensor | None, lora: ExpertLora | None) -> "AdapterSide | None":
        """None where the gradient is not wanted or there is no adapter."""
        return cls(thin_SR, lora) if needed and thin_SR is not None and lora is not None else None


def takes(h_SJ: Tensor, *padded_ranks: int) -> bool:
    """Whether the kernels know these rows, and their GPU."""
    return fits_one_pass(h_SJ, *padded_ranks) and is_hopper(h_SJ.device)


def swiglu_thin(h_SJ: Tensor, lora_a_ERI: Tensor, tiles: RowTable) -> tuple[Tensor, Tensor]:
    """(a [S, I], u2 = A2 a [S, R']) from h [S, 2I], contiguous, and A2 [E, R', I] as it is packed.

    tiles: of a multiple of 64 rows. Sentinel rows are not written.
    """
    num_rows, padded, width = h_SJ.shape[0], lora_a_ERI.shape[1], h_SJ.shape[1] // 2
    a_SI, u2_SR = h_SJ.new_empty(num_rows, width), h_SJ.new_empty(num_rows, padded)
    tile = pick_forward_tile(padded)
    _swiglu_thin(
        (tiles.capacity * tiles.block_rows // tile.rows,), h_SJ, a_SI, lora_a_ERI, u2_SR, tiles.entries_4M,
        tiles.capacity, width, padded, tiles.block_rows, TRITON_DTYPES[h_SJ.dtype], tile.rows, tile.columns,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return a_SI, u2_SR


def swiglu_backward_sums(
    h_SJ: Tensor,
    da_SI: Tensor,
    p_S: Tensor,
    v2: AdapterSide,
    u1: AdapterSide,
    plan: ExpertPlan,
    chunks: RowTable,
    *,
    weights_dtype: torch.dtype,
    reuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dh [S, 2I] scaled by p, dweights [T, K] in `weights_dtype`, dA2 [E, R, I], dB1 [E, R, 2I]).

    v2, u1: with the down and with the up projection's adapter. reuse: dh is written over h. Sentinel rows: dweights is
    zero, dh is not written.
    """
    (num_rows, width), device, (num_experts, rank2, _) = da_SI.shape, h_SJ.device, v2.lora.a_ERX.shape
    dh_SJ = h_SJ if reuse else torch.empty_like(h_SJ)
    da2_ERI = v2.lora.a_ERX.new_empty(v2.lora.a_ERX.shape)
    db1_ERJ = empty_transposed(u1.lora.b_EYR)
    padded1, padded2 = u1.thin_SR.shape[1], v2.thin_SR.shape[1]
    tile = pick_backward_tile(max(padded1, padded2))
    num_blocks = cdiv(width, tile.columns)
    counters = chunks.counters(3 * num_experts * num_blocks)
    num_parts = chunks.num_parts(plan.num_rows)
    parts2, parts1 = (
        torch.empty(num_parts, columns, padded, device=device, dtype=torch.float32)
        for columns, padded in ((width, padded2), (2 * width, padded1))
    )
    dp_NS = torch.empty(num_blocks, num_rows, device=device, dtype=torch.float32)
    _swiglu_backward_sums(
        (num_blocks, chunks.capacity), h_SJ, da_SI, p_S, dh_SJ, u1.thin_SR, v2.thin_SR, dp_NS, da2_ERI, db1_ERJ,
        parts2, parts1, counters, plan.row_fence_F, chunks.entries_4M, chunks.capacity, num_rows, width,
        u1.lora.scaling, v2.lora.scaling, db1_ERJ.shape[1], rank2, padded1, padded2, chunks.block_rows,
        TRITON_DTYPES[h_SJ.dtype], tile.rows, tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    new = torch.zeros if plan.has_sentinels else torch.empty
    dweights_TK = new(plan.num_tokens, plan.top_k, device=device, dtype=weights_dtype)
    _add_dp(
        (cdiv(num_rows, ROWS_OF_DP),), dp_NS, plan.slot_of_row_S, dweights_TK, plan.row_fence_F, num_experts, num_rows,
        num_blocks, ROWS_OF_DP,
    )  # fmt: skip
    return dh_SJ, dweights_TK, da2_ERI, db1_ERJ
