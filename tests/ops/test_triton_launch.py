"""A launcher goes to the kernel that was compiled for exactly such arguments."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from expertune.ops.integers import cdiv, next_power_of_2
from expertune.ops.triton_launch import Launcher


@triton.jit
def _scale_kernel(x_ptr, out_ptr, number, count, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < count, other=0.0)
    tl.store(out_ptr + places, x * number * FACTOR, mask=places < count)


class Recorded:
    """Stands in for a compiled kernel function: what was compiled, and what was launched of it."""

    def __init__(self) -> None:
        self.params = [type("Parameter", (), {"is_constexpr": constant}) for constant in (False, False, True)]
        self.compiled: list[dict[str, int]] = []
        self.launched: list[tuple[int, tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*args: Any, **options: int) -> Any:
            number = len(self.compiled)
            self.compiled.append(options)

            class Compiled:
                def __getitem__(_, grid: tuple[int, ...]) -> Any:
                    return lambda *args: self.launched.append((number, grid, args))

            return Compiled()

        return compile_and_launch


def launches(*calls: tuple[Any, ...], **options: Any) -> int:
    """How many kernels these calls compile."""
    kernel = Recorded()
    launcher = Launcher(kernel)
    with patch("torch.cuda.current_device", lambda: 0):
        for call in calls:
            launcher((2,), *call, **options)
    return len(kernel.compiled)


X = torch.zeros(64)


@pytest.mark.parametrize(
    "other",
    [
        (X.bfloat16(), 32, True), (X[1:], 32, True), (None, 32, True), (X, 33, True), (X, 1, True), (X, 2**31, True),
        (X, None, True), (X, 0.5, True), (X, 32, False),
        (TensorDescriptor(X.view(8, 8), [8, 8], [8, 1], [4, 8]), 32, True),
    ],
    ids=str,
)  # fmt: skip
def test_what_triton_specialises_on_is_another_kernel(other: tuple[Any, ...]) -> None:
    assert launches((X, 32, True), other) == 2
    assert launches(other, other) == 1


def test_what_it_does_not_specialise_on_is_the_same_kernel() -> None:
    assert launches((X, 32, True), (torch.ones(7), 48, True), (X[4:], -16, True)) == 1
    assert launches((X, 33, True), (X, 7, True), (X, -5, True)) == 1
    blocks = [TensorDescriptor(X.view(8, 8), [8, 8], [8, 1], [rows, 8]) for rows in (4, 4, 8)]
    assert launches(*((block, 1, True) for block in blocks)) == 2


def test_warps_stages_and_device_are_part_of_it() -> None:
    kernel = Recorded()
    launcher = Launcher(kernel)
    for device, warps, stages in ((0, 4, 3), (0, 8, 3), (0, 4, 2), (1, 4, 3), (0, 4, 3)):
        with patch("torch.cuda.current_device", lambda device=device: device):
            launcher((3, 2), X, 5, True, num_warps=warps, num_stages=stages)
    assert len(kernel.compiled) == 4
    assert kernel.launched == [(0, (3, 2, 1), (X, 5, True))]


@pytest.mark.gpu
def test_it_computes_on_a_gpu_the_first_time_and_again() -> None:
    launcher = Launcher(_scale_kernel)
    for count, number, factor in ((64, 3, 2), (64, 3, 2), (63, 1, 2), (64, 3, 5), (64, 16, 5)):
        x, out = torch.randn(count, device="cuda"), torch.empty(count, device="cuda")
        launcher((cdiv(count, 32),), x, out, number, count, factor, 32)
        torch.testing.assert_close(out, x * number * factor)


def test_integers() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 128, 129)] == [1, 2, 4, 4, 8, 128, 256]
