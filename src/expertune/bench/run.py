"""A whole run: every case in turn, a table for each, the CSV after each, the plot at the end."""

import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from expertune.bench import timing
from expertune.bench.cases import Case
from expertune.bench.figure import plot_png
from expertune.bench.measure import FAILED, OK, Result, describe_error, measure, release_memory
from expertune.bench.problem import draw_problem
from expertune.bench.results import CaseResults, csv_text, describe_environment, read_csv
from expertune.bench.timing import Timer
from expertune.bench.ways import Way
from expertune.errors import ConfigError, ExpertuneError
from expertune.files import write_whole

CSV_NAME, PNG_NAME = "bench.csv", "bench.png"
_LEGEND = (
    "Medians. ms: from an idle GPU. queued: the same with the host ahead. sustained:\n"
    "as CUDA graphs, step after step. dense: sustained, as a share of dense cuBLAS.\n"
    "rival: sustained, how many times as fast as the fastest rival. GiB: peak above\n"
    "the inputs. first: first call in seconds. error: worst relative one, to fp32."
)


def find_gpu() -> tuple[torch.device, Timer]:
    """The device to measure on, and its timer; raises ConfigError if there is none."""
    return timing.find_gpu("expertune bench")


def make_output(folder: Path) -> None:
    """Make the folder, before anything is measured; raises ConfigError if that, or writing in it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".probe", b"")
        (folder / ".probe").unlink()
    except OSError as error:
        raise ConfigError(f"--output: {folder} cannot be written ({error.strerror or error})") from error


def run_bench(
    cases: Sequence[Case],
    ways: Sequence[Way],
    console: Console,
    output: Path,
    *,
    device: torch.device,
    timer: Timer,
    repeats: int,
    seed: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[CaseResults]:
    """Measure every case, print its table, and leave bench.csv and bench.png in `output`.

    seed: of the first case, the next ones get the following numbers; None draws one. What fails is in the results by
    name. Both files are whole at any moment; an interrupted run leaves the cases it finished.
    """
    environment = describe_environment(device)
    first_seed = secrets.randbelow(2**31) if seed is None else seed
    measured: list[CaseResults] = []
    console.print(_LEGEND, style="dim")
    try:
        for index, case in enumerate(cases):
            console.print(f"[bold]{case.title}[/] (case {index + 1} of {len(cases)}, seed {first_seed + index})")
            results = _measure_case(case, ways, timer, console, device, repeats, first_seed + index, dtype)
            measured.append(CaseResults(case, first_seed + index, str(dtype).removeprefix("torch."), repeats, results))
            write_whole(output / CSV_NAME, csv_text(measured, environment))
            _print_table(measured[-1], console)
            release_memory()
    finally:
        if measured:
            _write_plot(measured, environment, output, console)
            console.print(f"written: {output / CSV_NAME}", markup=False)
    if not any(result.status == OK for each in measured for result in each.results):
        raise ExpertuneError("not one way could be measured; the reasons are above and in the CSV")
    return measured


def plot_files(files: Sequence[Path], console: Console, output: Path) -> None:
    """Draw one bench.png of the results that earlier runs left; needs no GPU. Raises ConfigError for a bad file."""
    measured: list[CaseResults] = []
    environment: dict[str, str] = {}
    for file in files:
        try:
            cases, where = read_csv(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"--plot: {file} is no bench.csv ({error})") from error
        measured += cases
        environment = environment or where
    _write_plot(measured, environment, output, console)


def _measure_case(
    case: Case,
    ways: Sequence[Way],
    timer: Timer,
    console: Console,
    device: torch.device,
    repeats: int,
    seed: int,
    dtype: torch.dtype,
) -> list[Result]:
    def tell(line: str) -> None:
        console.print(f"  {line}", markup=False)

    try:
        problem = draw_problem(case, seed=seed, device=device, dtype=dtype)
        return measure(problem, ways, timer, repeats=repeats, tell=tell)
    except Exception as error:  # the tensors or their truth do not fit: the other cases may
        note = f"the case could not be set up: {describe_error(error)}"
    tell(f"{FAILED}: {note}")
    return [Result(way.name, way.kind, FAILED, note) for way in ways]


def _write_plot(measured: list[CaseResults], environment: dict[str, str], output: Path, console: Console) -> None:
    try:
        write_whole(output / PNG_NAME, plot_png(measured, environment))
    except ImportError as error:
        console.print(f"no plot: matplotlib cannot be imported ({error}); pip install 'expertune[bench]'", markup=False)
    else:
        console.print(f"written: {output / PNG_NAME}", markup=False)


def _print_table(measured: CaseResults, console: Console) -> None:
    table = Table(padding=(0, 1, 0, 0), box=None)
    table.add_column("way")
    for name in ("ms", "queued", "sustained", "dense", "rival", "GiB", "first", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in measured.results:
        if result.p50_ms is None:
            table.add_row(result.way, f"[dim]{result.status}[/]")
            continue
        table.add_row(
            result.way if result.status == OK else f"{result.way} [bold red]{result.status}[/]",
            f"{result.p50_ms:.3f}",
            _cell(result.p50_queued_ms, ".3f"),
            _cell(result.p50_sustained_ms, ".3f"),
            _cell(result.share_of_dense_sustained, ".0%"),
            _cell(result.speedup_sustained, ".2f"),
            _cell(result.peak_gib, ".2f"),
            _cell(result.first_call_s, ".1f"),
            _cell(result.worst_error, ".1e"),
        )
    console.print(table)
    console.print()


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
