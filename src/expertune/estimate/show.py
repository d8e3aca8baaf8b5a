"""An estimate as a table for people and as a mapping for machines."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from expertune.estimate.gpus import GIB
from expertune.estimate.layout import GpuMemory
from expertune.estimate.run import Estimate


def print_estimate(estimate: Estimate, console: Console) -> None:
    """The items of one GPU, a column for each layout, and below what was assumed and what fits."""
    shown = [estimate.configured]
    other = estimate.smallest or estimate.least
    if other is not None and other.layout != estimate.configured.layout:
        shown.append(other)
    table = Table(title="memory of one GPU at the peak of a training step, GiB")
    table.add_column("what")
    for memory in shown:
        table.add_column(f"ep x shard x replicate\n{_in_short(memory)}", justify="right", no_wrap=True)
    table.add_column("how", style="dim")
    for name, what in _lines(shown):
        table.add_row(name, *(_gib(_size(memory, name)) for memory in shown), what)
    table.add_section()
    table.add_row("allocated by torch", *(_gib(each.allocated_bytes) for each in shown), "max_memory_allocated")
    table.add_row("[bold]needed[/]", *(f"[bold]{_gib(each.total_bytes)}[/]" for each in shown), "with the allowances")
    console.print(table)
    model = estimate.model
    console.print(f"{model.num_parameters:,} parameters, {model.num_trainable:,} trained")
    console.print(
        f"with gradient checkpointing {_gib(estimate.checkpointed_bytes)} GiB, "
        f"without {_gib(estimate.plain_bytes)} GiB (layout {_in_short(estimate.configured)})"
    )
    for note in estimate.settings.notes:
        console.print(f"assumed: {note}", markup=False)
    for line in _verdict(estimate):
        console.print(line, markup=False)


def as_mapping(estimate: Estimate) -> dict[str, Any]:
    """Everything in bytes, for `--json`."""
    model = estimate.model
    return {
        "base_model": estimate.settings.config.base_model,
        "experts_backend": estimate.settings.backend,
        "num_parameters": model.num_parameters,
        "num_trainable": model.num_trainable,
        "configured": _memory_mapping(estimate.configured),
        "with_checkpointing_bytes": estimate.checkpointed_bytes,
        "without_checkpointing_bytes": estimate.plain_bytes,
        "gpu_bytes": estimate.gpu_bytes,
        "num_gpus": estimate.num_gpus,
        "smallest": None if estimate.smallest is None else _memory_mapping(estimate.smallest),
        "assumed": list(estimate.settings.notes),
    }


def _verdict(estimate: Estimate) -> Iterator[str]:
    if estimate.gpu_bytes is None:
        return
    room = f"{estimate.gpu_bytes / GIB:.1f} GiB"
    found, least = estimate.smallest, estimate.least
    if found is not None:
        copies = estimate.num_gpus // found.layout.world
        yield f"smallest layout that fits {room} a GPU: {_keys(found)} ({found.layout.world} GPU(s))"
        if copies > 1:
            yield f"on all {estimate.num_gpus}: the same with dp_replicate_size: {copies}"
    elif least is not None:
        yield (
            f"no layout of up to {estimate.num_gpus} GPUs fits {room} each; the least is "
            f"{_gib(least.total_bytes)} GiB with {_keys(least)}"
        )
        yield "ways out: gradient_checkpointing: true, a smaller micro_batch_size or sequence_len, more GPUs"


def _in_short(memory: GpuMemory) -> str:
    return f"{memory.layout.expert} x {memory.layout.shard} x {memory.layout.replicate}"


def _keys(memory: GpuMemory) -> str:
    layout = memory.layout
    return f"expert_parallel_size: {layout.expert}, dp_shard_size: {layout.shard}"


def _lines(memories: list[GpuMemory]) -> list[tuple[str, str]]:
    """The names of all items in order, each with what it says of itself."""
    lines: dict[str, str] = {}
    for allowance in (False, True):
        for memory in memories:
            lines |= {item.name: item.what for item in memory.items if item.allowance is allowance}
    return list(lines.items())


def _size(memory: GpuMemory, name: str) -> int:
    return next((item.num_bytes for item in memory.items if item.name == name), 0)


def _memory_mapping(memory: GpuMemory) -> dict[str, Any]:
    layout = memory.layout
    return {
        "expert_parallel_size": layout.expert,
        "dp_shard_size": layout.shard,
        "dp_replicate_size": layout.replicate,
        "items": [{"name": i.name, "bytes": i.num_bytes, "allowance": i.allowance} for i in memory.items],
        "allocated_bytes": memory.allocated_bytes,
        "total_bytes": memory.total_bytes,
    }


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
