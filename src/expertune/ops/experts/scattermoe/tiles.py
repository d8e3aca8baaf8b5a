"""Row tables (`ops.row_tables`) as kernels read them: in a plan's own two launches, or one more for a plan without."""

import triton
import triton.language as tl

from expertune.ops.counting_sort import write_entries
from expertune.ops.integers import next_power_of_2
from expertune.ops.plan import ExpertPlan
from expertune.ops.row_tables import CHUNK_ROWS, RowTable, RowTables, empty_row_tables
from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

__all__ = ["CHUNK_ROWS", "RowTable", "RowTables", "build_row_tables", "load_entry", "num_entries"]


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
    TILE_ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    expert, experts = tl.program_id(0), tl.arange(0, BLOCK_E)
    starts = tl.load(row_fence_ptr + experts, mask=experts < num_experts, other=0)
    counts = tl.load(row_fence_ptr + experts + 1, mask=experts < num_experts, other=0) - starts
    if tl.program_id(1) == 0:
        write_entries(tiles_ptr, tiles_capacity, starts, counts, expert, num_experts, TILE_ROWS, 0)
    else:
        write_entries(chunks_ptr, chunks_capacity, starts, counts, expert, num_experts, CHUNK_ROWS, 1)


_row_tables = Launcher(_row_tables_kernel)


def build_row_tables(plan: ExpertPlan, block_rows: int, chunk_rows: int = CHUNK_ROWS) -> RowTables:
    """Cut the rows of each expert into tiles and into chunks, in one launch. Sentinel rows are in none.

    block_rows, chunk_rows: rows of a tile and of a chunk. The plan's own tables, if it has them with so many rows.
    """
    own = plan.tables
    if own is not None and (own.tiles.block_rows, own.chunks.block_rows) == (block_rows, chunk_rows):
        return own
    tables = empty_row_tables(plan.row_fence_F, plan.num_rows, block_rows, chunk_rows)
    tiles, chunks = tables.tiles, tables.chunks
    _row_tables(
        (plan.num_experts, 2), plan.row_fence_F, tiles.entries_4M, tiles.capacity, chunks.entries_4M, chunks.capacity,
        plan.num_experts, block_rows, chunk_rows, next_power_of_2(plan.num_experts),
    )  # fmt: skip
    return tables
