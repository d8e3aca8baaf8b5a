"""The plan: which (token, expert) pair goes to which row, computed once and shared by every kernel.

A router gives each of T tokens K expert ids. Kernels want the S = T * K pairs sorted by expert, so that the rows of an
expert are one contiguous block. `build_plan` sorts them (stable: within an expert, tokens stay in order), without a
host synchronisation:

    expert ids [T=3, K=2]        slots 0..5 sorted by expert         rows of expert e: row_fence[e] .. row_fence[e + 1]
    token 0: 1 0                 expert 0: slot 1        (token 0)   row_fence = [0, 1, 3, 6]
    token 1: 2 1                 expert 1: slots 0, 3    (tokens 0, 1)
    token 2: 2 2                 expert 2: slots 2, 4, 5 (tokens 1, 2, 2)
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from expertune.ops.row_tables import RowTables


@dataclass(frozen=True)
class ExpertPlan:
    """The order of S = T * K routed rows, sorted by expert.

    num_tokens: T. top_k: K. num_experts: E.
    slot_of_row_S: [S] int64, the flat position `token * K + k` that row s serves.
    row_of_slot_S: [T K] int64, the inverse permutation; for a sentinel's slot a row from `row_fence_F[E]` on.
    token_of_row_S: [S] int64, `slot_of_row_S // K`: the gather index of x.
    row_fence_F: [E + 1] int32, rows of expert e are `row_fence_F[e] : row_fence_F[e + 1]`.
    has_sentinels: rows from `row_fence_F[E]` on may exist; they belong to another rank and contribute nothing. Where
        their number was known (`num_live_rows` of `build_plan`) S does not count them, and they cost no memory.
    tables: the rows cut into tiles and chunks, if they were asked for; kernels that need others build them.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    slot_of_row_S: Tensor
    row_of_slot_S: Tensor
    token_of_row_S: Tensor
    row_fence_F: Tensor
    has_sentinels: bool
    tables: RowTables | None = None

    @property
    def num_rows(self) -> int:
        """S, counting sentinel rows unless they were cut off."""
        return self.slot_of_row_S.shape[0]

    @property
    def row_ends_E(self) -> Tensor:
        """[E] int32, one past the last row of each expert: the `offs` of torch's grouped_mm."""
        return self.row_fence_F[1:]

    def expert_of_row(self) -> Tensor:
        """[S] int64, the expert of each row; sentinel rows say E - 1 so that a gather stays in bounds."""
        rows_S = torch.arange(self.num_rows, device=self.row_fence_F.device, dtype=torch.int32)
        return torch.searchsorted(self.row_ends_E, rows_S, right=True).clamp_(max=self.num_experts - 1)

    def to_slots(self, rows_SX: Tensor) -> Tensor:
        """Rows [S, ...] in slot order, [T K, ...]; zero for sentinels whose rows were cut off."""
        num_slots = self.row_of_slot_S.shape[0]
        if self.num_rows == num_slots:
            return rows_SX[self.row_of_slot_S]
        if not self.num_rows:
            return rows_SX.new_zeros(num_slots, *rows_SX.shape[1:])
        slots = rows_SX[self.row_of_slot_S.clamp(max=self.num_rows - 1)]
        cut = (self.row_of_slot_S >= self.num_rows).view(-1, *[1] * (rows_SX.dim() - 1))
        return slots.masked_fill(cut, 0)

    def sentinel_rows(self) -> Tensor:
        """[S, 1] bool, true where a row belongs to no local expert."""
        rows_S = torch.arange(self.num_rows, device=self.row_fence_F.device, dtype=torch.int32)
        return (rows_S >= self.row_fence_F[-1]).unsqueeze(-1)


