"""The race between tiles, with times that are made up, and once with the kernels in Triton's interpreter."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from expertune.bench.cases import Case, ExpertShape
from expertune.bench.problem import Problem, draw_problem
from expertune.bench.rivals import Step
from expertune.bench.timing import ClockTimer, Timing
from expertune.errors import ExpertuneError
from expertune.ops.experts.scattermoe.tiling import LinearTile, pick_tile
from expertune.tune import run as tune_run
from expertune.tune.cache import Entry, Machine, TunedShape, read_entries, store
from expertune.tune.measure import CANDIDATES, FAILED, KEEP_FROM, OK, WRONG, Outcome, race

CPU = torch.device("cpu")
CASE = Case(ExpertShape("tiny", 5, 32, 16, 2), 13, 8, "uniform")
DEFAULT, A, B, C = (LinearTile(rows=rows, columns=32, k_step=16, num_stages=2) for rows in (16, 32, 64, 128))
MACHINE = Machine("a GPU", "9.0", "scattermoe.linear", "0" * 16, "3.6.0", "2.11.0", "0.1.0")

Milliseconds = float | list[float]


@dataclass
class FakeStep:
    """Says how long it takes, the last time over and over; `fails_at` is the call that fails."""

    tile: LinearTile
    times_ms: list[float]
    outputs: tuple[Tensor, ...]
    calls: list[LinearTile]
    fails_at: int = 0
    count: int = 0

    def __call__(self) -> tuple[Tensor, ...]:
        self.count += 1
        if self.count == self.fails_at:
            raise RuntimeError("out of resource: shared memory, Required: 270368, Hardware limit: 232448\nmore")
        self.calls.append(self.tile)
        return self.outputs


class FakeTimer:
    """Only queued calls count: being asked for one with another host time than that of `idle` is a mistake."""

    def idle(self, step: Step) -> Timing:
        step()
        return Timing(1e6, 0.25)

    def queued(self, step: Step, host_ms: float) -> float:
        assert isinstance(step, FakeStep)
        assert host_ms == 0.25
        step()
        return step.times_ms.pop(0) if len(step.times_ms) > 1 else step.times_ms[0]

    def peak_bytes(self, step: Step) -> tuple[int | None, tuple[Tensor, ...]]:
        raise AssertionError


@dataclass
class Track:
    """What a race is run with, and what it leaves. off: added to the last tensor of a tile's results, relatively."""

    times_ms: dict[LinearTile, Milliseconds]
    off: dict[LinearTile, float] = field(default_factory=dict)
    fails_at: dict[LinearTile, int] = field(default_factory=dict)
    calls: list[LinearTile] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def step_of(self, problem: Problem, tile: LinearTile) -> Step:
        torch.manual_seed(1)
        outputs = tuple(torch.randn(4, 5).bfloat16().float() for _ in range(7))
        outputs = (*outputs[:-1], outputs[-1] * (1 + self.off.get(tile, 0.0)))
        times = self.times_ms[tile]
        times_ms = times if isinstance(times, list) else [times]
        return FakeStep(tile, times_ms, outputs, self.calls, self.fails_at.get(tile, 0))

    def race(self, *others: LinearTile, repeats: int = 4, shared_memory_bytes: int | None = None) -> Outcome:
        return race(
            problem(), DEFAULT, others or tuple(self.times_ms), FakeTimer(), repeats=repeats, tell=self.told.append,
            shared_memory_bytes=shared_memory_bytes, step_of=self.step_of,
        )  # fmt: skip


def problem(dtype: torch.dtype = torch.float32) -> Problem:
    return draw_problem(CASE, seed=3, device=CPU, dtype=dtype)


def test_the_fastest_is_kept() -> None:
    outcome = Track({DEFAULT: 4.0, A: 3.0, B: 2.0, C: 5.0}).race()
    assert (outcome.best.tile, outcome.keep, outcome.speedup) == (B, True, 2.0)
    assert outcome.default.tile == DEFAULT
    assert [each.ms for each in outcome.candidates] == [4.0, 3.0, 2.0, 5.0]
    assert all(each.step is None for each in outcome.candidates), "steps hold a problem's tensors"


