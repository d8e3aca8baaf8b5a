"""One case: every way checked against the truth, then timed in turn in every repeat."""

import gc
import math
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
from expertune.bench.timing import Timer, Timing
from expertune.bench.truth import reference_step, relative_errors
from expertune.bench.ways import LIMIT, RIVAL, Way

OK, WRONG, SKIPPED, FAILED = "ok", "wrong", "skipped", "failed"
TENSORS = ("y", *GRADIENTS)
_WARM_UP_ROUNDS = 3
# bf16 ways are 4e-3 to 7e-3 from fp32; a lost adapter or a swapped expert is 0.3 and more.
_WRONG_ABOVE = 0.05
_LONGEST_NOTE = 200


@dataclass(frozen=True)
class Result:
    """What is known of one way in one case; None where there is nothing to know.

    status: "ok"; "wrong" (timed, but too far from fp32); "skipped" (cannot run here) or "failed", with the reason in
    note. first_call_s: building kernels and autotuning included. p20_ms, p50_ms, p80_ms: from an idle device.
    p50_queued_ms: with the host ahead. p50_host_ms: launching alone. peak_gib: above the inputs. tflops: of the base
    products. share_of_dense: the limit's time over this one's. speedup_over_best_rival: the fastest rival's time in
    this case over this one's. errors: relative L2 error of y and each gradient against fp32, in the order of TENSORS.
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
    p50_host_ms: float | None = None
    tflops: float | None = None
    share_of_dense: float | None = None
    share_of_dense_queued: float | None = None
    peak_gib: float | None = None
    best_rival: str | None = None
    speedup_over_best_rival: float | None = None
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

    timer: of the device that the problem is on. repeats: calls of each way, both idle and queued. tell: takes a line
    about what is going on.
    """
    truth = reference_step(problem)
    runs = [_Run(way) for way in ways]
    for run in runs:
        _build(run, problem, tell)
        run.attempt(partial(_check, run, truth, timer, tell), tell)
    del truth
    _time(runs, timer, repeats, tell)
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


def _time(runs: list[_Run], timer: Timer, repeats: int, tell: Callable[[str], None]) -> None:
    for round_ in range(_WARM_UP_ROUNDS + repeats):
        for run in runs:
            run.attempt(partial(_idle, run, timer, round_ >= _WARM_UP_ROUNDS), tell)
    for _ in range(repeats):
        for run in runs:
            run.attempt(partial(_queued, run, timer), tell)


def _idle(run: _Run, timer: Timer, counts: bool, step: Step) -> None:
    timing = timer.idle(step)
    if counts:
        run.idle.append(timing)


def _queued(run: _Run, timer: Timer, step: Step) -> None:
    host_ms = statistics.median(timing.host_ms for timing in run.idle)
    run.queued_ms.append(timer.queued(step, host_ms))


def _results(problem: Problem, runs: list[_Run]) -> list[Result]:
    idle = {run.way.name: _median([timing.device_ms for timing in run.idle]) for run in runs}
    queued = {run.way.name: _median(run.queued_ms) for run in runs}
    limit = next((run.way.name for run in runs if run.way.kind == LIMIT), "")
    rivals = [run.way.name for run in runs if run.way.kind == RIVAL and run.status == OK]
    best = min(rivals, key=lambda name: idle[name] or math.inf, default=None)
    flops = problem.case.shape.base_flops(problem.case.tokens)
    results = []
    for run in runs:
        p50_ms, p50_queued_ms = idle[run.way.name], queued[run.way.name]
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
                p50_host_ms=_median([timing.host_ms for timing in run.idle]),
                tflops=flops / p50_ms / 1e9 if p50_ms else None,
                share_of_dense=_ratio(idle.get(limit), p50_ms),
                share_of_dense_queued=_ratio(queued.get(limit), p50_queued_ms),
                peak_gib=None if run.peak_bytes is None else run.peak_bytes / 2**30,
                best_rival=best,
                speedup_over_best_rival=_ratio(idle[best], p50_ms) if best and run.way.kind != LIMIT else None,
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
