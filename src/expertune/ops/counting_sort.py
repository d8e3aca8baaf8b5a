"""The plan's sort on a GPU: a stable counting sort in two launches, without a host synchronisation.

    row of slot i = (slots of smaller experts) + (slots of the same expert before i)

Launch 1 counts the experts of each block of slots; launch 2 adds up the counts of the blocks before its own, and ranks
the slots inside its block: several tiles at once, each slot compared with those of its own tile, the tiles' counts
added up as those of the blocks are. It can also cut the rows into tiles and chunks (`row_tables`): every program knows
the fence, and one program more for each expert writes that expert's entries.

torch's chain is a dozen launches. H200, K = 8, E = 128, with both tables: 11 us for 1024 tokens, 15 for 8192, 39 for
32768, torch's chain without tables 104, 107 and 130 (benchmarks/routing.py). At E = 256 and 32768 tokens it is 89 us.
An id that is no expert (below 0 or from E on) goes past the last expert, so that nothing is written out of bounds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.integers import cdiv, next_power_of_2
from expertune.ops.row_tables import RowTables, empty_row_tables
from expertune.ops.triton_launch import Launcher, compile_only, is_first, wait_for_earlier_kernels

MAX_BLOCKS = 128  # of slots: each reads the counts of all, so their number is bounded and their size grows
TILE = 128  # slots compared with each other
OTHERS = 4  # slots of its tile that a thread compares its own with at once: one load of 16 bytes
MAX_GROUPS = 4  # of slots, a tile each, ranked at once
MAX_GROUP_BINS = 1024  # of all groups: a histogram's work grows with its bins
MAX_COUNTS = 8192  # of several blocks, read at once
NUM_WARPS = 4  # 8 take half as long again where blocks are large: 137 against 89 us at E = 256, 32768 tokens (H200)
BLOCK_ENTRIES = tl.constexpr(128)  # of a row table, of one expert, written at once


class SortedSlots(NamedTuple):
    """slot_of_row_S, row_of_slot_S, token_of_row_S: [S] int64. row_fence_F: [E + 1] int32. See `ExpertPlan`."""

    slot_of_row_S: Tensor
    row_of_slot_S: Tensor
    token_of_row_S: Tensor
    row_fence_F: Tensor


@triton.jit
def write_entries(  # type: ignore[no-untyped-def]
    table_ptr, capacity, starts, counts, expert, num_experts, block_rows, MIN_ENTRIES: tl.constexpr
):  # fmt: skip
    """Write an expert's entries of a row table; the first expert writes how many entries all have, and a counter of 0.

    starts, counts: [a power of two >= E], the first row of each expert and its number of rows.
    """
    experts = tl.arange(0, starts.shape[0])
    entries = tl.maximum((counts + block_rows - 1) // block_rows, MIN_ENTRIES)
    entries = tl.where(experts < num_experts, entries, 0)
    first_entry = tl.sum(tl.where(experts < expert, entries, 0), axis=0)
    count = tl.sum(tl.where(experts == expert, entries, 0), axis=0)
    first_row = tl.sum(tl.where(experts == expert, starts, 0), axis=0)
    end_row = first_row + tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    for first in tl.range(0, count, BLOCK_ENTRIES):
        own = first + tl.arange(0, BLOCK_ENTRIES)
        mask = own < count
        out_ptrs = table_ptr + first_entry + own
        tl.store(out_ptrs, own * 0 + expert, mask=mask)
        tl.store(out_ptrs + capacity, first_row + own * block_rows, mask=mask)
        tl.store(out_ptrs + 2 * capacity, tl.minimum(first_row + (own + 1) * block_rows, end_row), mask=mask)
    if expert == 0:
        tl.store(table_ptr + 3 * capacity, tl.sum(entries, axis=0))
        tl.store(table_ptr + 3 * capacity + 1, 0)


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, bins_ptr, counts_ptr, num_tokens, num_experts, slots_per_block,
    TOP_K: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    num_slots = num_tokens * TOP_K  # a multiple of K: loads and stores stay wide, whatever the number of tokens
    first_slot = tl.program_id(0) * slots_per_block
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for first in tl.range(0, slots_per_block, STEP):
        slots = first_slot + first + tl.arange(0, STEP)
        ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=0)
        bins = tl.where((ids < 0) | (ids > num_experts), num_experts, ids).to(tl.int32)
        bins = tl.where(slots < num_slots, bins, num_experts + 1)
        tl.store(bins_ptr + slots, bins)
        counts += tl.histogram(bins, BINS)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "tiles_capacity", "chunks_capacity"])
def _place_kernel(  # type: ignore[no-untyped-def]
    bins_ptr, counts_ptr, slot_of_row_ptr, row_of_slot_ptr, token_of_row_ptr, row_fence_ptr, tiles_ptr, chunks_ptr,
    num_tokens, num_experts, slots_per_block, num_blocks, tiles_capacity, chunks_capacity,
    TOP_K: tl.constexpr, BINS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, OTHERS: tl.constexpr,
    BLOCK_B: tl.constexpr, TILE_ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    block, all_bins = tl.program_id(0), tl.arange(0, BINS)
    totals, befores = tl.zeros((BLOCK_B, BINS), dtype=tl.int32), tl.zeros((BLOCK_B, BINS), dtype=tl.int32)
    for first in tl.range(0, num_blocks, BLOCK_B):
        blocks = first + tl.arange(0, BLOCK_B)[:, None]
        counts = tl.load(counts_ptr + blocks * BINS + all_bins[None, :], mask=blocks < num_blocks, other=0)
        totals += counts
        befores += tl.where(blocks < block, counts, 0)
    total = tl.sum(totals, axis=0)
    start = tl.cumsum(total, axis=0) - total
    if tiles_ptr is not None and block >= num_blocks:  # one of the programs that cut an expert's rows
        write_entries(tiles_ptr, tiles_capacity, start, total, block - num_blocks, num_experts, TILE_ROWS, 0)
        write_entries(chunks_ptr, chunks_capacity, start, total, block - num_blocks, num_experts, CHUNK_ROWS, 1)
        return
    if block == 0:
        tl.store(row_fence_ptr + all_bins, start, mask=all_bins <= num_experts)
    next_row = start + tl.sum(befores, axis=0)
    own = tl.arange(0, GROUPS * TILE)
    tile, lane = own // TILE, own % TILE
    for first in tl.range(0, slots_per_block, GROUPS * TILE):
        first_slot = block * slots_per_block + first
        slots = first_slot + own
        bins = tl.load(bins_ptr + slots)
        counts = tl.reshape(tl.histogram(tile * BINS + bins, GROUPS * BINS), (GROUPS, BINS))
        first_rows = next_row[None, :] + tl.cumsum(counts, axis=0) - counts
        rows = tl.gather(tl.reshape(first_rows, (GROUPS * BINS,)), tile * BINS + bins, axis=0)
        for first_other in tl.range(0, TILE, OTHERS):
            others = first_other + tl.arange(0, OTHERS)[:, None]
            other_bins = tl.load(bins_ptr + (first_slot + tile * TILE)[None, :] + others)
            rows += tl.sum(((other_bins == bins[None, :]) & (others < lane[None, :])).to(tl.int32), axis=0)
        mask = slots < num_tokens * TOP_K
        tl.store(row_of_slot_ptr + slots, rows.to(tl.int64), mask=mask)
        tl.store(slot_of_row_ptr + rows, slots.to(tl.int64), mask=mask)
        tl.store(token_of_row_ptr + rows, (slots // TOP_K).to(tl.int64), mask=mask)
        next_row += tl.sum(counts, axis=0)


_count, _place = Launcher(_count_kernel), Launcher(_place_kernel)


def sort_slots(expert_ids_TK: Tensor, num_experts: int) -> SortedSlots:
    """Sort the T * K slots by expert, stable. expert_ids_TK: [T, K] integer, any strides."""
    sort = _sort_op if torch.compiler.is_compiling() else _sort
    rows_3S, fence_F = sort(expert_ids_TK, num_experts)
    return _as_slots(rows_3S, fence_F)


def _as_slots(rows_3S: Tensor, fence_F: Tensor) -> SortedSlots:
    slot_of_row_S, row_of_slot_S, token_of_row_S = rows_3S.unbind()
    return SortedSlots(slot_of_row_S, row_of_slot_S, token_of_row_S, fence_F)


def _empty_rows(expert_ids_TK: Tensor) -> Tensor:
    """[3, S] int64, each row aligned to 16 bytes."""
    num_slots = expert_ids_TK.numel()
    return expert_ids_TK.new_empty(3, num_slots + num_slots % 2, dtype=torch.int64)[:, :num_slots]


def _sort(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """slot_of_row, row_of_slot, token_of_row as one tensor [3, S], and the fence [E + 1]."""
    rows_3S = _empty_rows(expert_ids_TK)
    fence_F = torch.empty(num_experts + 1, device=expert_ids_TK.device, dtype=torch.int32)
    _launch_sort(expert_ids_TK, _as_slots(rows_3S, fence_F), None)
    return rows_3S, fence_F


def _launch_sort(expert_ids_TK: Tensor, out: SortedSlots, tables: RowTables | None) -> None:
    (num_tokens, top_k), fence_F = expert_ids_TK.shape, out.row_fence_F
    num_experts = fence_F.shape[0] - 1
    num_slots = num_tokens * top_k
    bins = next_power_of_2(num_experts + 2)
    groups = max(1, min(MAX_GROUPS, MAX_GROUP_BINS // bins))
    step = groups * TILE
    slots_per_block = step * max(1, cdiv(num_slots, step * MAX_BLOCKS))
    num_blocks = max(1, cdiv(num_slots, slots_per_block))
    counts = fence_F.new_empty(num_blocks, bins)
    bins_S = fence_F.new_empty(num_blocks * slots_per_block)
    ids_S = expert_ids_TK.reshape(-1)
    cut: tuple[Tensor | int | None, ...] = (None, None, 0, 0, 0, 0)
    num_programs = num_blocks
    if tables is not None:
        tiles, chunks = tables.tiles, tables.chunks
        cut = (
            tiles.entries_4M, chunks.entries_4M, tiles.capacity, chunks.capacity, tiles.block_rows, chunks.block_rows
        )  # fmt: skip
        num_programs += num_experts

    def launch() -> None:
        _count(
            (num_blocks,), ids_S, bins_S, counts, num_tokens, num_experts, slots_per_block, top_k, bins, step,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        _place(
            (num_programs,), bins_S, counts, *out, *cut[:2], num_tokens, num_experts, slots_per_block,
            num_blocks, *cut[2:4], top_k, bins, groups, TILE, OTHERS,
            max(1, min(32, MAX_COUNTS // bins)), *cut[4:], num_warps=NUM_WARPS,
        )  # fmt: skip

    with torch.cuda.device_of(expert_ids_TK):  # Triton launches on the current device
        if is_first(_count, expert_ids_TK.device, expert_ids_TK.dtype, top_k, num_experts, *cut[4:]):
            with compile_only():
                launch()
        launch()


def sort_and_cut(
    expert_ids_TK: Tensor, num_experts: int, tile_rows: int, chunk_rows: int
) -> tuple[SortedSlots, RowTables]:
    """The sort, and each expert's rows cut into tiles and into chunks, in the same two launches."""
    rows_3S = _empty_rows(expert_ids_TK)
    fence_F = torch.empty(num_experts + 1, device=expert_ids_TK.device, dtype=torch.int32)
    tables = empty_row_tables(fence_F, expert_ids_TK.numel(), tile_rows, chunk_rows)
    rows = _as_slots(rows_3S, fence_F)
    _launch_sort(expert_ids_TK, rows, tables)
    return rows, tables


@torch.library.custom_op("expertune::sort_slots", mutates_args=())
def _sort_op(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The sort for torch.compile, which traces it as one op."""
    return _sort(expert_ids_TK, num_experts)


@_sort_op.register_fake
def _(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return _empty_rows(expert_ids_TK), expert_ids_TK.new_empty(num_experts + 1, dtype=torch.int32)
