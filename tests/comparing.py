"""One way to compare tensors: relative L2 error against an fp32 truth, bounded by what the same dtype can give."""

import torch
from torch import Tensor

# Smallest error that counts as agreement, per dtype: a few units in the last place over sums of these lengths.
FLOOR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in fp64; infinite for another shape or a NaN; exact zeros must be matched exactly."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    got, want = got.double(), want.double()
    scale, error = want.norm().item(), (got - want).norm().item()
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return error / scale


def assert_agrees(
    name: str, got: Tensor, want: Tensor, *, dtype: torch.dtype, same_dtype: Tensor | None = None
) -> None:
    """Fail unless `got` is as close to the truth `want` as `dtype` allows.

    same_dtype: the same computation done plainly in `dtype`; twice its error is then the bound, if above the floor.
    """
    bound = FLOOR[dtype]
    if same_dtype is not None:
        bound = max(bound, 2 * relative_error(same_dtype, want))
    error = relative_error(got, want)
    assert error <= bound, f"{name}: relative error {error:.2e}, allowed {bound:.2e}"
