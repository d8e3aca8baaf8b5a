"""Which expert and which rows a program works on: a table of row tiles, so that a persistent kernel searches nothing.

An expert with n rows gets ceil(n / block) tiles of `block` rows; an expert without rows gets none. The number of tiles
depends on the routing and stays on the device: kernels read it there, so no host synchronisation is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertune.ops.plan import ExpertPlan


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


def build_row_tiles(plan: ExpertPlan, block_rows: int) -> RowTiles:
    """Cut the rows of each expert into tiles of `block_rows`. Sentinel rows get no tile."""
    fence_F = plan.row_fence_F
    max_tiles = -(-plan.num_rows // block_rows) + plan.num_experts
    tiles_of_expert_E = (fence_F[1:] - fence_F[:-1] + block_rows - 1) // block_rows
    tile_ends_E = torch.cumsum(tiles_of_expert_E, 0, dtype=torch.int32)
    tiles_M = torch.arange(max_tiles, device=fence_F.device, dtype=torch.int32)
    expert_M = torch.searchsorted(tile_ends_E, tiles_M, right=True, out_int32=True).clamp_(max=plan.num_experts - 1)
    first_tile_M = (tile_ends_E - tiles_of_expert_E)[expert_M].to(torch.int32)
    return RowTiles(
        block_rows=block_rows,
        expert_of_tile_M=expert_M,
        first_row_of_tile_M=fence_F[expert_M] + (tiles_M - first_tile_M) * block_rows,
        num_tiles_1=tile_ends_E[-1:],
        row_fence_F=fence_F,
    )
