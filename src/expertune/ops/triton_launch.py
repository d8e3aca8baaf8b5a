"""Launching a Triton kernel at half of the usual cost for the host, or compiling it alone, ahead of its first launch.

A step of small experts is over before the host has launched it: every launch through `kernel[grid](...)` binds and
specialises all arguments anew (H200's host: 38 us for a projection's 40 arguments, 18 us through the compiled kernel).
A `Launcher` keeps the compiled kernels by what Triton specialises on, and goes straight to them.

Triton compiles anew for an int that is 1 or a multiple of 16 and a pointer that is aligned. What follows the number of
tokens is therefore in its kernel's `do_not_specialize`, so that batches of varying length compile nothing; a factor is
too, for it decides about nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache
from operator import itemgetter
from threading import Lock, RLock
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq
from triton.runtime import driver

MOST_KEPT = 4096  # keys of a launcher; then it begins anew, and Triton finds the kernels again
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ONE_ASKS = Lock()
_ONE_LOADS = RLock()
"""Who loads what launches a kernel. For Triton 3.6 that is a Python module, all of one name, whose file many kernels
share. What Python has read before it puts into the module that it has by that name: with two threads at once one gets
what launches the other's kernel."""

# What was compiled inside of `compile_only`; None outside of it.
_compiled_only: ContextVar[list[Any] | None] = ContextVar("compiled_only", default=None)


@triton.jit
def wait_for_earlier_kernels():  # type: ignore[no-untyped-def]
    """The first statement of every kernel of a `Launcher`: nothing before it may touch memory.

    From Hopper on a kernel is put on the multiprocessors while the one before it ends (programmatic dependent launch);
    here it waits until that one is done and its results are visible. H200, Qwen3-30B-A3B: 8192 tokens 3.00 to 2.96 ms,
    1024 tokens 0.97 to 0.94. To let the next kernel in earlier, at the start of each, is slower: 3.04 ms.
    """
    if not _INTERPRETED and cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


class Launcher:
    """Launches one kernel, which begins with `wait_for_earlier_kernels()`.

    Every parameter of the kernel, constants too, is given in order: a tensor or None if its name ends in `_ptr`, a
    descriptor or None if it ends in `_desc`, a number or a constant otherwise.

    Compiled kernels are kept by device, warps, stages, and of each argument at least what Triton specialises on: dtype
    and 16-byte alignment of a tensor, dtype and block of a descriptor, numbers and constants as they are; of what is in
    `do_not_specialize` only the type. What was not seen before is for Triton to find or to compile.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        parameters = getattr(kernel, "params", ())
        self._num_parameters = len(parameters)
        places = range(len(parameters))
        general = {place for place in places if parameters[place].do_not_specialize}
        pointers = {place for place in places if parameters[place].name.endswith("_ptr")}
        descriptors = {place for place in places if parameters[place].name.endswith("_desc")}
        numbers = {*places} - pointers - descriptors
        self._pointers, self._general_pointers = _pick(pointers - general), _pick(pointers & general)
        self._numbers, self._general_numbers = _pick(numbers - general), _pick(numbers & general)
        self._descriptors = _pick(descriptors)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3) -> None:
        ahead = _compiled_only.get()
        if not self._num_parameters:  # the interpreter
            if ahead is None:
                self.kernel[grid](*args)
            return
        device = torch.cuda.current_device()
        key = self._key(args, device, num_warps, num_stages)
        compiled = self._compiled.get(key)
        if compiled is None:
            options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
            if cuda_capability_geq(9, 0):
                options["launch_pdl"] = True
            if ahead is None:
                if len(self._compiled) == MOST_KEPT:
                    self._compiled.clear()
                with _ONE_LOADS:
                    self._compiled[key] = self.kernel[grid](*args, **options)
            else:
                ahead.append(self.kernel.warmup(*args, grid=grid, **options))
        elif ahead is None:
            _launch(compiled, device, (*grid, 1, 1)[:3], args)

    def _key(self, args: tuple[Any, ...], device: int, num_warps: int, num_stages: int) -> tuple[Any, ...]:
        if len(args) != self._num_parameters:
            raise TypeError(f"{self.kernel.__name__} takes {self._num_parameters} arguments, got {len(args)}")
        numbers, general = self._numbers(args), self._general_numbers(args)
        wide = None
        if general and (max(general) >= 2**31 or min(general) < -(2**31)):
            wide = tuple([-(2**31) <= number < 2**31 for number in general])
        return (
            device, num_warps, num_stages, wide, numbers,
            *map(type, numbers), *map(type, general),  # 1 is also True and 1.0
            *[None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in self._pointers(args)],
            *[None if x is None else x.dtype for x in self._general_pointers(args)],
            *[None if x is None else (x.base.dtype, *x.block_shape) for x in self._descriptors(args)],
        )  # fmt: skip


def _pick(places: set[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What takes the arguments at these places out of all, as fast as Python can."""
    if len(places) > 1:
        return itemgetter(*sorted(places))
    return lambda args: tuple([args[place] for place in places])


