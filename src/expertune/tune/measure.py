"""One case: every candidate tile in turn on the whole expert MLP, forward and backward, beside the default tile."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from expertune.bench.measure import describe_error, release_memory
from expertune.bench.problem import GRADIENTS, Problem
from expertune.bench.rivals import Step
from expertune.bench.timing import Timer
from expertune.bench.truth import relative_errors
from expertune.bench.ways import ours
from expertune.errors import ExpertuneError
from expertune.ops.experts.scattermoe.tiling import LinearTile

OK, WRONG, FAILED = "ok", "wrong", "failed"
KEEP_FROM = 1.02  # times as fast as the default; on an H200 one tile's time differs by 1 % between runs
_WRONG_ABOVE = 0.01  # bf16 is 4e-3 to 7e-3 from fp32, and tiles differ in the order of fp32 sums alone
_WARM_UP_ROUNDS = 3

_WIDE = LinearTile()
CANDIDATES = (
    _WIDE,
    replace(_WIDE, halves=True, hopper=True),
    replace(_WIDE, halves=True),
    LinearTile(columns=256, k_step=32, num_stages=5),
    LinearTile(rows=256, columns=128),
    LinearTile(rows=64, halves=True),
    LinearTile(rows=64, num_stages=4),
    LinearTile(columns=128, num_stages=4),
    LinearTile(columns=128, halves=True),
    LinearTile(rows=64, columns=128, num_stages=4),
    LinearTile(rows=64, columns=128, num_warps=4, num_stages=4),
    LinearTile(rows=64, columns=128, num_warps=4, programs_per_sm=2),
    LinearTile(columns=128, k_step=32, num_stages=4, descriptors=False),
    LinearTile(columns=128, k_step=64, num_stages=3, descriptors=False),
    LinearTile(rows=64, columns=128, k_step=32, num_warps=4, num_stages=4, programs_per_sm=2, descriptors=False),
)
"""What is tried beside the default: tiles that fit 227 KiB, and some that fit 99."""

StepOf = Callable[[Problem, LinearTile], Step]


@dataclass
class Candidate:
    """A tile and what came of it; without a step it is out of the race.

    status: "ok", "wrong" (other results than the default's) or "failed", with the reason in note. ms: the median, with
    the host ahead, as in training; None where it was not timed to the end.
    """

    tile: LinearTile
    step: Step | None = None
    status: str = OK
    note: str = ""
    ms: float | None = None
    host_ms: float = 0.0
    times_ms: list[float] = field(default_factory=list)

    def drop(self, status: str, note: str) -> None:
        self.status, self.note, self.step, self.ms = status, note, None, None
        self.times_ms.clear()


@dataclass(frozen=True)
class Outcome:
    """The candidates, the default first, and whether the fastest was worth keeping, twice in a row."""

    candidates: tuple[Candidate, ...]
    best: Candidate
    keep: bool

    @property
    def default(self) -> Candidate:
        return self.candidates[0]

    @property
    def speedup(self) -> float:
        """The default's time over the best one's, in the last race of the two."""
        assert self.default.ms is not None
        assert self.best.ms is not None
        return self.default.ms / self.best.ms


def scattermoe_step(problem: Problem, tile: LinearTile) -> Step:
    """Plan, forward and backward with a tile."""
    from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
    from expertune.ops.experts.scattermoe.products import build_plan_and_tables

    return ours(partial(scattermoe_expert_mlp, tile=tile), problem, partial(build_plan_and_tables, tile=tile))


def describe_tile(tile: LinearTile) -> str:
    """A tile in a few words, as in "128x256x64, 8 warps, 3 stages"."""
    parts = [f"{tile.rows}x{tile.columns}x{tile.k_step}, {tile.num_warps} warps, {tile.num_stages} stages"]
    parts += [f"{tile.programs_per_sm} per SM"] if tile.programs_per_sm > 1 else []
    parts += ["no descriptors"] if not tile.descriptors else []
    parts += ["halves"] if tile.halves else []
    parts += ["hopper"] if tile.hopper else []
    return ", ".join(parts)


def race(
    problem: Problem,
    default: LinearTile,
    others: Sequence[LinearTile],
    timer: Timer,
    *,
    repeats: int,
    tell: Callable[[str], None],
    shared_memory_bytes: int | None = None,
    step_of: StepOf = scattermoe_step,
) -> Outcome:
    """Check and time every tile on one problem; the fastest has to win a second race, against the default alone.

    repeats: timed calls of each tile. shared_memory_bytes: the most that a program can have, None for no limit. tell:
    takes a line about what drops out. Raises ExpertuneError if the default tile itself cannot run.
    """
    candidates = [Candidate(tile) for tile in dict.fromkeys((default, *others))]
    results: tuple[Tensor, ...] | None = None
    for candidate in candidates:
        results = _prepare(candidate, problem, results, timer, shared_memory_bytes, step_of)
        if candidate is candidates[0]:
            _insist(candidate)
        if candidate.status != OK:
            tell(f"{candidate.status}: {describe_tile(candidate.tile)}: {candidate.note}")
            release_memory()
    del results
    _time(candidates, timer, repeats, tell)
    best = _fastest(candidates)
    keep = best is not candidates[0] and _is_worth(candidates[0], best)
    if keep:  # the fastest of many is partly the luckiest: it has to do it again
        _time([candidates[0], best], timer, repeats, tell)
        keep = best.status == OK and _is_worth(candidates[0], best)
        best = best if best.status == OK else candidates[0]
    for candidate in candidates:
        candidate.step = None  # it holds the problem's tensors
    return Outcome(tuple(candidates), best, keep)


def _prepare(
    candidate: Candidate,
    problem: Problem,
    expected: tuple[Tensor, ...] | None,
    timer: Timer,
    shared_memory_bytes: int | None,
    step_of: StepOf,
) -> tuple[Tensor, ...] | None:
    """Compile a candidate and compare its results; returns the default's, which the first call makes."""
    need_bytes = candidate.tile.shared_memory_bytes(problem.x_TH.element_size())
    if shared_memory_bytes is not None and need_bytes > shared_memory_bytes:
        kib = f"needs up to {need_bytes / 1024:.1f} KiB of shared memory, the GPU has {shared_memory_bytes / 1024:.1f}"
        candidate.drop(FAILED, kib)
        return expected
    try:
        step = step_of(problem, candidate.tile)
        timer.idle(step)  # compiles
        results = step()
        errors = () if expected is None else relative_errors(results, [each.float() for each in expected])
    except Exception as error:  # a compiler's refusal can be of any type
        candidate.drop(FAILED, describe_error(error))
        return expected
    if errors and not max(errors) <= _WRONG_ABOVE:
        worst = ("y", *GRADIENTS)[errors.index(max(errors))]
        candidate.drop(WRONG, f"relative difference {max(errors):.1e} in {worst} from the default tile's")
    else:
        candidate.step = step
    return results if expected is None else expected


def _time(candidates: Sequence[Candidate], timer: Timer, repeats: int, tell: Callable[[str], None]) -> None:
    """All in turn in every round; the default comes first and must not fail."""
    for candidate in candidates:
        candidate.times_ms.clear()
    for round_ in range(_WARM_UP_ROUNDS + repeats):
        for candidate in candidates:
            if candidate.step is None:
                continue
            try:
                if round_ < _WARM_UP_ROUNDS:
                    candidate.host_ms = timer.idle(candidate.step).host_ms
                else:
                    candidate.times_ms.append(timer.queued(candidate.step, candidate.host_ms))
            except Exception as error:
                candidate.drop(FAILED, describe_error(error))
                tell(f"{FAILED}: {describe_tile(candidate.tile)}: {candidate.note}")
            if candidate is candidates[0]:
                _insist(candidate)
    for candidate in candidates:
        candidate.ms = statistics.median(candidate.times_ms) if candidate.times_ms else None


def _insist(default: Candidate) -> None:
    if default.status != OK:
        raise ExpertuneError(f"the default tile ({describe_tile(default.tile)}) cannot run: {default.note}")


def _fastest(candidates: Sequence[Candidate]) -> Candidate:
    return min((each for each in candidates if each.ms is not None), key=lambda each: each.ms or 0.0)


def _is_worth(default: Candidate, best: Candidate) -> bool:
    return default.ms is not None and best.ms is not None and default.ms >= KEEP_FROM * best.ms