def build_plan(
    expert_ids_TK: Tensor,
    num_experts: int,
    *,
    sentinels: bool = False,
    num_live_rows: int | None = None,
    table_rows: tuple[int, int] | None = None,
) -> ExpertPlan:
    """Sort the (token, expert) pairs of a routing decision by expert.

    expert_ids_TK: [T, K] integer, the experts of each token; any strides, T may be 0.
    num_experts: E, the number of local experts.
    sentinels: ids below 0 or from E on are allowed and mark rows of another rank. Without it such an id is an error,
        which is checked where looking costs no synchronisation (on the CPU, outside torch.compile).
    num_live_rows: how many ids are no sentinels, where the caller knows it: sentinels' rows are then cut off.
    table_rows: rows of a tile and of a chunk, where the sort on a GPU shall write these tables too (`row_tables`); in
        vain on the CPU and under torch.compile, where the kernels that need tables build them.
    Deterministic: the sort is stable. On a GPU with Triton it is two launches (`counting_sort`).
    Raises ValueError on a wrong shape or dtype, or on an id out of range.
    """
    if expert_ids_TK.dim() != 2 or expert_ids_TK.shape[1] < 1:
        raise ValueError(f"expert_ids_TK: got shape {tuple(expert_ids_TK.shape)}, need [tokens, experts per token]")
    if expert_ids_TK.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expert_ids_TK: got dtype {expert_ids_TK.dtype}, need int64 or int32")
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, need at least 1")
    num_tokens, top_k = expert_ids_TK.shape
    compiling = torch.compiler.is_compiling()
    if expert_ids_TK.is_cuda and (compiling or has_triton()):  # torch.compile on a GPU has Triton, and cannot ask
        return _by_counting(
            expert_ids_TK, num_experts, sentinels=sentinels, num_live_rows=num_live_rows, table_rows=table_rows
        )
    ids_S = expert_ids_TK.reshape(-1)
    if sentinels:
        ids_S = torch.where(ids_S < 0, num_experts, ids_S)
    elif not compiling and ids_S.device.type == "cpu" and ids_S.numel() and not _in_range(ids_S, num_experts):
        raise ValueError(
            f"expert_ids_TK: ids span {int(ids_S.min())} to {int(ids_S.max())}, need 0 to {num_experts - 1} "
            "(pass sentinels=True if ids out of range mark rows of another rank)"
        )
    if num_experts < torch.iinfo(torch.int16).max:
        ids_S = ids_S.clamp(max=num_experts).to(torch.int16)  # a radix sort of two passes instead of eight
    sorted_ids_S, slot_of_row_S = torch.sort(ids_S, stable=True)
    experts_F = torch.arange(num_experts + 1, device=ids_S.device, dtype=ids_S.dtype)
    row_of_slot_S = torch.empty_like(slot_of_row_S)
    row_of_slot_S[slot_of_row_S] = torch.arange(slot_of_row_S.numel(), device=ids_S.device)
    return ExpertPlan(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        slot_of_row_S=slot_of_row_S[:num_live_rows],
        row_of_slot_S=row_of_slot_S,
        token_of_row_S=slot_of_row_S[:num_live_rows] // top_k,
        row_fence_F=torch.searchsorted(sorted_ids_S, experts_F, out_int32=True),
        has_sentinels=sentinels,
    )


def _by_counting(
    expert_ids_TK: Tensor,
    num_experts: int,
    *,
    sentinels: bool,
    num_live_rows: int | None = None,
    table_rows: tuple[int, int] | None = None,
) -> ExpertPlan:
    """The two launches."""
    from expertune.ops.counting_sort import sort_and_cut, sort_slots

    (num_tokens, top_k), tables = expert_ids_TK.shape, None
    if table_rows is not None and not torch.compiler.is_compiling():
        rows, tables = sort_and_cut(expert_ids_TK, num_experts, *table_rows)
    else:
        rows = sort_slots(expert_ids_TK, num_experts)
    slot_of_row_S, row_of_slot_S, token_of_row_S, row_fence_F = rows
    if num_live_rows is not None:
        slot_of_row_S, token_of_row_S = slot_of_row_S[:num_live_rows], token_of_row_S[:num_live_rows]
    return ExpertPlan(
        num_tokens, top_k, num_experts, slot_of_row_S, row_of_slot_S, token_of_row_S, row_fence_F,
        has_sentinels=sentinels, tables=tables,
    )  # fmt: skip


def _in_range(ids_S: Tensor, num_experts: int) -> bool:
    return 0 <= int(ids_S.min()) <= int(ids_S.max()) < num_experts


@cache
def has_triton() -> bool:
    """Whether Triton is installed; asked without importing it."""
    return find_spec("triton") is not None
