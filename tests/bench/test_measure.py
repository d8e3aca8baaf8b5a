"""What is made of the times: shares, ratios, and the ways that fail, are skipped or compute something else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from expertune.bench.measure import Result, measure
from expertune.bench.problem import Problem
from expertune.bench.rivals import Step, Unavailable
from expertune.bench.timing import ClockTimer, Replay, Timing
from expertune.bench.truth import reference_step
from expertune.bench.ways import LIMIT, OURS, RIVAL, WAYS, Way


@dataclass
class Fake:
    """A step that says how long it takes, sustained a quarter of it; `calls` collects the names of all that ran."""

    name: str
    milliseconds: list[float]
    outputs: tuple[torch.Tensor, ...]
    calls: list[str]
    sustained_ms: list[float] = field(default_factory=list)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        self.calls.append(self.name)
        return self.outputs


class FakeTimer:
    turn_ms = 5.0

    def idle(self, step: Step) -> Timing:
        assert isinstance(step, Fake)
        step()
        return Timing(step.milliseconds.pop(0) if len(step.milliseconds) > 1 else step.milliseconds[0], 0.5)

    def queued(self, step: Step, host_ms: float) -> float:
        assert host_ms == 0.5
        return self.idle(step).device_ms / 2

    def capture(self, step: Step) -> Replay:
        assert isinstance(step, Fake)
        if "synchronises" in step.name:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        return step

    def sustained(self, turns: Sequence[tuple[Replay, int]]) -> list[float]:
        times_ms = []
        for step, num_replays in turns:
            assert isinstance(step, Fake)
            assert num_replays == max(2, math.ceil(self.turn_ms / (step.milliseconds[0] / 2)))
            step()
            times_ms.append(step.sustained_ms.pop(0) if step.sustained_ms else step.milliseconds[0] / 4)
        return times_ms

    def peak_bytes(self, step: Step) -> tuple[int | None, tuple[torch.Tensor, ...]]:
        return 2**29, step()


def race(problem: Problem, *entries: tuple[str, str, float | Exception | list[float]]) -> tuple[dict[str, Result], str]:
    """Results by name and what was told; an entry is a name, a kind, and its time or what building it raises."""
    truth, calls, told = reference_step(problem), [], []
    ways = []
    for name, kind, what in entries:

        def build(
            _problem: Problem, name: str = name, kind: str = kind, what: float | Exception | list[float] = what
        ) -> Step:
            if isinstance(what, Exception):
                raise what
            outputs = () if kind == LIMIT else truth
            if "wrong" in name:
                outputs = (*truth[:-1], truth[-1] * 1.2)
            return Fake(name, what if isinstance(what, list) else [what], outputs, calls)

        ways.append(Way(name, kind, build))
    results = measure(problem, ways, FakeTimer(), repeats=4, tell=told.append)
    return {result.way: result for result in results}, "\n".join(told)


def test_shares_ratios_and_flops(problem: Problem) -> None:
    results, _ = race(problem, ("dense", LIMIT, 2.0), ("ours", OURS, 4.0), ("a", RIVAL, 10.0), ("b", RIVAL, 8.0))
    ours = results["ours"]
    assert (ours.p20_ms, ours.p50_ms, ours.p80_ms, ours.p50_queued_ms, ours.p50_host_ms) == (4, 4, 4, 2, 0.5)
    assert (ours.share_of_dense, ours.share_of_dense_queued, ours.peak_gib) == (0.5, 0.5, 0.5)
    assert (ours.p50_sustained_ms, ours.share_of_dense_sustained, ours.speedup_sustained) == (1, 0.5, 2)
    assert (ours.best_rival, ours.speedup_over_best_rival) == ("b", 2)
    assert (results["a"].speedup_over_best_rival, results["b"].speedup_over_best_rival) == (0.8, 1)
    assert (results["a"].speedup_sustained, results["dense"].speedup_sustained) == (0.8, None)
    assert ours.tflops == pytest.approx(problem.case.shape.base_flops(problem.case.tokens) / 4e-3 / 1e12)
    assert ours.errors == (0,) * 7
    assert results["dense"].errors == ()


def test_first_calls_and_warm_up_do_not_count(problem: Problem) -> None:
    results, _ = race(problem, ("dense", LIMIT, 1.0), ("ours", OURS, [900, 90, 80, 70, 60, 1, 2, 3, 4, 3]))
    assert results["ours"].p50_ms == 2.5
    assert results["ours"].p20_ms == pytest.approx(1.6)


def test_every_round_has_an_order_of_its_own_that_follows_from_the_seed(problem: Problem) -> None:
    truth = reference_step(problem)

    def rounds(problem: Problem) -> list[str]:
        calls: list[str] = []

        def way(name: str) -> Way:
            return Way(name, OURS, lambda _problem: Fake(name, [1.0], truth, calls))

        measure(problem, [way(name) for name in "abc"], FakeTimer(), repeats=5, tell=lambda _line: None)
        timed = "".join(calls[9:])
        return [timed[first : first + 3] for first in range(0, len(timed), 3)]

    orders = rounds(problem)
    assert len(orders) == 3 + 5 + 5 + 6
    assert {"".join(sorted(each)) for each in orders} == {"abc"}
    for some in (orders[:8], orders[8:13], orders[13:]):
        assert len(set(some)) > 1
    assert rounds(problem) == orders
    assert rounds(replace(problem, seed=problem.seed + 1)) != orders


def test_the_first_sustained_round_does_not_count(problem: Problem) -> None:
    step = Fake("ours", [1.0], reference_step(problem), [], [900, 5, 4, 3, 2, 1])
    (result,) = measure(problem, [Way("ours", OURS, lambda _problem: step)], FakeTimer(), repeats=1, tell=print)
    assert result.p50_sustained_ms == 3


def test_what_cannot_be_captured_has_no_sustained_time_and_the_others_have(problem: Problem) -> None:
    results, told = race(
        problem,
        ("dense", LIMIT, 2.0),
        ("ours", OURS, 4.0),
        ("synchronises", RIVAL, 6.0),
        ("wrong", RIVAL, 1.0),
        ("captured", RIVAL, 8.0),
    )
    synchronises = results["synchronises"]
    assert (synchronises.status, synchronises.p50_ms, synchronises.p50_queued_ms) == ("ok", 6, 3)
    assert (synchronises.p50_sustained_ms, synchronises.share_of_dense_sustained) == (None, None)
    assert synchronises.speedup_sustained is None
    assert (results["ours"].p50_sustained_ms, results["wrong"].p50_sustained_ms) == (1, 0.25)
    assert (results["ours"].best_rival, results["ours"].speedup_over_best_rival) == ("synchronises", 1.5)
    assert results["ours"].speedup_sustained == 2, "over the fastest rival that was captured and is right"
    said = (
        "no sustained time, it cannot be captured in a CUDA graph: RuntimeError: called a synchronizing CUDA operation"
    )
    assert [line for line in told.splitlines() if "sustained" in line] == [f"synchronises: {said}"]


def test_replays_that_fail_leave_the_other_times(problem: Problem) -> None:
    class Broken(FakeTimer):
        def sustained(self, turns: Sequence[tuple[Replay, int]]) -> list[float]:
            raise RuntimeError("an illegal memory access was encountered")

    told: list[str] = []
    way = Way("ours", OURS, lambda problem: Fake("ours", [1.0], reference_step(problem), []))
    (result,) = measure(problem, [way], Broken(), repeats=1, tell=told.append)
    assert (result.status, result.p50_ms, result.p50_sustained_ms) == ("ok", 1, None)
    assert told[-1] == "no sustained times: RuntimeError: an illegal memory access was encountered"


def test_what_fails_or_is_skipped_is_a_result_and_the_others_go_on(problem: Problem) -> None:
    results, told = race(
        problem,
        ("dense", LIMIT, 2.0),
        ("ours", OURS, 4.0),
        ("not here", RIVAL, Unavailable("the package axolotl is not installed")),
        ("too big", RIVAL, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")),
        ("wrong", RIVAL, 1.0),
        ("right", RIVAL, 8.0),
    )
    assert (results["not here"].status, results["not here"].note) == ("skipped", "the package axolotl is not installed")
    assert results["too big"].status == "failed"
    assert results["too big"].note == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."
    assert results["too big"].p50_ms is None
    assert (results["wrong"].status, results["wrong"].p50_ms) == ("wrong", 1.0)
    assert results["wrong"].note == "relative error 2.0e-01 in db_down"
    assert results["ours"].best_rival == "right", "a rival that computes something else is no rival"
    for line in ("skipped: not here: the package axolotl is not installed", "failed: too big: OutOfMemoryError"):
        assert line in told


@pytest.mark.parametrize("fails_at", [1, 3, 6, 12])
def test_a_way_that_fails_later_has_no_figures(problem: Problem, fails_at: int) -> None:
    truth = reference_step(problem)

    def failing(_problem: Problem) -> Step:
        calls: list[str] = []

        def step() -> tuple[torch.Tensor, ...]:
            calls.append("")
            if len(calls) == fails_at:
                raise RuntimeError("an illegal memory access was encountered")
            return truth

        return step

    ways = [Way("bad", RIVAL, failing), next(way for way in WAYS if way.name == "torch_grouped")]
    bad, good = measure(problem, ways, ClockTimer(), repeats=5, tell=lambda _line: None)
    assert (bad.status, bad.note) == ("failed", "RuntimeError: an illegal memory access was encountered")
    assert (bad.p50_ms, bad.p50_queued_ms, bad.tflops) == (None, None, None)
    assert good.status == "ok"
    assert good.best_rival is None
    assert good.p50_ms is not None


def test_on_the_cpu_a_step_is_called_as_often_as_it_is_replayed() -> None:
    calls: list[str] = []

    def step(name: str) -> Step:
        return lambda: calls.append(name) or ()  # type: ignore[func-returns-value]

    timer = ClockTimer()
    a, b = timer.capture(step("a")), timer.capture(step("b"))
    times_ms = timer.sustained([(a, 3), (b, 2), (a, 1)])
    assert "".join(calls[2:]) == "aaabba"
    assert len(times_ms) == 3
    assert all(ms > 0 for ms in times_ms)


def test_without_repeats_to_speak_of_the_fifths_are_the_median(problem: Problem) -> None:
    way = next(way for way in WAYS if way.name == "torch_grouped")
    (result,) = measure(problem, [way], ClockTimer(), repeats=1, tell=lambda _line: None)
    assert result.p20_ms == result.p50_ms == result.p80_ms


def test_an_interruption_is_not_taken_for_a_failure(problem: Problem) -> None:
    def interrupted(_problem: Problem) -> Step:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(problem, [replace(WAYS[0], build=interrupted)], ClockTimer(), repeats=1, tell=lambda _line: None)
