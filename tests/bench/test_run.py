"""The files of a run: what the CSV holds, that files are whole, and that what was measured survives what goes wrong."""

import csv
import io
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from rich.console import Console

from expertune.bench import results as results_module
from expertune.bench import run as run_module
from expertune.bench.cases import Case
from expertune.bench.figure import plot_png
from expertune.bench.measure import Result
from expertune.bench.results import CaseResults, csv_text, read_csv
from expertune.bench.run import plot_files, run_bench
from expertune.bench.timing import ClockTimer
from expertune.bench.ways import LIMIT, OURS, Way, select_ways
from expertune.errors import ConfigError, ExpertuneError
from expertune.files import write_whole
from tests.bench.conftest import TINY

COMMIT_OF = results_module.commit_of
CASES = [Case(TINY, 13, 8, "uniform"), Case(TINY, 7, 4, "zipf")]
NAMES = ["torch_grouped", "split on grouped_mm", "axolotl fused"]


def bench(
    folder: Path, cases: Sequence[Case] = CASES, ways: Sequence[Way] | None = None
) -> tuple[list[CaseResults], str]:
    console = Console(file=io.StringIO(), width=80)
    measured = run_bench(
        cases,
        select_ways(NAMES) if ways is None else ways,
        console,
        folder,
        device=torch.device("cpu"),
        timer=ClockTimer(),
        repeats=3,
        seed=11,
        dtype=torch.float32,
    )
    assert isinstance(console.file, io.StringIO)
    return measured, console.file.getvalue()


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "bench.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_a_row_for_each_way_of_each_case(tmp_path: Path) -> None:
    bench(tmp_path)
    rows = read(tmp_path)
    assert [(row["shape"], row["tokens"], row["rank"], row["routing"], row["seed"], row["way"]) for row in rows] == [
        ("tiny", tokens, rank, routing, seed, way)
        for tokens, rank, routing, seed in (("13", "8", "uniform", "11"), ("7", "4", "zipf", "12"))
        for way in ("dense cuBLAS", "torch_grouped", "axolotl fused", "split on grouped_mm")
    ]
    dense, ours, axolotl, split = rows[:4]
    assert {row["dtype"] for row in rows} == {"float32"}
    assert (ours["experts"], ours["hidden"], ours["intermediate"], ours["top_k"]) == ("5", "32", "16", "2")
    assert ours["torch"] == version("torch")  # torch.__version__ may say more: +cu130
    assert ours["commit"] == "abc1234+"
    assert {"gpu", "triton", "transformers", "peft", "axolotl", "expertune", "python"} <= set(ours)
    for row in (dense, ours, split):
        assert row["status"] == "ok"
        times = [f"{name}_ms" for name in ("p20", "p50", "p80", "p50_queued", "p50_sustained")]
        shares = [f"share_of_dense{name}" for name in ("", "_queued", "_sustained")]
        for name in ("first_call_s", "tflops", *times, *shares):
            assert float(row[name]) >= 0, name
        assert row["best_rival"] == "split on grouped_mm"
    columns = list(dense)
    for name in ("p50", "share_of_dense"):
        unit = "_ms" if name == "p50" else ""
        assert columns.index(f"{name}_sustained{unit}") == columns.index(f"{name}_queued{unit}") + 1
    for name in ("speedup_over_best_rival", "speedup_sustained"):
        assert float(split[name]) == 1
        assert float(ours[name]) > 0
        assert dense[name] == ""
    names = ("y", "dx", "dweights", "da_up", "db_up", "da_down", "db_down")
    assert float(ours["worst_error"]) == max(float(ours[f"error_{name}"]) for name in names) < 1e-5
    assert dense["worst_error"] == ""
    assert axolotl["status"] == "skipped"
    assert axolotl["p50_ms"] == ""


def test_a_skipped_rival_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    _, printed = bench(tmp_path, CASES[:1])
    assert "skipped: axolotl fused: the package axolotl is not installed" in printed
    row = next(row for row in read(tmp_path) if row["way"] == "axolotl fused")
    assert row["note"].startswith("the package axolotl is not installed")


def test_the_tables_fit_a_terminal_of_80_columns(tmp_path: Path) -> None:
    _, printed = bench(tmp_path, CASES[:1])
    assert "…" not in printed
    header = next(line for line in printed.splitlines() if line.startswith("way"))
    assert header.split() == ["way", "ms", "queued", "sustained", "dense", "rival", "GiB", "first", "error"]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, printed = bench(tmp_path)
    picture = (tmp_path / "bench.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert f"written: {tmp_path / 'bench.png'}" in printed.replace("\n", "")


@pytest.mark.parametrize("name", ["axolotl scattermoe_lora", "peft fold + grouped_mm"])
def test_a_row_with_everything_in_it_is_one_line(name: str) -> None:
    result = Result(
        name, "rival", "ok", p50_ms=36.512, p50_queued_ms=35.123, p50_sustained_ms=37.456,
        share_of_dense_sustained=0.16, speedup_sustained=1.0, peak_gib=10.25, first_call_s=87.1, errors=(7.2e-3,) * 7,
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=80)
    run_module._print_table(CaseResults(CASES[0], 1, "bfloat16", 20, [result]), console)
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if line.strip()]
    assert len(lines) == 2
    assert lines[1].split()[-8:] == ["36.512", "35.123", "37.456", "16%", "1.00", "10.25", "87.1", "7.2e-03"]


