"""The tiles that `expertune tune` found, for a call of the experts. All ranks of a job read the same file."""

import logging
from functools import cache
from pathlib import Path

import torch

from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.tune.cache import TunedShape, TunedTiles, default_cache_path, read_tiles, this_machine

logger = logging.getLogger("expertune")


def tuned_tile(
    num_rows: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    top_k: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LinearTile | None:
    """The tile measured for such a call on such a GPU with these versions, or None: the table's tile is to run.

    num_rows: S = T K, over all experts. hidden, intermediate: H, I. rank: of the adapters, 0 without. The file is read
    once in a process and for each device; what is written later counts from the next process on.
    """
    tuned = _tuned(device) if device.type == "cuda" else None
    if tuned is None:
        return None
    shape = TunedShape.of_call(num_rows, num_experts, hidden, intermediate, top_k, rank, dtype)
    if shape in tuned.stale:
        _say_stale(tuned.path, tuned.stale[next(iter(tuned.stale))])
    return tuned.tiles.get(shape)


@cache
def _tuned(device: torch.device) -> TunedTiles | None:
    """What the user's file says for a device; None where it says nothing."""
    path, machine = default_cache_path(), this_machine(device)
    if path is None or machine is None:
        return None
    tuned = read_tiles(path, machine)
    return tuned if tuned.tiles or tuned.stale else None


@cache
def _say_stale(path: Path, why: str) -> None:
    """Once in a process: `why` is always the first stale entry's."""
    logger.warning(
        "tuned tiles: what %s has for this GPU and this model was measured with other versions (%s); it is ignored, "
        "and the default tiles run. Run `expertune tune` again, or delete the file",
        path,
        why,
    )
