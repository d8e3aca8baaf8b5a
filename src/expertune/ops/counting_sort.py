"""The plan's sort on a GPU: a stable counting sort in two launches, without a host synchronisation.

    row of slot i = (slots of smaller experts) + (slots of the same expert before i)

Launch 1 counts the experts of each block of slots; launch 2 adds up the counts of the blocks before its own, and ranks
the slots inside its block. torch.sort and what goes with it are a dozen launches (H200, 65536 slots: 45 us, these 28).
An id that is no expert (below 0 or from E on) goes past the last expert, so that nothing is written out of bounds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

MAX_BLOCKS = 128  # of slots: each reads the counts of all, so their number is bounded and their size grows
TILE = 128  # slots compared with each other at once


class SortedSlots(NamedTuple):
    """slot_of_row_S, row_of_slot_S, token_of_row_S: [S] int64. row_fence_F: [E + 1] int32. See `ExpertPlan`."""

    slot_of_row_S: Tensor
    row_of_slot_S: Tensor
    token_of_row_S: Tensor
    row_fence_F: Tensor


@triton.jit
def _load_bins(ids_ptr, slots, num_slots, num_experts):  # type: ignore[no-untyped-def]
    """The bin of each slot: its expert, E if the id is no expert, E + 1 past the last slot."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=0).to(tl.int32)
    ids = tl.where((ids < 0) | (ids > num_experts), num_experts, ids)
    return tl.where(slots < num_slots, ids, num_experts + 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, counts_ptr, num_tokens, num_experts, slots_per_block,
    TOP_K: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    num_slots = num_tokens * TOP_K  # a multiple of K: loads and stores stay wide, whatever the number of tokens
    block = tl.program_id(0)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for first in tl.range(0, slots_per_block, TILE):
        slots = block * slots_per_block + first + tl.arange(0, TILE)
        counts += tl.histogram(_load_bins(ids_ptr, slots, num_slots, num_experts), BINS)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _place_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, counts_ptr, slot_of_row_ptr, row_of_slot_ptr, token_of_row_ptr, row_fence_ptr,
    num_tokens, num_experts, slots_per_block, num_blocks,
    TOP_K: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    num_slots = num_tokens * TOP_K
    block = tl.program_id(0)
    bins, lanes = tl.arange(0, BINS), tl.arange(0, TILE)
    before, total = tl.zeros((BINS,), dtype=tl.int32), tl.zeros((BINS,), dtype=tl.int32)
    for first in tl.range(0, num_blocks, BLOCK_B):
        blocks = first + tl.arange(0, BLOCK_B)
        count_ptrs = counts_ptr + blocks[:, None] * BINS + bins[None, :]
        counts = tl.load(count_ptrs, mask=(blocks < num_blocks)[:, None], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((blocks < block)[:, None], counts, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    if block == 0:
        tl.store(row_fence_ptr + bins, start, mask=bins <= num_experts)
    next_row = start + before
    for first in tl.range(0, slots_per_block, TILE):
        first_slot = block * slots_per_block + first
        slots = first_slot + lanes
        ids = _load_bins(ids_ptr, slots, num_slots, num_experts)
        earlier = (ids[:, None] == ids[None, :]) & (lanes[None, :] < lanes[:, None])
        rows = tl.gather(next_row, ids, axis=0) + tl.sum(earlier.to(tl.int32), axis=1)
        mask = slots < num_slots
        tl.store(row_of_slot_ptr + slots, rows.to(tl.int64), mask=mask)
        tl.store(slot_of_row_ptr + rows, slots.to(tl.int64), mask=mask)
        tl.store(token_of_row_ptr + rows, (slots // TOP_K).to(tl.int64), mask=mask)
        next_row += tl.histogram(ids, BINS)


_count, _place = Launcher(_count_kernel), Launcher(_place_kernel)


def sort_slots(expert_ids_TK: Tensor, num_experts: int) -> SortedSlots:
    """Sort the T * K slots by expert, stable. expert_ids_TK: [T, K] integer, any strides."""
    sort = _sort_op if torch.compiler.is_compiling() else _sort
    rows_3S, fence_F = sort(expert_ids_TK, num_experts)
    return SortedSlots(rows_3S[0], rows_3S[1], rows_3S[2], fence_F)


def _empty_rows(expert_ids_TK: Tensor) -> Tensor:
    """[3, S] int64, each row aligned to 16 bytes."""
    num_slots = expert_ids_TK.numel()
    return expert_ids_TK.new_empty(3, num_slots + num_slots % 2, dtype=torch.int64)[:, :num_slots]


def _sort(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """slot_of_row, row_of_slot, token_of_row as one tensor [3, S], and the fence [E + 1]."""
    (num_tokens, top_k), device = expert_ids_TK.shape, expert_ids_TK.device
    num_slots = num_tokens * top_k
    bins = triton.next_power_of_2(num_experts + 2)
    slots_per_block = TILE * triton.cdiv(num_slots, TILE * MAX_BLOCKS)
    num_blocks = max(1, triton.cdiv(num_slots, max(slots_per_block, 1)))
    rows_3S = _empty_rows(expert_ids_TK)
    fence_F = torch.empty(num_experts + 1, device=device, dtype=torch.int32)
    counts = torch.empty(num_blocks, bins, device=device, dtype=torch.int32)
    ids_S = expert_ids_TK.reshape(-1)
    with torch.cuda.device_of(expert_ids_TK):  # Triton launches on the current device
        _count(
            (num_blocks,), ids_S, counts, num_tokens, num_experts, slots_per_block, top_k, bins, TILE, num_warps=8
        )  # fmt: skip
        _place(
            (num_blocks,), ids_S, counts, rows_3S[0], rows_3S[1], rows_3S[2], fence_F, num_tokens, num_experts,
            slots_per_block, num_blocks, top_k, bins, TILE, max(1, min(32, 8192 // bins)), num_warps=8,
        )  # fmt: skip
    return rows_3S, fence_F


@torch.library.custom_op("expertune::sort_slots", mutates_args=())
def _sort_op(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The sort for torch.compile, which traces it as one op."""
    return _sort(expert_ids_TK, num_experts)


@_sort_op.register_fake
def _(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return _empty_rows(expert_ids_TK), expert_ids_TK.new_empty(num_experts + 1, dtype=torch.int32)
