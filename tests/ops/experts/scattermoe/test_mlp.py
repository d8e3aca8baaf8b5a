"""The fused expert MLP against the fp32 oracle, in every shape that its kernels take: interpreted, or on a GPU."""

from dataclasses import replace

import pytest
import torch

from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.plan import build_plan
from tests.comparing import assert_agrees
from tests.ops.experts.cases import CASES, Case, Problem, make_problem, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
SMALL = LinearTile(rows=16, columns=32, k_step=16, num_warps=4, num_stages=2)
# the interpreter multiplies bf16 as if its bits were integers
LEFT_OUT = {name for name in CASES if "bf16" in name} if DEVICE == "cpu" else set()
FUSED = {name: case for name, case in CASES.items() if name not in LEFT_OUT}
if DEVICE == "cpu":  # every program of the interpreter's takes a millisecond
    FUSED["many experts"] = replace(FUSED["many experts"], tokens=60, experts=24)


def run(problem: Problem, *, tile: LinearTile | None = SMALL, known_gate: bool = True) -> dict[str, torch.Tensor]:
    case = problem.case
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    gate = SWIGLU if case.activation is swiglu and known_gate else case.activation
    y_TH = scattermoe_expert_mlp(problem.x_TH, problem.weights_TK, plan, problem.up, problem.down, gate, tile=tile)
    return problem.collect(y_TH)


@pytest.mark.parametrize("name", FUSED)
def test_output_and_gradients_agree_with_the_reference(name: str) -> None:
    problem = make_problem(FUSED[name], DEVICE)
    truth, plain, got = problem.reference(torch.float32), problem.reference(FUSED[name].dtype), run(problem)
    assert got.keys() == truth.keys(), "a gradient is missing or was computed for nothing"
    for key, want in truth.items():
        assert got[key].dtype == (problem.x_TH if key == "y" else problem.leaves[key[1:]]).dtype
        assert_agrees(f"{name}: {key}", got[key], want, dtype=FUSED[name].dtype, same_dtype=plain[key])


def test_a_known_gate_and_its_function_agree() -> None:
    known, function = (run(make_problem(Case(), DEVICE), known_gate=known) for known in (True, False))
    for key, value in function.items():
        assert_agrees(key, known[key], value, dtype=torch.float32)


def test_a_bias_of_any_strides() -> None:
    problem = make_problem(Case(bias=True, activation=swiglu), DEVICE)
    want = run(problem)
    for name in ("up", "down"):
        projection = getattr(problem, name)
        strided = projection.bias_EY.t().contiguous().t()
        setattr(problem, name, replace(projection, bias_EY=strided))
    for key, value in run(problem).items():
        assert torch.equal(value, want[key]), key


def test_two_runs_give_the_same_bits() -> None:
    first, second = run(make_problem(Case(), DEVICE)), run(make_problem(Case(), DEVICE))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("halves", [False, True])
def test_tiles_of_half_the_rows(halves: bool) -> None:
    problem = make_problem(Case(tokens=60, experts=7, hidden=40, rank=8), DEVICE)
    truth, got = problem.reference(torch.float32), run(problem, tile=replace(SMALL, rows=32, halves=halves))
    for key, want in truth.items():
        assert_agrees(key, got[key], want, dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [16, 64])
def test_a_real_width_on_a_gpu(rank: int, dtype: torch.dtype) -> None:
    case = Case(tokens=512, top_k=4, experts=16, hidden=1024, intermediate=768, rank=rank, dtype=dtype)
    problem = make_problem(replace(case, adapter_dtype=torch.float32), "cuda")
    truth, plain, got = problem.reference(torch.float32), problem.reference(dtype), run(problem, tile=None)
    for key, want in truth.items():
        assert_agrees(key, got[key], want, dtype=dtype, same_dtype=plain[key])
