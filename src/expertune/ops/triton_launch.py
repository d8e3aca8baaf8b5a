"""Launching a Triton kernel at half of the usual cost for the host.

A step of small experts is over before the host has launched it: every launch through `kernel[grid](...)` binds and
specialises all arguments anew (H200's host: 38 us for a projection's 40 arguments, 18 us through the compiled kernel).
A `Launcher` keeps the compiled kernels by what Triton specialises on, and goes straight to them.
"""

from functools import cache
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


class Launcher:
    """Launches one kernel. Every parameter of the kernel, constants too, is given in order.

    Compiled kernels are kept by device, warps, stages, and of each argument what Triton specialises on: dtype and
    16-byte alignment of a tensor, dtype and block of a descriptor, whether an int is 1 or a multiple of 16 or wide,
    and the value of a constant.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._is_constant = tuple(parameter.is_constexpr for parameter in getattr(kernel, "params", ()))
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3) -> None:
        if not self._is_constant:  # the interpreter
            self.kernel[grid](*args)
            return
        key = self._key(args, num_warps, num_stages)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*args, num_warps=num_warps, num_stages=num_stages)
        else:
            compiled[(*grid, 1, 1)[:3]](*args)

    def _key(self, args: tuple[Any, ...], num_warps: int, num_stages: int) -> tuple[Any, ...]:
        key: list[Any] = [torch.cuda.current_device(), num_warps, num_stages]
        for arg, constant in zip(args, self._is_constant, strict=True):
            kind = type(arg)
            if constant:
                key.append(arg)
            elif kind is int:  # 1, a multiple of 16, wide or neither
                key.append(1 if arg == 1 else 64 if not -(2**31) <= arg < 2**31 else 16 if arg % 16 == 0 else 0)
            elif arg is None or kind is float:
                key.append(kind)
            elif kind is TensorDescriptor:
                key.append((arg.base.dtype, *arg.block_shape))
            else:
                key.append((arg.dtype, arg.data_ptr() % 16 == 0))
        return tuple(key)


@cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_descriptors(device: torch.device) -> bool:
    """Whether the GPU copies tiles by descriptors in hardware (from Hopper on); the interpreter emulates them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