def _launch(compiled: Any, device: int, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """As `compiled[grid](*args)`; but that describes every launch for hooks (`ops.records`), also if there are none."""
    runtime = triton.knobs.runtime
    if getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True):
        compiled[grid](*args)
    else:
        stream = driver.active.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def make_descriptor(kind: type, base: Tensor, shape: Sequence[int], strides: Sequence[int], **rest: Any) -> Any:
    """A tensor descriptor of Triton's or gluon's, without the checks in its constructor.

    They take the host longer than the launch itself, step by step, for what our own checks of operands have seen.
    """
    descriptor: Any = object.__new__(kind)
    vars(descriptor).update(base=base, shape=shape, strides=strides, padding="zero", **rest)
    return descriptor


@contextmanager
def compile_only() -> Iterator[None]:
    """Inside, a `Launcher` compiles its kernel and does not launch it; kernels compile side by side.

    At the end every kernel is compiled and loaded, with what launches it. Triton 3.6 compiles that too, by the host's C
    compiler (7 of 11 seconds), and that is done side by side as well; one thread loads. What cannot be compiled is left
    to its launch, which raises Triton's error. For the interpreter there is nothing to do, nor inside of another one,
    which ends later.
    """
    if _compiled_only.get() is not None:
        yield
        return
    side_by_side = getattr(triton, "AsyncCompileMode", None)  # from Triton 3.6 on
    compiled: list[Any] = []
    before = _compiled_only.set(compiled)
    try:
        with _ONE_LOADS:
            with ThreadPoolExecutor(initializer=_use_device, initargs=(_current_device(),)) as threads:
                with nullcontext() if side_by_side is None else side_by_side(_Compiling(threads), ignore_errors=True):
                    yield
                if side_by_side is None:
                    list(threads.map(_build_launcher, compiled))
            for kernel in compiled:
                _load(kernel)
    finally:
        _compiled_only.reset(before)


class _Compiling:
    """What an `AsyncCompileMode` takes for an executor: it also compiles what launches what it has compiled."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads

    def submit(self, compile_one: Callable[[], Any]) -> "Future[Any]":
        def compile_both() -> Any:
            _build_launcher(kernel := compile_one())
            return kernel

        return self.threads.submit(compile_both)


def _build_launcher(kernel: Any) -> None:
    """Into Triton's cache on disk; what is loaded here is dropped, for it may be another kernel's (`_ONE_LOADS`)."""
    with suppress(Exception):
        driver.active.launcher_cls(kernel.src, kernel.metadata)


def _load(kernel: Any) -> None:
    with suppress(Exception):
        getattr(kernel, "result", lambda: kernel)().run  # noqa: B018 - a property that loads


def is_first(*what: object) -> bool:
    """Whether nobody asked with these arguments before, in whatever thread: who compiles ahead, and who need not."""
    with _ONE_ASKS:  # two threads that a cache misses for may get two locks
        turn = _turn_of(*what)
    return turn.acquire(blocking=False)


@cache
def _turn_of(*what: object) -> Lock:
    """The first who asks gets the lock, and keeps it."""
    return Lock()


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _use_device(device: int | None) -> None:
    """For a thread, which begins with the first GPU as the current one."""
    if device is not None:
        torch.cuda.set_device(device)


@cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_descriptors(device: torch.device) -> bool:
    """Whether the GPU copies tiles by descriptors in hardware (from Hopper on); the interpreter emulates them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the GPU has Hopper's tensor-core instructions, which no later one has."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
