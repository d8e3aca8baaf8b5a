"""Which expert and which rows a program works on: tables built on the device, so that no kernel searches or waits.

An expert with n rows gets ceil(n / block) entries of `block` rows, the last one shorter. How many entries there are
depends on the routing and stays on the device: kernels read it there, so no host synchronisation is needed. One launch
builds two tables: tiles for kernels that own rows, and chunks for kernels that sum over the rows of an expert (there an
expert without rows gets one empty chunk, so that its sum is written, as zeros).
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.integers import next_power_of_2
from expertune.ops.plan import ExpertPlan
from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

CHUNK_ROWS = 1024  # rows of one expert that one program sums; an expert with more is shared among programs
BLOCK_ENTRIES = 128  # entries of one expert written at a time


@dataclass(frozen=True)
class RowTable:
    """Blocks of rows, none crossing from one expert to the next.

    block_rows: rows in a full entry. entries_4M: [4, M] int32, of which the first `entries_4M[3, 0]` columns are used:
    expert, first row, end row. M is enough for any routing.
    """

    block_rows: int
    entries_4M: Tensor

    @property
    def capacity(self) -> int:
        """M, the most entries that any routing can need."""
        return self.entries_4M.shape[1]

    @property
    def count_1(self) -> Tensor:
        """[1] int32, how many entries are used."""
        return self.entries_4M[3, :1]


@dataclass(frozen=True)
class RowTables:
    """tiles: for kernels that own rows. chunks: for kernels that sum over an expert's rows."""

    tiles: RowTable
    chunks: RowTable


@triton.jit
def num_entries(table_ptr, capacity):
    """How many entries of a row table are used."""
    return tl.load(table_ptr + 3 * capacity)


@triton.jit
def load_entry(table_ptr, capacity, entry):
    """(expert, first row, end row) of an entry of a row table."""
    expert = tl.load(table_ptr + entry)
    first_row = tl.load(table_ptr + capacity + entry)
    end_row = tl.load(table_ptr + 2 * capacity + entry)
    return expert, first_row, end_row


@triton.jit(do_not_specialize=["tiles_capacity", "chunks_capacity"])
def _row_tables_kernel(
    row_fence_ptr, tiles_ptr, tiles_capacity, chunks_ptr, chunks_capacity, num_experts,
    BLOCK_S: tl.constexpr, CHUNK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    expert, of_chunks = tl.program_id(0), tl.program_id(1)
    rows = tl.where(of_chunks == 1, CHUNK_S, BLOCK_S)
    capacity = tl.where(of_chunks == 1, chunks_capacity, tiles_capacity)
    experts = tl.arange(0, BLOCK_E)
    starts = tl.load(row_fence_ptr + experts, mask=experts < num_experts, other=0)
    ends = tl.load(row_fence_ptr + experts + 1, mask=experts < num_experts, other=0)
    counts_E = tl.maximum((ends - starts + rows - 1) // rows, tl.where(experts < num_experts, of_chunks, 0))
    first_entry = tl.sum(tl.where(experts < expert, counts_E, 0), axis=0)
    count = tl.sum(tl.where(experts == expert, counts_E, 0), axis=0)
    first_row, end_row = tl.load(row_fence_ptr + expert), tl.load(row_fence_ptr + expert + 1)
    if of_chunks == 1:  # noqa: SIM108 - Triton takes no conditional expression of pointers
        table_ptr = chunks_ptr
    else:
        table_ptr = tiles_ptr
    for start in tl.range(0, count, BLOCK_M):
        entries = start + tl.arange(0, BLOCK_M)
        mask = entries < count
        out_ptrs = table_ptr + first_entry + entries
        tl.store(out_ptrs, entries * 0 + expert, mask=mask)
        tl.store(out_ptrs + capacity, first_row + entries * rows, mask=mask)
        tl.store(out_ptrs + 2 * capacity, tl.minimum(first_row + (entries + 1) * rows, end_row), mask=mask)
    if expert == 0:
        tl.store(table_ptr + 3 * capacity, tl.sum(counts_E, axis=0))
        tl.store(table_ptr + 3 * capacity + 1, 0)


_row_tables = Launcher(_row_tables_kernel)


def build_row_tables(plan: ExpertPlan, block_rows: int, chunk_rows: int = CHUNK_ROWS) -> RowTables:
    """Cut the rows of each expert into tiles and into chunks, in one launch. Sentinel rows are in none.

    block_rows, chunk_rows: rows of a tile and of a chunk.
    """
    fence_F = plan.row_fence_F
    tiles, chunks = (
        RowTable(rows, fence_F.new_empty(4, max(2, -(-plan.num_rows // rows) + plan.num_experts)))
        for rows in (block_rows, chunk_rows)
    )
    _row_tables(
        (plan.num_experts, 2), fence_F, tiles.entries_4M, tiles.capacity, chunks.entries_4M, chunks.capacity,
        plan.num_experts, block_rows, chunk_rows, next_power_of_2(plan.num_experts), BLOCK_ENTRIES,
    )  # fmt: skip
    return RowTables(tiles, chunks)