@pytest.mark.parametrize(("ms", "keep"), [(4.0 / 1.019, False), (4.0 / KEEP_FROM - 1e-9, True)])
def test_from_two_percent_on(ms: float, keep: bool) -> None:
    outcome = Track({DEFAULT: 4.0, A: ms}).race()
    assert (outcome.best.tile, outcome.keep) == (A, keep)


def test_luck_in_the_first_race_is_not_enough() -> None:
    outcome = Track({DEFAULT: 4.0, A: [3.0] * 4 + [3.95]}).race()
    assert (outcome.best.tile, outcome.best.ms, outcome.keep) == (A, 3.95, False)


def test_the_default_may_be_the_best_and_is_raced_once() -> None:
    track = Track({DEFAULT: 2.0, A: 3.0})
    outcome = track.race(DEFAULT, A, A)
    assert (outcome.best, outcome.keep, outcome.speedup) == (outcome.default, False, 1.0)
    assert [each.tile for each in outcome.candidates] == [DEFAULT, A]


def test_all_take_turns_in_every_round() -> None:
    track = Track({DEFAULT: 2.0, A: 3.0, B: 4.0})
    track.race(A, B, repeats=5)
    assert track.calls[: 2 * 3] == [DEFAULT] * 2 + [A] * 2 + [B] * 2
    assert track.calls[2 * 3 :] == [DEFAULT, A, B] * (3 + 5)


def test_a_tile_that_computes_something_else_is_out() -> None:
    track = Track({DEFAULT: 4.0, A: 1.0, B: 3.0, C: 1.0}, off={A: 0.02, B: 0.005, C: float("nan")})
    outcome = track.race()
    assert (outcome.best.tile, outcome.keep) == (B, True)
    assert [each.status for each in outcome.candidates] == [OK, WRONG, OK, WRONG]
    assert outcome.candidates[1].ms is None
    assert track.told[0].startswith("wrong: 32x32x16, 8 warps, 2 stages: relative difference 2.0e-02 in db_down")


@pytest.mark.parametrize("fails_at", [1, 2, 4, 8, 11])
def test_a_tile_that_fails_is_out_and_the_others_go_on(fails_at: int) -> None:
    track = Track({DEFAULT: 4.0, A: 1.0, B: 3.0}, fails_at={A: fails_at})
    outcome = track.race()
    failed = outcome.candidates[1]
    assert (failed.status, failed.ms) == (FAILED, None)
    (line,) = track.told
    assert line == (
        "failed: 32x32x16, 8 warps, 2 stages: RuntimeError: out of resource: shared memory, Required: 270368, "
        "Hardware limit: 232448"
    )
    if fails_at < 10:
        assert (outcome.best.tile, outcome.keep) == (B, True)
    else:  # in the second race: what is left is the default
        assert (outcome.best, outcome.keep) == (outcome.default, False)


def test_a_tile_that_does_not_fit_is_not_tried() -> None:
    track = Track({DEFAULT: 4.0, A: 5.0, C: 1.0})
    limit = C.shared_memory_bytes(4) - 1
    outcome = track.race(shared_memory_bytes=limit)
    assert outcome.candidates[2].status == FAILED
    assert C not in track.calls
    needs_kib, has_kib = C.shared_memory_bytes(4) / 1024, limit / 1024
    assert f"needs up to {needs_kib:.1f} KiB of shared memory, the GPU has {has_kib:.1f}" in track.told[0]


@pytest.mark.parametrize("fails_at", [1, 2, 6])
def test_a_default_that_fails_ends_the_case(fails_at: int) -> None:
    track = Track({DEFAULT: 4.0, A: 1.0}, fails_at={DEFAULT: fails_at})
    with pytest.raises(ExpertuneError, match=r"the default tile \(16x32x16, .*\) cannot run: RuntimeError: out of"):
        track.race()


