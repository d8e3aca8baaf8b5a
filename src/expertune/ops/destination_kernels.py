"""`destinations` by Triton: four launches for some thirty of torch's, which the host would feel in every layer.

    count   g_m of each possible row m = n T + t; of each process n, added up, its rows and its pairs
    torch   e_m = g_0 + ... + g_m
    place   where g_m, row e_m - 1 is of (t, n) and has t's experts and weights, and (t, n) has that row; else row M

A program has BLOCK_T tokens and goes through the processes. Sums are of integers: the same in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.destinations import Destinations
from expertune.ops.integers import cdiv, next_power_of_2
from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

BLOCK_TOKENS = 64


@triton.jit
def _load_ids(ids_ptr, num_tokens, TOP_K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tokens [BLOCK_T], whether they are there, expert ids [BLOCK_T, PADDED_K] with -1 beyond)."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    choices = tl.arange(0, PADDED_K)
    there = (tokens < num_tokens)[:, None] & (choices < TOP_K)[None, :]
    ids = tl.load(ids_ptr + tokens.to(tl.int64)[:, None] * TOP_K + choices[None, :], mask=there, other=-1)
    return tokens, tokens < num_tokens, ids


@triton.jit(do_not_specialize=["num_tokens"])
def _count_pairs_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, goes_ptr, counts_ptr, num_tokens, num_owners, num_local,
    TOP_K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    tokens, there, ids = _load_ids(ids_ptr, num_tokens, TOP_K, PADDED_K, BLOCK_T)
    for owner in range(num_owners):
        first = owner * num_local
        pairs = tl.sum(((ids >= first) & (ids < first + num_local)).to(tl.int32), axis=1)
        goes = (pairs > 0).to(tl.int32)
        tl.store(goes_ptr + owner * num_tokens + tokens, goes, mask=there)
        tl.atomic_add(counts_ptr + 2 * owner, tl.sum(goes, axis=0).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 2 * owner + 1, tl.sum(pairs, axis=0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "slot_ptr", "row_of_slot_ptr"])  # aligned only if M is even
def _place_rows_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, weights_ptr, goes_ptr, ends_ptr, token_ptr, slot_ptr, choices_ptr, row_of_slot_ptr, fence_ptr,
    num_tokens, num_owners, num_local, TOP_K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    tokens, there, ids = _load_ids(ids_ptr, num_tokens, TOP_K, PADDED_K, BLOCK_T)
    choices, num_most = tl.arange(0, PADDED_K), num_tokens * num_owners
    chosen = there[:, None] & (choices < TOP_K)[None, :]
    weights = tl.load(weights_ptr + tokens.to(tl.int64)[:, None] * TOP_K + choices[None, :], mask=chosen, other=0)
    weights = weights.to(tl.float32).to(tl.int32, bitcast=True)
    for owner in range(num_owners):
        places = owner * num_tokens + tokens
        goes = there & (tl.load(goes_ptr + places, mask=there, other=0) > 0)
        rows = (tl.load(ends_ptr + places, mask=there, other=0) - 1).to(tl.int64)
        slots = tokens.to(tl.int64) * num_owners + owner
        tl.store(token_ptr + rows, tokens.to(tl.int64), mask=goes)
        tl.store(slot_ptr + rows, slots, mask=goes)
        tl.store(row_of_slot_ptr + slots, tl.where(goes, rows, num_most), mask=there)
        local = ids - owner * num_local
        local = tl.where((local >= 0) & (local < num_local), local, -1).to(tl.int32)
        choice_ptrs = choices_ptr + rows[:, None] * (2 * TOP_K) + choices[None, :]
        tl.store(choice_ptrs, local, mask=goes[:, None] & chosen)
        tl.store(choice_ptrs + TOP_K, weights, mask=goes[:, None] & chosen)
    if tl.program_id(0) == 0:
        tl.store(fence_ptr, 0)
        tl.store(fence_ptr + 1, tl.load(ends_ptr + num_most - 1))


_count_pairs = Launcher(_count_pairs_kernel)
_place_rows = Launcher(_place_rows_kernel)


def launch_destinations(expert_ids_TK: Tensor, weights_TK: Tensor, num_owners: int, num_local: int) -> Destinations:
    """`find_destinations`; weights of at most 32 bits."""
    expert_ids_TK, weights_TK = expert_ids_TK.contiguous(), weights_TK.contiguous()
    (num_tokens, top_k), num_most = expert_ids_TK.shape, expert_ids_TK.shape[0] * num_owners
    counts_and_token = torch.zeros(2 * num_owners + num_most, dtype=torch.int64, device=expert_ids_TK.device)
    counts_N2, token_M = counts_and_token[: 2 * num_owners].view(-1, 2), counts_and_token[2 * num_owners :]
    slot_M, row_of_slot_M = counts_N2.new_empty(2, num_most)
    goes_M, choices_MX, fence_2 = (
        torch.empty(*shape, dtype=torch.int32, device=expert_ids_TK.device)
        for shape in ((num_most,), (num_most, 2 * top_k), (2,))
    )
    if not num_tokens:
        fence_2.zero_()
        return Destinations(token_M, slot_M, choices_MX, row_of_slot_M, counts_N2, fence_2)
    grid, padded = (cdiv(num_tokens, BLOCK_TOKENS),), next_power_of_2(top_k)
    sizes = (num_tokens, num_owners, num_local, top_k, padded, BLOCK_TOKENS)
    _count_pairs(grid, expert_ids_TK, goes_M, counts_N2, *sizes)
    ends_M = goes_M.cumsum(0, dtype=torch.int32)
    _place_rows(
        grid, expert_ids_TK, weights_TK, goes_M, ends_M, token_M, slot_M, choices_MX, row_of_slot_M, fence_2,
        *sizes,
    )  # fmt: skip
    return Destinations(token_M, slot_M, choices_MX, row_of_slot_M, counts_N2, fence_2)
