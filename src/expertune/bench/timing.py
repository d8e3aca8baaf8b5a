"""How a step is timed: by events on a GPU; by the clock on the CPU, where it serves the tests."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from expertune.bench.graphs import capture
from expertune.bench.rivals import Step
from expertune.errors import ConfigError

_MIN_HOLD_MS = 2.0  # the host needs 0.3 to 2 ms to launch a step
_MAX_HOLD_MS = 25.0
_CALIBRATION_CYCLES = 4_000_000  # about 2 ms
_SETTLING_TURNS = 2  # of replays before those that count

Replay = Callable[[], object]
"""A captured step: one launch does all of it."""


class Timing(NamedTuple):
    """Milliseconds that a step took on the device, and that the host took to launch it."""

    device_ms: float
    host_ms: float


class Timer(Protocol):
    """Times single calls of a step, and many back to back."""

    def idle(self, step: Step) -> Timing:
        """From an idle device, as the first layer of a model meets it: gaps between launches count."""

    def queued(self, step: Step, host_ms: float) -> float:
        """The device's milliseconds where the host runs ahead: gaps between launches do not count.

        host_ms: what launching the step takes; the device is held up for longer than that.
        """

    @property
    def turn_ms(self) -> float:
        """How long a turn of `sustained` should last."""

    def capture(self, step: Step) -> Replay:
        """The whole step, forward and backward, ready for `sustained`; raises what it is that cannot be captured."""

    def sustained(self, turns: Sequence[tuple[Replay, int]]) -> list[float]:
        """Milliseconds of a replay in each turn, a captured step and how often it counts; all of them without a pause.

        As in training, which runs step after step at the power limit: `queued` holds the device up before each call,
        so that it is cool and its clocks are highest. And the host of some machines needs longer to launch a step than
        the device to run it; a replay is a single launch. Before those that count a turn has twice as many that do not,
        for clocks that are the step's own: they follow the power drawn in the last tenths of a second.
        """

    def peak_bytes(self, step: Step) -> tuple[int | None, tuple[torch.Tensor, ...]]:
        """The most memory above what was there before, and what the step returned."""


@dataclass(frozen=True)
class CudaTimer:
    """Device events.

    cycles_per_ms: of the spinning kernel that holds the device up. stream: where every call runs, because no step can
    be captured on the default stream, nor on another one than its earlier calls.
    """

    cycles_per_ms: float
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    turn_ms: float = 60.0

    @classmethod
    def calibrated(cls) -> "CudaTimer":
        times = []
        for _ in range(4):
            start, end = _event(), _event()
            start.record()
            torch.cuda._sleep(_CALIBRATION_CYCLES)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return cls(_CALIBRATION_CYCLES / statistics.median(times))

    def idle(self, step: Step) -> Timing:
        start, end = _event(), _event()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            started = time.perf_counter()
            start.record()
            step()
            end.record()
            host_ms = 1000 * (time.perf_counter() - started)
        end.synchronize()
        return Timing(start.elapsed_time(end), host_ms)

    def queued(self, step: Step, host_ms: float) -> float:
        start, end = _event(), _event()
        hold_ms = min(max(_MIN_HOLD_MS, 1.5 * host_ms), _MAX_HOLD_MS)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int(hold_ms * self.cycles_per_ms))
            start.record()
            step()
            end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def capture(self, step: Step) -> Replay:
        return capture(step, self.stream)

    def sustained(self, turns: Sequence[tuple[Replay, int]]) -> list[float]:
        marks = [(_event(), _event()) for _ in turns]
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for (replay, num_replays), (start, end) in zip(turns, marks, strict=True):
                for i in range(_SETTLING_TURNS * num_replays + num_replays):
                    if i == _SETTLING_TURNS * num_replays:
                        start.record()
                    replay()
                end.record()
        torch.cuda.synchronize()
        return [
            start.elapsed_time(end) / num_replays for (start, end), (_, num_replays) in zip(marks, turns, strict=True)
        ]

    def peak_bytes(self, step: Step) -> tuple[int | None, tuple[torch.Tensor, ...]]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.cuda.stream(self.stream):
            result = step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result


def find_gpu(command: str) -> tuple[torch.device, Timer]:
    """The device that `command` measures on, and its timer; raises ConfigError if there is none."""
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        raise ConfigError(
            f"{command} needs an NVIDIA GPU, and this machine has none that torch can use (torch is built for "
            f"{built}); `expertune doctor` says more"
        )
    return torch.device("cuda", torch.cuda.current_device()), CudaTimer.calibrated()


class ClockTimer:
    """Wall time; nothing is queued or captured on the CPU, and its memory is not counted."""

    turn_ms = 0.0

    def idle(self, step: Step) -> Timing:
        started = time.perf_counter()
        step()
        took_ms = 1000 * (time.perf_counter() - started)
        return Timing(took_ms, took_ms)

    def queued(self, step: Step, host_ms: float) -> float:
        return self.idle(step).device_ms

    def capture(self, step: Step) -> Replay:
        step()
        return step

    def sustained(self, turns: Sequence[tuple[Replay, int]]) -> list[float]:
        times_ms = []
        for replay, num_replays in turns:
            started = time.perf_counter()
            for _ in range(num_replays):
                replay()
            times_ms.append(1000 * (time.perf_counter() - started) / num_replays)
        return times_ms

    def peak_bytes(self, step: Step) -> tuple[int | None, tuple[torch.Tensor, ...]]:
        return None, step()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
