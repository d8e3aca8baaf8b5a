"""Which tile a projection runs with: a table, so that the first step of a new shape costs compilation only.

The first row of `TILES` that knows the GPU, the dtype and the shape class, and whose tile fits the shared memory of a
multiprocessor, decides. Nothing is measured here; `expertune tune` measures, and hands its result to the call.
"""

from dataclasses import dataclass
from functools import cache

import torch

from expertune.ops.integers import next_power_of_2
from expertune.ops.records import gpu_facts

MIN_RANK = 16  # a tensor-core product takes no fewer
HOPPER_TILE = (128, 256, 64)  # rows, columns and step of the kernel in `hopper`
HOPPER_STAGES = 4  # with the result's left half, all of an SM's shared memory; 3 and the whole result lose 4 %
_BARRIER_BYTES = 256  # of the pipeline, beside the buffers; 8 to 48 in what Triton 3.6 compiles


@dataclass(frozen=True)
class LinearTile:
    """The tile of one launch.

    rows x columns of the result, k_step along the sum; num_warps, num_stages: Triton's. programs_per_sm: persistent
    programs on each multiprocessor. descriptors: whether tensor descriptors may be used where operands are aligned.
    halves: whether a row tile that is at most half full is computed as half a tile.
    hopper: whether the kernel of `hopper`, which has its own warps, stages and descriptors for this tile, runs where it
    takes the operands; the others decide about what it does not take.
    """

    rows: int = 128
    columns: int = 256
    k_step: int = 64
    num_warps: int = 8
    num_stages: int = 3
    programs_per_sm: int = 1
    descriptors: bool = True
    halves: bool = False
    hopper: bool = False

    def __post_init__(self) -> None:
        if self.hopper and (self.rows, self.columns, self.k_step) != HOPPER_TILE:
            raise ValueError(f"hopper: its tile is {HOPPER_TILE}, got {(self.rows, self.columns, self.k_step)}")

    def shared_memory_bytes(self, item_bytes: int) -> int:
        """The shared memory that a program needs at most, with an adapter of any rank.

            num_stages (rows + columns) k_step b        the operands on their way, b = item_bytes
            or, after them, (rows + columns) 64 b       those of the adapter's step, where they are more
            + rows columns b                            the result on its way to a descriptor's store

        What Triton 3.6 compiles for Hopper and Blackwell (sm_90, sm_100) in 16 bits is this to within the barriers;
        sm_80, sm_86, sm_89 and sm_120 need less: fewer stages, and buffers that share.
        """
        operands = (self.rows + self.columns) * max(self.num_stages * self.k_step, 64)
        return (operands + self.rows * self.columns) * item_bytes + _BARRIER_BYTES


def pad_rank(rank: int) -> int:
    """R', the rank as the kernels have it: padded with zeros to a power of two, from MIN_RANK on."""
    return max(MIN_RANK, next_power_of_2(rank))


@dataclass(frozen=True)
class RowsTile:
    """The tile of a kernel that reads rows once: rows x columns at a time; num_warps, num_stages: Triton's."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 3


@dataclass(frozen=True)
class TileRow:
    """One row of the table.

    capability: the GPU's, from this on. item_bytes: of the dtype, 2 (bf16, fp16) or 4 (fp32). tile: what to run.
    measured: where that comes from: GPU, model, figures; or that it is not measured.
    max_rows_per_expert: the mean, up to and including this; None for any.
    """

    capability: tuple[int, int]
    item_bytes: int
    tile: LinearTile
    measured: str
    max_rows_per_expert: int | None = None

    def covers(self, num_rows: int, num_experts: int) -> bool:
        """Whether a call is of this row's shape class."""
        most = self.max_rows_per_expert
        return most is None or num_rows <= most * num_experts


