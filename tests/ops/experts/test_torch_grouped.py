"""torch_grouped against the fp32 oracle: output and every gradient, every shape of cases.py, on the CPU and a GPU."""

from dataclasses import replace

import pytest
import torch

from expertune.ops.experts.torch_grouped import combine_rows, gather_rows, grouped_expert_linear, grouped_expert_mlp
from expertune.ops.plan import build_plan
from tests.comparing import assert_agrees
from tests.ops.experts.cases import CASES, Case, Problem, make_problem, with_seed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def run(problem: Problem) -> dict[str, torch.Tensor]:
    case = problem.case
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    y_TH = grouped_expert_mlp(problem.x_TH, problem.weights_TK, plan, problem.up, problem.down, case.activation)
    return problem.collect(y_TH)


def run_in_pieces(problem: Problem) -> dict[str, torch.Tensor]:
    case = problem.case
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    h_SJ = grouped_expert_linear(gather_rows(problem.x_TH, plan), problem.up, plan)
    z_SH = grouped_expert_linear(case.activation(h_SJ), problem.down, plan)
    return problem.collect(combine_rows(z_SH, problem.weights_TK, plan))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [run, run_in_pieces], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_agree_with_the_reference(name: str, how, device: str) -> None:
    problem = make_problem(CASES[name], device)
    truth = problem.reference(torch.float32)
    plain = problem.reference(CASES[name].dtype)
    got = how(problem)
    assert got.keys() == truth.keys(), "a gradient is missing or was computed for nothing"
    for key, want in truth.items():
        assert got[key].dtype == (problem.x_TH if key == "y" else problem.leaves[key[1:]]).dtype
        assert_agrees(f"{name}: {key}", got[key], want, dtype=CASES[name].dtype, same_dtype=plain[key])


@pytest.mark.parametrize("seed", range(5))
def test_random_inputs_are_fresh(seed: int) -> None:
    problem = make_problem(with_seed(CASES["many experts"], seed))
    truth, got = problem.reference(torch.float32), run(problem)
    for key, want in truth.items():
        assert_agrees(key, got[key], want, dtype=torch.float32)


@pytest.mark.parametrize("name", ["plain", "bias", "odd widths", "full fine-tuning", "sentinels"])
def test_gradcheck(name: str) -> None:
    case = replace(CASES[name], tokens=4, experts=3, hidden=5, intermediate=3, rank=2, dtype=torch.float64)
    problem = make_problem(case)
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)

    def mlp(*_leaves: torch.Tensor) -> torch.Tensor:  # gradcheck perturbs the leaves in place; the views see it
        return grouped_expert_mlp(problem.x_TH, problem.weights_TK, plan, problem.up, problem.down, case.activation)

    assert torch.autograd.gradcheck(mlp, tuple(problem.leaves.values()))


def test_an_expert_without_rows_gets_exact_zeros() -> None:
    problem = make_problem(Case(base_grad=True, bias=True))
    got = run(problem)
    last = problem.case.experts - 1
    assert not (problem.expert_ids_TK == last).any()
    for name in ("up_weight", "down_weight", "up_bias", "down_bias"):
        assert got[f"d{name}"][last].abs().max() == 0
        assert got[f"d{name}"][0].abs().max() > 0
    rank = problem.case.rank
    assert got["dup_lora_a"].view(-1, rank, problem.case.hidden)[last].abs().max() == 0
    assert got["ddown_lora_b"].view(problem.case.hidden, rank, -1)[..., last].abs().max() == 0


def test_two_runs_give_the_same_bits() -> None:
    first, second = run(make_problem(CASES["many experts"])), run(make_problem(CASES["many experts"]))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_scaling_zero_is_the_base() -> None:
    problem = make_problem(Case())
    lora = problem.up.lora, problem.down.lora
    up = replace(problem.up, lora=replace(lora[0], scaling=0.0))
    down = replace(problem.down, lora=replace(lora[1], scaling=0.0))
    plan = build_plan(problem.expert_ids_TK, problem.case.experts)
    args = (problem.x_TH, problem.weights_TK, plan)
    adapted = grouped_expert_mlp(*args, up, down, problem.case.activation)
    base = grouped_expert_mlp(*args, replace(up, lora=None), replace(down, lora=None), problem.case.activation)
    assert torch.equal(adapted, base)


def test_saves_only_x_h_two_thin_tensors_and_the_plan() -> None:
    problem = make_problem(Case(tokens=64, top_k=2, hidden=64, intermediate=48, rank=4))
    plan = build_plan(problem.expert_ids_TK, problem.case.experts)
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_expert_mlp(problem.x_TH, problem.weights_TK, plan, problem.up, problem.down, problem.case.activation)
    known = {leaf.untyped_storage().data_ptr() for leaf in problem.leaves.values()}
    known |= {p.weight_EYX.untyped_storage().data_ptr() for p in (problem.up, problem.down)}
    own = [tensor for pointer, tensor in saved.items() if pointer not in known]
    rows = plan.num_rows
    assert sorted(tuple(t.shape) for t in own) == sorted([(rows, 2 * 48), (rows, 4), (rows, 4)])


def test_autocast_does_not_change_the_dtype_of_the_products() -> None:
    problem = make_problem(Case())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(problem)
    for key, want in problem.reference(torch.float32).items():
        assert_agrees(key, got[key], want, dtype=torch.float32)


def test_wrong_shapes_are_named() -> None:
    problem = make_problem(Case())
    plan = build_plan(problem.expert_ids_TK, problem.case.experts)
    args = (problem.up, problem.down, problem.case.activation)
    with pytest.raises(ValueError, match=r"x_TH: got shape \(37, 5\), need \(37, 24\)"):
        grouped_expert_mlp(problem.x_TH[:, :5], problem.weights_TK, plan, *args)
    with pytest.raises(ValueError, match="weights_TK"):
        grouped_expert_mlp(problem.x_TH, problem.weights_TK[:, :1], plan, *args)
    short = replace(problem.up.lora, b_EYR=problem.up.lora.b_EYR[:, :-1])
    with pytest.raises(ValueError, match=r"up\.lora\.b_EYR"):
        grouped_expert_mlp(problem.x_TH, problem.weights_TK, plan, replace(problem.up, lora=short), *args[1:])
    fewer = replace(problem.down, weight_EYX=problem.down.weight_EYX[:4], lora=None)
    with pytest.raises(ValueError, match=r"down: got 4 experts, the plan has 5"):
        grouped_expert_mlp(problem.x_TH, problem.weights_TK, plan, problem.up, fewer, problem.case.activation)
