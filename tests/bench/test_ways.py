"""Every way that runs on the CPU computes the output and the gradients of the fp32 truth."""

import pytest
import torch

from expertune.bench.problem import GRADIENTS, Problem
from expertune.bench.truth import reference_step, relative_errors
from expertune.bench.ways import DENSE, WAYS, select_ways
from expertune.errors import ConfigError
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.reference import reference_expert_mlp
from tests.bench.conftest import tiny_problem
from tests.comparing import FLOOR

IN_THE_INTERPRETER = [
    pytest.param(
        name, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off beside a GPU")
    )
    for name in ("scattermoe", "sonicmoe", "sonicmoe, materialized")
]
ON_ANY_DEVICE = ("torch_grouped", "split on grouped_mm", "peft fold + grouped_mm")


def run(name: str, problem: Problem) -> tuple[torch.Tensor, ...]:
    way = next(way for way in WAYS if way.name == name)
    step = way.build(problem)
    step()
    return step()  # the second call: a step changes nothing that the next one reads


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_the_truth_is_the_oracle_expert_by_expert(routing: str) -> None:
    problem = tiny_problem(routing=routing)
    up, down = problem.projections()
    y_TH = reference_expert_mlp(problem.x_TH, problem.expert_ids_TK, problem.weights_TK, up, down, SWIGLU)
    truth = reference_step(problem)
    assert len(truth) == 1 + len(GRADIENTS)
    assert [each.shape for each in truth[1:]] == [leaf.shape for leaf in problem.leaves]
    assert max(relative_errors(problem.backward(y_TH), truth)) < FLOOR[torch.float32]


def test_the_truth_of_an_expert_without_rows_is_zero() -> None:
    problem = tiny_problem()
    problem.expert_ids_TK[:] = torch.tensor([4, 1])
    da_up = reference_step(problem)[3].view(5, problem.case.rank, -1)
    assert [bool(da_up[expert].any()) for expert in range(5)] == [False, True, False, False, True]


@pytest.mark.parametrize("name", [*ON_ANY_DEVICE, *IN_THE_INTERPRETER])
@pytest.mark.usefixtures("nan_filled_memory")
def test_a_way_agrees_with_the_truth(name: str, problem: Problem) -> None:
    base = problem.gate_up_EJH.clone(), problem.down_EHI.clone()
    errors = relative_errors(run(name, problem), reference_step(problem))
    assert max(errors) < FLOOR[torch.float32], dict(zip(("y", *GRADIENTS), errors, strict=True))
    assert torch.equal(base[0], problem.gate_up_EJH)
    assert torch.equal(base[1], problem.down_EHI)


@pytest.mark.parametrize("name", ON_ANY_DEVICE)
def test_a_way_agrees_with_the_truth_in_bf16_with_fp32_adapters(name: str) -> None:
    problem = tiny_problem(torch.bfloat16)
    outputs = run(name, problem)
    assert [each.dtype for each in outputs[1:]] == [leaf.dtype for leaf in problem.leaves]
    assert max(relative_errors(outputs, reference_step(problem))) < 4 * FLOOR[torch.bfloat16]


def test_errors_tell_nan_zeros_and_a_lost_adapter() -> None:
    want = torch.randn(4, 3)
    zeros, nan = torch.zeros(4, 3), torch.full((4, 3), float("nan"))
    assert relative_errors([want, zeros, nan, zeros, want], [want, want, want, zeros, zeros]) == (
        0.0,
        1.0,
        float("inf"),
        0.0,
        float("inf"),
    )


def test_the_limit_does_the_flops_that_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    problem = tiny_problem()
    step = DENSE.build(problem)
    with FlopCounterMode(display=False) as counter:
        assert step() == ()
    assert counter.get_total_flops() == problem.case.shape.base_flops(problem.case.tokens)


def test_ways_are_selected_by_name_and_the_limit_is_always_there() -> None:
    assert [way.name for way in select_ways(["Split on grouped_mm", "scattermoe"])] == [
        "dense cuBLAS",
        "scattermoe",
        "split on grouped_mm",
    ]
    assert select_ways([]) == list(WAYS)


def test_a_wrong_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="--way: there is no 'scattermo'; the nearest is scattermoe; there are dense"):
        select_ways(["torch_grouped", "scattermo"])
