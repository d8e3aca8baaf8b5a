"""Which expert and which rows a program works on: a table of row tiles, so that a persistent kernel searches nothing.

An expert with n rows gets ceil(n / block) tiles of `block` rows; an expert without rows gets none. The number of tiles
depends on the routing and stays on the device: kernels read it there, so no host synchronisation is needed.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.plan import ExpertPlan

BLOCK_TILES = 128  # tiles of one expert written at a time


@dataclass(frozen=True)
class RowTiles:
    """The row tiles of a plan for one block size.

    block_rows: rows in a tile. expert_of_tile_M: [M] int32, M = ceil(S / block) + E is enough for any routing.
    first_row_of_tile_M: [M] int32. num_tiles_1: [1] int32, how many of the M are used.
    row_fence_F: the plan's, where each expert's rows end.
    """

    block_rows: int
    expert_of_tile_M: Tensor
    first_row_of_tile_M: Tensor
    num_tiles_1: Tensor
    row_fence_F: Tensor


@triton.jit
def _row_tiles_kernel(
    row_fence_ptr,
    expert_of_tile_ptr,
    first_row_of_tile_ptr,
    num_tiles_ptr,
    num_experts,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    starts = tl.load(row_fence_ptr + experts, mask=experts < num_experts, other=0)
    ends = tl.load(row_fence_ptr + experts + 1, mask=experts < num_experts, other=0)
    tiles_E = (ends - starts + BLOCK_S - 1) // BLOCK_S
    first_tile = tl.sum(tl.where(experts < expert, tiles_E, 0), axis=0)
    num_tiles = tl.sum(tl.where(experts == expert, tiles_E, 0), axis=0)
    first_row = tl.load(row_fence_ptr + expert)
    for start in tl.range(0, num_tiles, BLOCK_M):
        tiles = start + tl.arange(0, BLOCK_M)
        tl.store(expert_of_tile_ptr + first_tile + tiles, tiles * 0 + expert, mask=tiles < num_tiles)
        tl.store(first_row_of_tile_ptr + first_tile + tiles, first_row + tiles * BLOCK_S, mask=tiles < num_tiles)
    if expert == 0:
        tl.store(num_tiles_ptr, tl.sum(tiles_E, axis=0))


def build_row_tiles(plan: ExpertPlan, block_rows: int) -> RowTiles:
    """Cut the rows of each expert into tiles of `block_rows`, in one launch. Sentinel rows get no tile."""
    fence_F = plan.row_fence_F
    max_tiles = -(-plan.num_rows // block_rows) + plan.num_experts
    tiles = RowTiles(
        block_rows=block_rows,
        expert_of_tile_M=fence_F.new_empty(max_tiles),
        first_row_of_tile_M=fence_F.new_empty(max_tiles),
        num_tiles_1=fence_F.new_empty(1),
        row_fence_F=fence_F,
    )
    _row_tiles_kernel[(plan.num_experts,)](
        fence_F,
        tiles.expert_of_tile_M,
        tiles.first_row_of_tile_M,
        tiles.num_tiles_1,
        plan.num_experts,
        BLOCK_S=block_rows,
        BLOCK_E=triton.next_power_of_2(plan.num_experts),
        BLOCK_M=BLOCK_TILES,
    )
    return tiles
