"""Which kernels of ours ran: their shapes, tiles and median times, seen through Triton's launch hooks.

A kernel that wants to be on record says so where it is declared:

    @LaunchDescription
    def _describe(grid, metadata, args):
        return {"name": "expert_linear", "shape": f"X{args['num_in']} Y{args['num_out']}", "tile": "128x256x64"}

    @triton.jit(launch_metadata=_describe)
    def _expert_linear_kernel(...): ...

The hooks see every launch of the process, those of autograd's threads too. Nothing is called, timed or kept unless a
`KernelRecorder` is started; without one a description costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from threading import Lock, get_ident
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch

MAX_SAMPLES = 64  # of one kernel, shape and tile: a median needs no more, and a step of 48 layers launches thousands


@dataclass(frozen=True)
class KernelRecord:
    """How one kernel ran on one shape with one tile.

    name, shape, tile: as its `LaunchDescription` says. num_warps, num_stages, shared_memory_bytes: as it was compiled.
    calls: launches that were seen; a launch captured in a CUDA graph counts once, its replays are not seen.
    median_ms: between events around the first launches (`MAX_SAMPLES`); where the GPU waits for the host, the wait for
    the launch itself is in it (some 10 microseconds). None if none could be timed.
    """

    name: str
    shape: str
    tile: str
    num_warps: int
    num_stages: int
    shared_memory_bytes: int
    calls: int
    median_ms: float | None


@dataclass(frozen=True)
class GpuFacts:
    """What decides whether a tile fits and how fast it is. shared_memory_bytes: the most that one block can ask for."""

    name: str
    capability: str
    memory_bytes: int
    shared_memory_bytes: int
    num_multiprocessors: int


def gpu_facts(device: torch.device) -> GpuFacts | None:
    """Describe a GPU; None for a device that is none."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    # not in torch's type stubs, and not there on ROCm
    shared_memory_bytes = getattr(gpu, "shared_memory_per_block_optin", gpu.shared_memory_per_block)
    return GpuFacts(
        name=gpu.name,
        capability=f"{gpu.major}.{gpu.minor}",
        memory_bytes=gpu.total_memory,
        shared_memory_bytes=shared_memory_bytes,
        num_multiprocessors=gpu.multi_processor_count,
    )


