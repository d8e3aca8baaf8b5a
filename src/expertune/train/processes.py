"""Which processes this run is made of, as torchrun's environment and the configuration say."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch

from expertune.distributed.mesh import ParallelMesh, join_mesh
from expertune.distributed.sizes import in_words, sizes_for
from expertune.errors import ConfigError, ExpertuneError
from expertune.train.config import TrainConfig
from expertune.train.config.parallel_rules import several_processes
from expertune.train.config.problems import raise_problems
from expertune.train.trainer import BATCH

T = TypeVar("T")


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(config: TrainConfig) -> ParallelMesh | None:
    """Meet the other processes of the job; None where this is the only one.

    Raises ConfigError if the sizes do not multiply to the number of processes, if one process sees several GPUs, if
    the machine has fewer GPUs than processes, or if what shall carry tokens to their experts cannot do so here.
    """
    world, local = _world(), int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    sizes = sizes_for(
        world,
        expert=config.expert_parallel_size,
        shard=config.dp_shard_size,
        replicate=config.dp_replicate_size,
    )
    num_gpus = torch.cuda.device_count()
    if world == 1:
        if num_gpus > 1:
            raise ConfigError(
                f"{num_gpus} GPUs are visible to one process: `expertune launch CONFIG --nproc {num_gpus}` uses them "
                "all, CUDA_VISIBLE_DEVICES=0 the first alone"
            )
        return None
    raise_problems(f"{world} processes", several_processes(config), {})
    device_type = "cuda" if num_gpus else "cpu"
    _check_backend(config.expert_parallel_backend, device_type, sizes.expert, here)
    if num_gpus:
        if local >= num_gpus:
            raise ConfigError(
                f"{here} processes were started on this machine, and it has {num_gpus} "
                f"{'GPU' if num_gpus == 1 else 'GPUs'}; start at most {num_gpus}: --nproc {num_gpus}"
            )
        torch.cuda.set_device(local)
    return join_mesh(sizes, device_type, config.ddp_timeout)


def _check_backend(backend: str | None, device_type: str, expert: int, here: int) -> None:
    """expert: processes that share experts. here: processes of this machine."""
    needed = {"cuda": "nccl", "cpu": "gloo"}[device_type]
    if backend == "deep_ep" and device_type == "cuda":
        if here % expert:
            raise ConfigError(
                f"expert_parallel_backend, expert_parallel_size: deep_ep works within one machine, and {expert} does "
                f"not divide its {in_words(here)}; change the size, or remove expert_parallel_backend to use NCCL's "
                "all-to-all"
            )
    elif backend not in (None, needed):
        where = "on NVIDIA GPUs" if device_type == "cuda" else "on a machine without an NVIDIA GPU"
        raise ConfigError(f"expert_parallel_backend: got {backend}; need {needed} {where}; remove it")


def check_rows_per_step(checkpoint: Path, config: TrainConfig) -> None:
    """Raise ConfigError if a run goes on in another number of processes with another number of rows in a step.

    Then it would go on at another place of the data. In as many processes as before it is up to the user.
    """
    file = checkpoint / BATCH
    if not file.is_file():  # of a version before
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    world = _world()
    rows = config.micro_batch_size * config.gradient_accumulation_steps * world
    if before["processes"] == world or before["rows_per_step"] == rows:
        return
    raise ConfigError(
        f"{checkpoint} was trained with {before['rows_per_step']} rows in a step ({in_words(before['processes'])}), "
        f"and now micro_batch_size {config.micro_batch_size} x gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps} x {in_words(world)} = {rows}: it would go on at another place of the "
        "data. Change one of them so that the product stays"
    )


def is_first(mesh: ParallelMesh | None) -> bool:
    """Whether this process prints and writes: the only one does, of several the first."""
    return mesh is None or mesh.is_first


def from_first(mesh: ParallelMesh | None, function: Callable[[], T]) -> T:
    """Do something in the first process alone; its result, or its error, in every process."""
    if mesh is None:
        return function()
    outcome: tuple[T | None, ExpertuneError | None] = (None, None)
    if mesh.is_first:
        try:
            outcome = function(), None
        except ExpertuneError as error:
            outcome = None, error
    value, problem = mesh.wire(None, "the run").share(outcome)
    if problem is not None:
        raise problem
    return cast(T, value)


def largest(mesh: ParallelMesh | None, value: float) -> float:
    """The largest of all processes' values."""
    if mesh is None:
        return value
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.tensor([value], dtype=torch.float64, device=device)
    return float(mesh.wire(None, "the run").maximum(values, "the largest of all"))
