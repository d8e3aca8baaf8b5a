"""Which tile a projection runs with."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearTile:
    """The tile of one launch.

    rows x columns of the result, k_step along the sum; num_warps, num_stages: Triton's. programs_per_sm: persistent
    programs on each multiprocessor. descriptors: whether tensor descriptors may be used where operands are aligned.
    halves: whether a row tile that is at most half full is computed as half a tile.
    """

    rows: int = 128
    columns: int = 256
    k_step: int = 64
    num_warps: int = 8
    num_stages: int = 3
    programs_per_sm: int = 1
    descriptors: bool = True
    halves: bool = False


@dataclass(frozen=True)
class RowsTile:
    """The tile of a kernel that reads rows once: rows x columns at a time; num_warps, num_stages: Triton's."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 3


def pick_tile(num_rows: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> LinearTile:
    """The tile for a call, from the table."""
    if dtype == torch.float32:
        return LinearTile(rows=64, columns=64, k_step=32, num_warps=4)
    return LinearTile(halves=num_rows <= 2048 * num_experts)
