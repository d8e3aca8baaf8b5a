"""A whole run: every case in turn, its winner kept at once, a table of all at the end."""

import secrets
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from expertune.bench import timing
from expertune.bench.cases import DEFAULT_RANK, DEFAULT_TOKENS, UNIFORM, Case, ExpertShape
from expertune.bench.measure import describe_error, release_memory
from expertune.bench.problem import draw_problem
from expertune.bench.timing import Timer
from expertune.errors import ConfigError, ExpertuneError
from expertune.ops.experts.scattermoe.tiling import LinearTile, pick_tile
from expertune.ops.records import gpu_facts
from expertune.tune.cache import Entry, Machine, TunedShape, check_writable, default_cache_path, store, this_machine
from expertune.tune.measure import CANDIDATES, KEEP_FROM, Outcome, StepOf, describe_tile, race, scattermoe_step


def find_gpu() -> tuple[torch.device, Timer]:
    """The device to measure on, and its timer; raises ConfigError if there is none, or no Triton."""
    device, timer = timing.find_gpu("expertune tune")
    if this_machine(device) is None:
        raise ConfigError(
            "expertune tune needs the package triton, which is not installed; `expertune doctor` says more"
        )
    return device, timer


def cases_of(shape: ExpertShape, tokens: Sequence[int], ranks: Sequence[int]) -> list[Case]:
    """A model's cases: every number of tokens with every rank; 8192 and 16 unless given."""
    sizes = product(tokens or (DEFAULT_TOKENS,), ranks or (DEFAULT_RANK,))
    return [Case(shape, count, rank, UNIFORM) for count, rank in sizes]


def find_cache(given: Path | None, *, dry_run: bool) -> Path | None:
    """Where results go, None for a dry run; raises ConfigError if they could not be written there."""
    if dry_run:
        return None
    path = default_cache_path() if given is None else given
    if path is None:
        raise ConfigError("--cache: the home folder is not known; set XDG_CACHE_HOME, or use --dry-run")
    check_writable(path)
    return path


def run_tune(
    cases: Sequence[Case],
    console: Console,
    cache: Path | None,
    *,
    device: torch.device,
    timer: Timer,
    machine: Machine | None,
    repeats: int,
    seed: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    candidates: Sequence[LinearTile] = CANDIDATES,
    step_of: StepOf = scattermoe_step,
) -> list[tuple[Case, Outcome]]:
    """Measure every case and keep what beats the default tile by 2 %; where nothing does, an older entry goes.

    cache: the file, None to write nothing. An interrupted run leaves what it finished. A case that cannot be measured
    is reported; raises ExpertuneError if none could be.
    """
    first_seed = secrets.randbelow(2**31) if seed is None else seed
    gpu = gpu_facts(device)
    measured: list[tuple[Case, Outcome]] = []

    def tell(line: str) -> None:
        console.print(f"  {line}", markup=False)

    for index, case in enumerate(cases):
        console.print(f"[bold]{case.title}[/] (case {index + 1} of {len(cases)}, seed {first_seed + index})")
        try:
            problem = draw_problem(case, seed=first_seed + index, device=device, dtype=dtype)
            outcome = race(
                problem,
                pick_tile(case.tokens * case.shape.top_k, case.shape.num_experts, dtype, device),
                candidates,
                timer,
                repeats=repeats,
                tell=tell,
                shared_memory_bytes=None if gpu is None else gpu.shared_memory_bytes,
                step_of=step_of,
            )
        except Exception as error:  # its tensors do not fit, or the default tile cannot run: other cases may
            note = str(error) if isinstance(error, ExpertuneError) else describe_error(error)
        else:
            note = ""
        problem = None  # type: ignore[assignment]  # the next case needs the memory
        release_memory()
        if note:
            tell(f"the case could not be measured: {note}")
            continue
        measured.append((case, outcome))
        _print_times(outcome, console)
        if cache is not None and machine is not None:
            _keep(cache, machine, case, outcome, dtype)
    if not measured:
        raise ExpertuneError("not one case could be measured; the reasons are above")
    _print_summary(measured, console)
    _say_where(measured, console, cache)
    return measured


def _keep(cache: Path, machine: Machine, case: Case, outcome: Outcome, dtype: torch.dtype) -> None:
    sizes = case.shape
    shape = TunedShape.of_call(
        case.tokens * sizes.top_k,
        sizes.num_experts,
        sizes.hidden,
        sizes.intermediate,
        sizes.top_k,
        case.rank,
        dtype,
    )
    entry = None
    if outcome.keep:
        assert outcome.best.ms is not None
        assert outcome.default.ms is not None
        entry = Entry(machine, shape, outcome.best.tile, round(outcome.best.ms, 4), round(outcome.default.ms, 4))
    store(cache, machine, shape, entry)


def _print_times(outcome: Outcome, console: Console) -> None:
    table = Table(padding=(0, 1, 0, 0), box=None)
    table.add_column("tile")
    table.add_column("ms", justify="right", no_wrap=True)
    for candidate in sorted(outcome.candidates, key=lambda each: each.ms or float("inf")):
        what = describe_tile(candidate.tile) + (" (default)" if candidate is outcome.default else "")
        table.add_row(what, f"[dim]{candidate.status}[/]" if candidate.ms is None else f"{candidate.ms:.3f}")
    console.print(table)
    console.print()


def _print_summary(measured: Sequence[tuple[Case, Outcome]], console: Console) -> None:
    table = Table(padding=(0, 1, 0, 0), box=None)
    table.add_column("case")
    for name in ("default ms", "best ms", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result")
    for case, outcome in measured:
        result = f"better: {describe_tile(outcome.best.tile)}" if outcome.keep else "the default stays"
        title = f"{case.shape.name}, {case.tokens} tokens, rank {case.rank}"
        times = (f"{outcome.default.ms:.3f}", f"{outcome.best.ms:.3f}", f"{outcome.speedup:.3f}")
        table.add_row(title, *times, result)
    console.print(table)
    console.print(
        f"A tile is better from {KEEP_FROM - 1:.0%} on, in two races. ms: median of forward and backward.", style="dim"
    )


def _say_where(measured: Sequence[tuple[Case, Outcome]], console: Console, cache: Path | None) -> None:
    kept = sum(outcome.keep for _, outcome in measured)
    if cache is None:
        console.print("dry run: nothing was written")
    elif not kept:
        console.print(f"nothing to keep in {cache}: training runs the default tiles", markup=False)
    else:
        console.print(f"kept {kept} in {cache}", markup=False)
        default = default_cache_path()
        if default is None or default.resolve() != cache.resolve():
            console.print(f"note: training reads {default}; set XDG_CACHE_HOME or copy the file", markup=False)