@dataclass(frozen=True)
class LaunchDescription:
    """What a kernel of ours passes to `triton.jit(launch_metadata=...)`; also a decorator for the function it wraps.

    describe: `fn(grid, metadata, args)` that returns "name", "shape" and "tile", all str. grid: the launch's tuple.
    metadata: what Triton compiled (`num_warps`, `num_stages`, `shared`, ...), which is added to the description here.
    args: every parameter of the kernel by name, constexprs too, as the launch got them: tensors, descriptors, None.
    It runs on the host before a launch: it must read nothing from the device.

    The type tells our kernels from others: some libraries synchronise in their descriptions, so theirs are not called.
    """

    describe: Callable[[Any, Any, dict[str, Any]], dict[str, Any]]

    def __call__(self, grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
        compiled = {"num_warps": metadata.num_warps, "num_stages": metadata.num_stages, "shared": metadata.shared}
        return compiled | self.describe(grid, metadata, args)


class Clock(Protocol):
    """What a recorder times with."""

    def can_time(self) -> bool:
        """Say whether an event recorded now can be read later."""
        ...

    def event(self) -> Any:
        """Record an event now, on the current stream."""
        ...

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Wait until both events are over, and return what lies between."""
        ...


class CudaClock:
    """CUDA events on the current stream of the calling thread; none while the stream is captured into a graph."""

    def can_time(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)


_KEYS = ("name", "shape", "tile", "num_warps", "num_stages", "shared")  # of a description, in the order of _Key


class _Key(NamedTuple):
    name: str
    shape: str
    tile: str
    num_warps: int
    num_stages: int
    shared_memory_bytes: int


@dataclass
class _Samples:
    calls: int = 0
    events: list[tuple[Any, Any]] = field(default_factory=list)


class KernelRecorder:
    """Count and time the launches of our Triton kernels between `start` and `stop`, or inside a `with` block.

    It can be started and stopped many times and sums up until `reset`. Launches of any thread are seen. Each costs one
    description and two events, and the host never waits before `summarise`. Without Triton, and in its interpreter,
    nothing is seen.

    max_samples: how many launches of one kernel, shape and tile are timed. clock: what to time with.
    problem: why something could not be recorded, None if nothing went wrong.
    """

    def __init__(self, *, max_samples: int = MAX_SAMPLES, clock: Clock | None = None) -> None:
        self.problem: str | None = None
        self._max_samples = max_samples
        self._clock = CudaClock() if clock is None else clock
        self._chains: tuple[Any, Any] | None = None
        self._samples: dict[_Key, _Samples] = {}
        self._under_way: dict[int, tuple[_Samples, Any]] = {}  # by thread: its launch between the two hooks
        self._lock = Lock()

    def start(self) -> None:
        """Hang the hooks in. Does nothing if they are in already, or where there is no Triton."""
        if self._chains is None:
            self._chains = self._find_chains()
        if self._chains is not None:
            self._chains[0].add(self._on_enter)
            self._chains[1].add(self._on_exit)

    def stop(self) -> None:
        """Take the hooks out. Does nothing if they are out already."""
        if self._chains is not None:
            self._chains[0].remove(self._on_enter)
            self._chains[1].remove(self._on_exit)
            self._chains = None
        self._under_way.clear()

    def reset(self) -> None:
        """Forget what was recorded."""
        with self._lock:
            self._samples.clear()
        self.problem = None

    def __enter__(self) -> "KernelRecorder":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def summarise(self) -> tuple[KernelRecord, ...]:
        """Wait for the launches that were timed, and return the records, most of the time (calls x median) first."""
        with self._lock:
            seen = [(key, samples.calls, list(samples.events)) for key, samples in self._samples.items()]
        records = []
        for key, calls, events in seen:
            times_ms = [self._clock.elapsed_ms(start, end) for start, end in events]
            if calls:
                records.append(KernelRecord(*key, calls=calls, median_ms=median(times_ms) if times_ms else None))
        return tuple(sorted(records, key=lambda record: -record.calls * (record.median_ms or 0.0)))

    def _find_chains(self) -> tuple[Any, Any] | None:
        try:
            runtime = import_module("triton.knobs").runtime
        except ImportError:
            return None
        chains = runtime.launch_enter_hook, runtime.launch_exit_hook
        if not all(hasattr(chain, "add") and hasattr(chain, "remove") for chain in chains):
            self.problem = "Triton's launch hooks are no chains: too old a Triton, or they were replaced"
            return None
        return chains

    def _on_enter(self, launch: Any) -> None:
        thread = get_ident()
        self._under_way.pop(thread, None)  # its launch failed: Triton called no exit hook
        key = self._key(launch)
        if key is None:
            return
        with self._lock:
            samples = self._samples.setdefault(key, _Samples())
        timed = len(samples.events) < self._max_samples and self._clock.can_time()
        self._under_way[thread] = samples, self._clock.event() if timed else None

    def _on_exit(self, launch: Any) -> None:
        samples, start = self._under_way.pop(get_ident(), (None, None))
        if samples is None:
            return
        end = None if start is None else self._clock.event()
        with self._lock:
            samples.calls += 1
            if end is not None and len(samples.events) < self._max_samples:
                samples.events.append((start, end))

    def _key(self, launch: Any) -> _Key | None:
        """Describe a launch, a LazyDict of Triton's: its `extras` hold (function, arguments) until the first `get`."""
        described = any(isinstance(function, LaunchDescription) for function, _ in launch.extras)
        if not described and (launch.extras or not all(name in launch.data for name in _KEYS)):
            return None  # not ours; with our keys and no extras it is ours, and an earlier hook called `get`
        try:
            data = launch.get()
            name, shape, tile = (str(data[key]) for key in _KEYS[:3])
            return _Key(name, shape, tile, *(int(data[key]) for key in _KEYS[3:]))
        except Exception as error:  # whatever a description does wrong, a record is no reason to stop a training
            self.problem = f"a launch could not be described: {type(error).__name__}: {error}"
            return None
