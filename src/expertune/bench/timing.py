"""How a step is timed: by events on a GPU; by the clock on the CPU, where it serves the tests."""

import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from expertune.bench.rivals import Step
from expertune.errors import ConfigError

_MIN_HOLD_MS = 2.0  # the host needs 0.3 to 2 ms to launch a step
_MAX_HOLD_MS = 25.0
_CALIBRATION_CYCLES = 4_000_000  # about 2 ms


class Timing(NamedTuple):
    """Milliseconds that a step took on the device, and that the host took to launch it."""

    device_ms: float
    host_ms: float


class Timer(Protocol):
    """Times single calls of a step."""

    def idle(self, step: Step) -> Timing:
        """From an idle device, as the first layer of a model meets it: gaps between launches count."""

    def queued(self, step: Step, host_ms: float) -> float:
        """The device's milliseconds where the host runs ahead, as in training: gaps between launches do not count.

        host_ms: what launching the step takes; the device is held up for longer than that.
        """

    def peak_bytes(self, step: Step) -> tuple[int | None, tuple[torch.Tensor, ...]]:
        """The most memory above what was there before, and what the step returned."""


@dataclass(frozen=True)
class CudaTimer:
    """Device events. cycles_per_ms: of the spinning kernel that holds the device up."""

    cycles_per_ms: float

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
        torch.cuda._sleep(int(hold_ms * self.cycles_per_ms))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, step: Step) -> tuple[int | None, tuple[torch.Tensor, ...]]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
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
    """Wall time; nothing is queued on the CPU, and its memory is not counted."""

    def idle(self, step: Step) -> Timing:
        started = time.perf_counter()
        step()
        took_ms = 1000 * (time.perf_counter() - started)
        return Timing(took_ms, took_ms)

    def queued(self, step: Step, host_ms: float) -> float:
        return self.idle(step).device_ms

    def peak_bytes(self, step: Step) -> tuple[int | None, tuple[torch.Tensor, ...]]:
        return None, step()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
