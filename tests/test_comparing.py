"""Canaries for the comparison itself: it must reject what a wrong kernel gives."""

from dataclasses import replace

import pytest
import torch

from tests.comparing import assert_agrees, relative_error
from tests.ops.experts.cases import Case, make_problem


@pytest.fixture
def output() -> torch.Tensor:
    return make_problem(Case(dtype=torch.bfloat16)).reference(torch.float32)["y"]


def test_rejects_zeros(output: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_agrees("zeros", torch.zeros_like(output), output, dtype=torch.bfloat16)


def test_rejects_nan(output: torch.Tensor) -> None:
    broken = output.clone()
    broken[0, 0] = float("nan")
    assert relative_error(broken, output) == float("inf")


def test_rejects_two_swapped_experts(output: torch.Tensor) -> None:
    problem = make_problem(Case(dtype=torch.bfloat16))
    order = torch.tensor([1, 0, 2, 3, 4])
    problem.up = replace(problem.up, weight_EYX=problem.up.weight_EYX[order])
    with pytest.raises(AssertionError):
        assert_agrees("swapped", problem.reference(torch.float32)["y"], output, dtype=torch.bfloat16)


@pytest.mark.parametrize("which", ["up", "down"])
def test_rejects_a_dropped_adapter(output: torch.Tensor, which: str) -> None:
    problem = make_problem(Case(dtype=torch.bfloat16))
    setattr(problem, which, replace(getattr(problem, which), lora=None))
    with pytest.raises(AssertionError):
        assert_agrees("no adapter", problem.reference(torch.float32)["y"], output, dtype=torch.bfloat16)


def test_accepts_rounding(output: torch.Tensor) -> None:
    assert_agrees("rounded", output.bfloat16(), output, dtype=torch.bfloat16)