TILES = (
    TileRow(
        (9, 0),
        2,
        LinearTile(halves=True, hopper=True),
        "H200, bf16, rank 16. Qwen3-30B-A3B, 1024 tokens: four products 651 us, 677 without hopper; a step without it "
        "1.017 ms, 64x256 1.022, 64x128 1.04 to 1.17",
        max_rows_per_expert=128,
    ),
    TileRow(
        (9, 0),
        2,
        LinearTile(halves=True, hopper=True),
        "H200, bf16, rank 16, four products with and without hopper: Qwen3-30B-A3B, 8192 tokens 1942 and 2099 us, "
        "32768 tokens 7647 and 8130, GLM-4.5-Air 7517 and 8246, Mixtral-8x7B 17037 and 17390. Without it, the up "
        "projection at 8192 tokens: 746 us, 64x256 twice on a multiprocessor 936, 128x128 1192, 256x128 982, k_step 32 "
        "with 5 or 6 stages 757 to 779; four products with and without halves: Qwen3-30B-A3B 2036 and 2124 us, "
        "GLM-4.5-Air 7709 and 7724, gpt-oss-20b 4874 and 4922",
    ),
    TileRow(
        (8, 0),
        2,
        LinearTile(columns=128, k_step=32, descriptors=False),
        "not measured; fits the 99 KiB of sm_86, sm_89 and sm_120",
    ),
    TileRow(
        (0, 0),
        2,
        LinearTile(rows=64, columns=64, k_step=32, num_warps=4, num_stages=2, descriptors=False),
        "not measured; fits any GPU's 48 KiB",
    ),
    TileRow(
        (0, 0),
        4,
        LinearTile(rows=64, columns=64, k_step=32, num_warps=4),
        "not measured: fp32 is for checking results",
    ),
    TileRow(
        (0, 0),
        4,
        LinearTile(rows=32, columns=32, k_step=32, num_warps=4, num_stages=2, descriptors=False),
        "not measured; fits any GPU's 48 KiB",
    ),
)
"""First match first."""


def pick_tile(num_rows: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> LinearTile:
    """The tile for a call, from the table.

    num_rows: S, over all experts. Raises ValueError where no tile fits. A CPU, where Triton's interpreter runs, has no
    limits and gets what the newest GPU gets.
    """
    return find_tile(_rows_of(device, dtype.itemsize), num_rows, num_experts)


def fitting_rows(
    capability: tuple[int, int] | None, shared_memory_bytes: int | None, item_bytes: int
) -> tuple[TileRow, ...]:
    """The rows of the table that can run, in order.

    capability: of the GPU. shared_memory_bytes: the most that one of its programs can have. None: no limit.
    """
    return tuple(
        row
        for row in TILES
        if row.item_bytes == item_bytes
        and (capability is None or row.capability <= capability)
        and (shared_memory_bytes is None or row.tile.shared_memory_bytes(item_bytes) <= shared_memory_bytes)
    )


def find_tile(rows: tuple[TileRow, ...], num_rows: int, num_experts: int) -> LinearTile:
    """The tile of the first row that covers a shape; raises ValueError if none does."""
    for row in rows:
        if row.covers(num_rows, num_experts):
            return row.tile
    raise ValueError("device, dtype: the table of tiles has no row that fits this GPU's shared memory and this dtype")


@cache
def _rows_of(device: torch.device, item_bytes: int) -> tuple[TileRow, ...]:
    gpu = gpu_facts(device)
    if gpu is None:
        return fitting_rows(None, None, item_bytes)
    return fitting_rows(torch.cuda.get_device_capability(device), gpu.shared_memory_bytes, item_bytes)


# Of `gate_hopper`. H200, Qwen3-30B-A3B, 8192 tokens; in brackets the separate kernels
FORWARD_TILE = RowsTile(64, 128, num_warps=8)  # rank 16: 85 us (104), 32: 87 (104); 64 x 64 88, 90
WIDE_FORWARD_TILE = RowsTile(64, 64, num_warps=8)  # rank 64: 105 us (109); 64 x 128 119
BACKWARD_TILE = RowsTile(16, 128, num_warps=4)  # rank 16: 155 us (241), 32: 179 (253); 32 x 64 170, 208
WIDE_BACKWARD_TILE = RowsTile(32, 64, num_warps=4)  # rank 64: 230 us (265); 16 x 64 280
ONE_PASS_RANK = 64  # padded, the highest that it takes; what is called wide


def fits_one_pass(h_SJ: torch.Tensor, *padded_ranks: int) -> bool:
    """Whether SwiGLU can do the adapters' work in its pass on Hopper: 16 bits, I a multiple of 16, R' at most 64."""
    num_rows, num_columns = h_SJ.shape
    is_16_bit = h_SJ.dtype in (torch.bfloat16, torch.float16)
    return is_16_bit and num_rows > 0 and num_columns % 32 == 0 and max(padded_ranks) <= ONE_PASS_RANK


def pick_forward_tile(padded_rank: int) -> RowsTile:
    """padded_rank: of the down projection's adapter."""
    return FORWARD_TILE if padded_rank < ONE_PASS_RANK else WIDE_FORWARD_TILE


def pick_backward_tile(padded_rank: int) -> RowsTile:
    """padded_rank: the larger one of the two adapters."""
    return BACKWARD_TILE if padded_rank < ONE_PASS_RANK else WIDE_BACKWARD_TILE