def test_without_matplotlib_the_csv_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("expertune.bench.figure.import_module", missing)
    _, printed = bench(tmp_path, CASES[:1])
    assert "no plot: matplotlib cannot be imported" in printed
    assert not (tmp_path / "bench.png").exists()
    assert len(read(tmp_path)) == 4


def test_a_case_that_does_not_fit_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = run_module.draw_problem

    def too_big(case: Case, **options: object) -> object:
        if case.tokens == 13:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(case, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "draw_problem", too_big)
    bench(tmp_path)
    rows = read(tmp_path)
    assert {row["status"] for row in rows[:4]} == {"failed"}
    assert rows[0]["note"] == "the case could not be set up: OutOfMemoryError: CUDA out of memory."
    assert rows[5]["status"] == "ok"


def test_an_interrupted_run_leaves_the_cases_it_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = run_module.draw_problem

    def interrupted(case: Case, **options: object) -> object:
        if case.tokens == 7:
            raise KeyboardInterrupt
        return draw(case, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "draw_problem", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path)
    assert len(read(tmp_path)) == 4
    assert not list(tmp_path.glob(".partial-*"))


def test_a_run_that_measured_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(run_module, "draw_problem", fail)
    with pytest.raises(ExpertuneError, match="not one way could be measured"):
        bench(tmp_path)
    assert {row["status"] for row in read(tmp_path)} == {"failed"}


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.csv"
    write_whole(path, b"old")

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["bench.csv"]
    assert path.read_bytes() == b"old"


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output: .* cannot be written"):
        run_module.make_output(tmp_path / "file" / "folder")


def test_outside_a_checkout_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert COMMIT_OF(tmp_path) == "unknown"

    def missing(*_args: object, **_options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert COMMIT_OF(tmp_path) == "unknown"


def test_what_was_written_is_read_again_and_drawn_without_measuring(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured, _ = bench(tmp_path)
    again, environment = read_csv((tmp_path / "bench.csv").read_text())
    assert csv_text(again, environment).splitlines() == (tmp_path / "bench.csv").read_text().splitlines()
    assert [each.case for each in again] == [each.case for each in measured]
    (tmp_path / "bench.png").unlink()
    plot_files([tmp_path / "bench.csv"], Console(file=io.StringIO()), tmp_path)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_from_before_there_were_sustained_times_is_read_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench(tmp_path)
    new = ("p50_sustained_ms", "share_of_dense_sustained", "speedup_sustained")
    rows = [{name: cell for name, cell in row.items() if name not in new} for row in read(tmp_path)]
    with (tmp_path / "old.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (old, *_), _ = read_csv((tmp_path / "old.csv").read_text())
    assert old.results[1].p50_ms is not None
    assert old.results[1].p50_sustained_ms is None
    plot_files([tmp_path / "old.csv"], Console(file=io.StringIO()), tmp_path)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_is_of_sustained_times_where_every_limit_has_one() -> None:
    dense = Result("dense", LIMIT, "ok", p50_ms=2.0, p50_sustained_ms=3.0)
    ours = Result("ours", OURS, "ok", p50_ms=5.0, share_of_dense=0.4)
    ours = replace(ours, p50_sustained_ms=6.0, share_of_dense_sustained=0.5)
    assert texts(dense, ours) >= {"50 %  6 ms", "   (100 % = 3 ms)"}
    assert texts(dense, replace(ours, p50_sustained_ms=None)) >= {"cannot be captured in a CUDA graph"}
    assert texts(replace(dense, p50_sustained_ms=None), ours) >= {"40 %  5 ms", "   (100 % = 2 ms)"}


def texts(*results: Result) -> set[str]:
    """What the plot of one case says."""
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn: set[str] = set()

    class Figure(figure_module.Figure):
        def savefig(self, *_args: object, **_options: object) -> None:
            drawn.update(text.get_text() for text in self.axes[0].texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure_module, "Figure", Figure)
        plot_png([CaseResults(CASES[0], 1, "bfloat16", 20, results)], {})
    return drawn


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"--plot: .*other\.csv is no bench\.csv"):
        plot_files([tmp_path / "other.csv"], Console(file=io.StringIO()), tmp_path)