def test_an_interruption_is_not_taken_for_a_failure() -> None:
    def interrupted(_problem: Problem, _tile: LinearTile) -> Step:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race(problem(), DEFAULT, (), FakeTimer(), repeats=1, tell=lambda _line: None, step_of=interrupted)


def test_candidates_are_distinct_and_some_fit_everywhere() -> None:
    assert len(set(CANDIDATES)) == len(CANDIDATES)
    sizes = [tile.shared_memory_bytes(2) for tile in CANDIDATES]
    assert max(sizes) <= 227 * 1024
    assert sum(size <= 99 * 1024 for size in sizes) >= 2


class TestRun:
    """Several cases, and what is left in the cache."""

    DEFAULT = pick_tile(CASE.tokens * CASE.shape.top_k, CASE.shape.num_experts, torch.float32, CPU)
    SHAPE = TunedShape(5, 32, 16, 2, 4, 16, "float32")

    @staticmethod
    def run(track: Track, cache: Path | None, *cases: Case) -> str:
        console = Console(width=100, record=True, quiet=False, file=None)
        tune_run.run_tune(
            cases or (CASE,), console, cache, device=CPU, timer=FakeTimer(), machine=MACHINE, repeats=4, seed=1,
            dtype=torch.float32, candidates=tuple(track.times_ms), step_of=track.step_of,
        )  # fmt: skip
        return console.export_text()

    def test_the_winner_is_kept_with_its_figures(self, tmp_path: Path) -> None:
        cache = tmp_path / "tiles.json"
        printed = self.run(Track({self.DEFAULT: 4.0, A: 3.0, B: 3.5}), cache)
        assert read_entries(cache) == [Entry(MACHINE, self.SHAPE, A, 3.0, 4.0)]
        assert "tiny, 13 tokens, rank 8 4.000 3.000 1.333 better: 32x32x16, 8 warps, 2 stages" in " ".join(
            printed.split()
        )
        assert f"kept 1 in {cache}" in printed.replace("\n", "")

    def test_where_the_default_is_best_an_older_winner_goes(self, tmp_path: Path) -> None:
        cache = tmp_path / "tiles.json"
        store(cache, MACHINE, self.SHAPE, Entry(MACHINE, self.SHAPE, B, 1.0, 2.0))
        printed = self.run(Track({self.DEFAULT: 4.0, A: 3.95}), cache)
        assert read_entries(cache) == []
        assert "the default stays" in printed
        assert "nothing to keep" in printed

    def test_a_dry_run_writes_nothing(self, tmp_path: Path) -> None:
        assert tune_run.find_cache(tmp_path / "tiles.json", dry_run=True) is None
        printed = self.run(Track({self.DEFAULT: 4.0, A: 3.0}), None)
        assert "dry run: nothing was written" in printed
        assert list(tmp_path.iterdir()) == []

    def test_a_case_that_fails_does_not_end_the_run(self, tmp_path: Path) -> None:
        class Once(Track):
            def step_of(self, problem: Problem, tile: LinearTile) -> Step:
                if problem.case.rank == 4:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return super().step_of(problem, tile)

        cache, small = tmp_path / "tiles.json", Case(CASE.shape, 13, 4, "uniform")
        printed = self.run(Once({self.DEFAULT: 4.0, A: 3.0}), cache, small, CASE)
        assert "the case could not be measured: the default tile" in printed
        assert len(read_entries(cache)) == 1
        with pytest.raises(ExpertuneError, match="not one case could be measured"):
            self.run(Once({self.DEFAULT: 4.0}), cache, small)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_kernels_race_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    told: list[str] = []
    small = LinearTile(rows=16, columns=32, k_step=16, num_warps=4, num_stages=2)
    others = (LinearTile(rows=32, columns=16, k_step=32, num_warps=4, num_stages=2, halves=True),)
    tiny = draw_problem(
        Case(ExpertShape("tiny", 2, 16, 16, 1), 5, 4, "uniform"), seed=3, device=CPU, dtype=torch.float32
    )
    outcome = race(tiny, small, others, ClockTimer(), repeats=1, tell=told.append)
    assert told == []
    assert all(each.status == OK and each.ms is not None for each in outcome.candidates)
