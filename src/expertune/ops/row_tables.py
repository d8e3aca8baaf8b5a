"""Tables of row blocks: which expert and which rows a program works on, so that no kernel searches or waits.

An expert with n rows gets ceil(n / block) entries of `block` rows, the last one shorter. How many entries there are
depends on the routing and stays on the device: kernels read it there, so no host synchronisation is needed. Two tables
come together: tiles for kernels that own rows, and chunks for kernels that sum over the rows of an expert (there an
expert without rows gets one empty chunk, so that its sum is written, as zeros).

The sort of a plan writes them in passing (`counting_sort.sort_and_cut`); `scattermoe.tiles` for a plan without them.
No Triton here: a plan can hold tables where it is not installed.
"""

from dataclasses import dataclass, field

from torch import Tensor

from expertune.ops.integers import cdiv

CHUNK_ROWS = 1024  # rows of one expert that one program sums; an expert with more is shared among programs


@dataclass(frozen=True)
class RowTable:
    """Blocks of rows, none crossing from one expert to the next.

    block_rows: rows in a full entry. entries_4M: [4, M] int32, of which the first `entries_4M[3, 0]` columns are used:
    expert, first row, end row. M is enough for any routing. `entries_4M[3, 1]` is a counter that kernels bring back to
    zero: one of them at a time may use a table, as on one stream.
    """

    block_rows: int
    entries_4M: Tensor
    _zeros: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def capacity(self) -> int:
        """M, the most entries that any routing can need."""
        return self.entries_4M.shape[1]

    def counters(self, count: int) -> Tensor:
        """[count or more] int32 zeros, for the programs of one launch at a time, which leave them as they were."""
        if not self._zeros or self._zeros[-1].shape[0] < count:
            self._zeros[:] = [self.entries_4M.new_zeros(count)]
        return self._zeros[-1]

    def num_parts(self, num_rows: int) -> int:
        """For how many chunks there must be room to keep their sums apart: 0 if no expert can have several."""
        return self.capacity if num_rows > self.block_rows else 0

    @property
    def count_1(self) -> Tensor:
        """[1] int32, how many entries are used."""
        return self.entries_4M[3, :1]


@dataclass(frozen=True)
class RowTables:
    """tiles: for kernels that own rows. chunks: for kernels that sum over an expert's rows."""

    tiles: RowTable
    chunks: RowTable


def empty_row_tables(fence_F: Tensor, num_rows: int, tile_rows: int, chunk_rows: int) -> RowTables:
    """Room for the tables of `num_rows` rows, on the fence's device."""
    num_experts = fence_F.shape[0] - 1
    tiles, chunks = (
        RowTable(rows, fence_F.new_empty(4, max(2, cdiv(num_rows, rows) + num_experts)))
        for rows in (tile_rows, chunk_rows)
    )
    return RowTables(tiles, chunks)
