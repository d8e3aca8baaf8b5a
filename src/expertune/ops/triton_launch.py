"""Launching a Triton kernel at half of the usual cost for the host, or compiling it alone, ahead of its first launch.

A step of small experts is over before the host has launched it: every launch through `kernel[grid](...)` binds and
specialises all arguments anew (H200's host: 38 us for a projection's 40 arguments, 18 us through the compiled kernel).
A `Launcher` keeps the compiled kernels by what Triton specialises on, and goes straight to them.

Triton compiles anew for an int that is 1 or a multiple of 16 and a pointer that is aligned. What follows the number of
tokens is therefore in its kernel's `do_not_specialize`, so that batches of varying length compile nothing.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.language.target_info import cuda_capability_geq
from triton.tools.tensor_descriptor import TensorDescriptor

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
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

    Every parameter of the kernel, constants too, is given in order.

    Compiled kernels are kept by device, warps, stages, and of each argument what Triton specialises on: dtype and
    16-byte alignment of a tensor, dtype and block of a descriptor, whether an int is 1 or a multiple of 16 or wide,
    and the value of a constant. Of a parameter in `do_not_specialize`: dtype, and whether an int is wide.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        parameters = getattr(kernel, "params", ())
        self._num_parameters = len(parameters)
        self._constants = tuple(place for place, parameter in enumerate(parameters) if parameter.is_constexpr)
        self._others = tuple(
            (place, bool(parameter.do_not_specialize))
            for place, parameter in enumerate(parameters)
            if not parameter.is_constexpr
        )
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3) -> None:
        ahead = _compiled_only.get()
        if not self._num_parameters:  # the interpreter
            if ahead is None:
                self.kernel[grid](*args)
            return
        key = self._key(args, num_warps, num_stages)
        compiled = self._compiled.get(key)
        if compiled is None:
            options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
            if cuda_capability_geq(9, 0):
                options["launch_pdl"] = True
            if ahead is None:
                self._compiled[key] = self.kernel[grid](*args, **options)
            else:
                ahead.append(self.kernel.warmup(*args, grid=grid, **options))
        elif ahead is None:
            compiled[(*grid, 1, 1)[:3]](*args)

    def _key(self, args: tuple[Any, ...], num_warps: int, num_stages: int) -> tuple[Any, ...]:
        if len(args) != self._num_parameters:
            raise TypeError(f"{self.kernel.__name__} takes {self._num_parameters} arguments, got {len(args)}")
        key: list[Any] = [torch.cuda.current_device(), num_warps, num_stages]
        key += [args[place] for place in self._constants]
        for place, general in self._others:
            arg = args[place]
            kind = type(arg)
            if kind is int:  # wide, 1, a multiple of 16 or neither
                wide = not -(2**31) <= arg < 2**31
                key.append(64 if wide else 0 if general else 1 if arg == 1 else 16 if arg % 16 == 0 else 0)
            elif arg is None or kind is float:
                key.append(kind)
            elif kind in (TensorDescriptor, GluonTensorDescriptor):
                key.append((arg.base.dtype, *arg.block_shape))
            else:
                key.append((arg.dtype, general or arg.data_ptr() % 16 == 0))
        return tuple(key)


@contextmanager
def compile_only() -> Iterator[None]:
    """Inside, a `Launcher` compiles its kernel and does not launch it; kernels compile side by side.

    At the end every kernel is compiled and loaded, with what launches it (Triton 3.6 compiles that too, by the host's C
    compiler: 7 of 11 seconds). One that cannot be is left to its launch, which raises Triton's error. For the
    interpreter there is nothing to do.
    """
    side_by_side = getattr(triton, "AsyncCompileMode", None)  # from Triton 3.6 on
    compiled: list[Any] = []
    before = _compiled_only.set(compiled)
    try:
        with ThreadPoolExecutor(initializer=_use_device, initargs=(_current_device(),)) as threads:
            with nullcontext() if side_by_side is None else side_by_side(threads, ignore_errors=True):
                yield
            list(threads.map(_load, compiled))
    finally:
        _compiled_only.reset(before)


def _load(kernel: Any) -> None:
    with suppress(Exception):
        getattr(kernel, "result", lambda: kernel)().run  # noqa: B018 - a property that loads


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
