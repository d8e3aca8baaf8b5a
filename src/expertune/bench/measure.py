"""One case: every way checked against the truth, then timed in turn, in another order in every round."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from expertune.bench.problem import GRADIENTS, Problem
from expertune.bench.rivals import Step, Unavailable
from expertune.bench.timing import Replay, Timer, Timing
from expertune.bench.truth import reference_step, relative_errors
from expertune.bench.ways import LIMIT, RIVAL, Way

OK, WRONG, SKIPPED, FAILED = "ok", "wrong", "skipped", "failed"
TENSORS = ("y", *GRADIENTS)
_WARM_UP_ROUNDS = 3
_SUSTAINED_ROUNDS = 6  # the first one warms up
_FEWEST_REPLAYS = 2
# bf16 ways are 4e-3 to 7e-3 from fp32; a lost adapter or a swapped expert is 0.3 and more.
_WRONG_ABOVE = 0.05
_LONGEST_NOTE = 200


@dataclass(frozen=True)
class Result:
    """What is known of one way in one case; None where there is nothing to know.

    status: "ok"; "wrong" (timed, but too far from fp32); "skipped" (cannot run here) or "failed", with the reason in
    note. first_call_s: building kernels and autotuning included. p20_ms, p50_ms, p80_ms: from an idle device.
    p50_queued_ms: with the host ahead. p50_sustained_ms: captured and replayed back to back. p50_host_ms: launching
    alone. peak_gib: above the inputs. tflops: of the base products, from an idle device. share_of_dense: the limit's
    time over this one's. best_rival: the fastest from an idle device. speedup_over_best_rival: its time over this
    one's. speedup_sustained: the same of sustained times, where another rival may be the fastest. errors: relative L2
    error of y and each gradient against fp32, in the order of TENSORS.
    """

    way: str
    kind: str
    status: str
    note: str = ""
    first_call_s: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    p50_queued_ms: float | None = None
    p50_sustained_ms: float | None = None
    p50_host_ms: float | None = None
    tflops: float | None = None
    share_of_dense: float | None = None
    share_of_dense_queued: float | None = None
    share_of_dense_sustained: float | None = None
    peak_gib: float | None = None
    best_rival: str | None = None
    speedup_over_best_rival: float | None = None
    speedup_sustained: float | None = None
    errors: tuple[float, ...] = ()

    @property
    def worst_error(self) -> float | None:
        return max(self.errors) if self.errors else None


@dataclass
class _Run:
    """A way while it is measured; without a step it is out of the race."""

    way: Way
    step: Step | None = None
    status: str = OK
    note: str = ""
    first_call_s: float | None = None
    peak_bytes: int | None = None
    errors: tuple[float, ...] = ()
    idle: list[Timing] = field(default_factory=list)
    queued_ms: list[float] = field(default_factory=list)
    sustained_ms: list[float] = field(default_factory=list)

    def attempt(self, action: Callable[[Step], None], tell: Callable[[str], None]) -> None:
        """Do something with the step; an error ends this way, not the run."""
        if self.step is None:
            return
        try:
            action(self.step)
        except Exception as error:
            note = describe_error(error)
        else:
            return
        self.drop(FAILED, note, tell)  # only here, where the traceback no longer holds the step's tensors

    def drop(self, status: str, note: str, tell: Callable[[str], None]) -> None:
        self.status, self.note, self.step = status, note, None
        self.idle.clear()
        self.queued_ms.clear()
        tell(f"{status}: {self.way.name}: {note}")
        release_memory()


def measure(
    problem: Problem, ways: Sequence[Way], timer: Timer, *, repeats: int, tell: Callable[[str], None]
) -> list[Result]:
    """Check and time every way on one problem; what cannot run or fails is a result too.

    Clocks drop and caches fill while a round goes on, so that a fixed order would favour some ways: every round has its
    own, drawn with the problem's seed.

    timer: of the device that the problem is on. repeats: calls of each way, both idle and queued. tell: takes a line
    about what is going on.
    """
    truth = reference_step(problem)
    release_memory()  # what the truth needed is kept for its stream, the timer's calls run on another
    runs = [_Run(way) for way in ways]
    for run in runs:
        _build(run, problem, tell)
        run.attempt(partial(_check, run, truth, timer, tell), tell)
    del truth
    order = random.Random(problem.seed)
    _time(runs, timer, repeats, order, tell)
    _sustain(runs, timer, order, tell)
    release_memory()  # the graphs hold what their steps work in
    return _results(problem, runs)


def _build(run: _Run, problem: Problem, tell: Callable[[str], None]) -> None:
    try:
        run.step = run.way.build(problem)
    except Unavailable as error:
        status, note = SKIPPED, str(error)
    except Exception as error:
        status, note = FAILED, describe_error(error)
    else:
        return
    run.drop(status, note, tell)


def _check(run: _Run, truth: Sequence[Tensor], timer: Timer, tell: Callable[[str], None], step: Step) -> None:
    """First call, memory and errors."""
    started = time.perf_counter()
    timer.idle(step)
    run.first_call_s = time.perf_counter() - started
    tell(f"{run.way.name}: first call {run.first_call_s:.2f} s")
    timer.idle(step)  # settles what the first call left behind in caches and in the allocator
    run.peak_bytes, outputs = timer.peak_bytes(step)
    if run.way.kind == LIMIT:
        return
    run.errors = relative_errors(outputs, truth)
    worst = max(run.errors)
    if not worst <= _WRONG_ABOVE:
        run.status, run.note = WRONG, f"relative error {worst:.1e} in {TENSORS[run.errors.index(worst)]}"
        tell(f"{WRONG}: {run.way.name}: {run.note}")


def _time(runs: Sequence[_Run], timer: Timer, repeats: int, order: random.Random, tell: Callable[[str], None]) -> None:
    for round_ in range(_WARM_UP_ROUNDS + repeats):
        for run in order.sample(runs, len(runs)):
            run.attempt(partial(_idle, run, timer, round_ >= _WARM_UP_ROUNDS), tell)
    for _ in range(repeats):
        for run in order.sample(runs, len(runs)):
            run.attempt(partial(_queued, run, timer), tell)


def _idle(run: _Run, timer: Timer, counts: bool, step: Step) -> None:
    timing = timer.idle(step)
    if counts:
        run.idle.append(timing)


def _queued(run: _Run, timer: Timer, step: Step) -> None:
    host_ms = statistics.median(timing.host_ms for timing in run.idle)
    run.queued_ms.append(timer.queued(step, host_ms))


def _sustain(runs: Sequence[_Run], timer: Timer, order: random.Random, tell: Callable[[str], None]) -> None:
    """All rounds at once, of the ways that can be captured; the others have no sustained time, and go on without."""
    captured = []
    for run in runs:
        replay = _capture(run, timer, tell)
        if replay is not None:
            num_replays = math.ceil(timer.turn_ms / statistics.median(run.queued_ms))
            captured.append((run, replay, max(num_replays, _FEWEST_REPLAYS)))
    turns = [turn for _ in range(_SUSTAINED_ROUNDS) for turn in order.sample(captured, len(captured))]
    try:
        times_ms = timer.sustained([(replay, num_replays) for _, replay, num_replays in turns])
    except Exception as error:
        tell(f"no sustained times: {describe_error(error)}")
        return
    for (run, *_), ms in list(zip(turns, times_ms, strict=True))[len(captured) :]:
        run.sustained_ms.append(ms)


def _capture(run: _Run, timer: Timer, tell: Callable[[str], None]) -> Replay | None:
    if run.step is None:
        return None
    try:
        return timer.capture(run.step)
    except Exception as error:
        note = describe_error(error)
    tell(f"{run.way.name}: no sustained time, it cannot be captured in a CUDA graph: {note}")
    release_memory()  # only here, where the traceback no longer holds the step's tensors
    return None


def _results(problem: Problem, runs: list[_Run]) -> list[Result]:
    idle = {run.way.name: _median([timing.device_ms for timing in run.idle]) for run in runs}
    queued = {run.way.name: _median(run.queued_ms) for run in runs}
    sustained = {run.way.name: _median(run.sustained_ms) for run in runs}
    limit = next((run.way.name for run in runs if run.way.kind == LIMIT), "")
    rivals = [run.way.name for run in runs if run.way.kind == RIVAL and run.status == OK]
    best = min(rivals, key=lambda name: idle[name] or math.inf, default=None)
    best_sustained_ms = min((ms for name in rivals if (ms := sustained[name])), default=None)
    flops = problem.case.shape.base_flops(problem.case.tokens)
    results = []
    for run in runs:
        p50_ms, p50_queued_ms, p50_sustained_ms = (times[run.way.name] for times in (idle, queued, sustained))
        p20_ms, p80_ms = _outer_fifths([timing.device_ms for timing in run.idle])
        results.append(
            Result(
                way=run.way.name,
                kind=run.way.kind,
                status=run.status,
                note=run.note,
                first_call_s=run.first_call_s,
                p20_ms=p20_ms,
                p50_ms=p50_ms,
                p80_ms=p80_ms,
                p50_queued_ms=p50_queued_ms,
                p50_sustained_ms=p50_sustained_ms,
                p50_host_ms=_median([timing.host_ms for timing in run.idle]),
                tflops=flops / p50_ms / 1e9 if p50_ms else None,
                share_of_dense=_ratio(idle.get(limit), p50_ms),
                share_of_dense_queued=_ratio(queued.get(limit), p50_queued_ms),
                share_of_dense_sustained=_ratio(sustained.get(limit), p50_sustained_ms),
                peak_gib=None if run.peak_bytes is None else run.peak_bytes / 2**30,
                best_rival=best,
                speedup_over_best_rival=_ratio(idle[best], p50_ms) if best and run.way.kind != LIMIT else None,
                speedup_sustained=_ratio(best_sustained_ms, p50_sustained_ms) if run.way.kind != LIMIT else None,
                errors=run.errors,
            )
        )
    return results


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _outer_fifths(values: list[float]) -> tuple[float | None, float | None]:
    """p20 and p80."""
    if len(values) < 2:
        return _median(values), _median(values)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[7]


def describe_error(error: Exception) -> str:
    """An exception in one line."""
    first_line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first_line.strip()}"[:_LONGEST_NOTE]


def release_memory() -> None:
    """Give back to the device what a failed or finished way held, for the next to use."""
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after an illegal access every call fails; the next way will say so
            torch.cuda.empty_cache()
