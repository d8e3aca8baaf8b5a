"""The public pieces alone: values and every gradient against the plain formula, forms, outputs, bad input."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.ops.experts.scattermoe.combine import combine
from expertune.ops.experts.scattermoe.pieces import (
    Form,
    Output,
    expert_linear,
    expert_linear_adapter_grads,
    expert_linear_input_grad,
    group_rows,
    pick_form,
)
from expertune.ops.experts.scattermoe.tiles import build_row_tables
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.types import ExpertProjection
from expertune.ops.plan import ExpertPlan, build_plan
from tests.comparing import assert_agrees, relative_error
from tests.ops.experts.cases import Case, Problem, make_problem
from tests.ops.experts.scattermoe.plain import local_rows, plain_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
SMALL = LinearTile(rows=16, columns=32, k_step=16, num_warps=4, num_stages=2)
SPLITS = Case(tokens=9, experts=3, rank=300)  # "auto" is the split form
ALL = Case(tokens=19, bias=True, base_grad=True, sentinels=True)
CASES = {
    "plain": Case(),
    "no adapter": Case(up_lora=False),
    "rank 1": Case(rank=1),
    "rank 64": Case(rank=64),
    "one token": Case(tokens=1),
    "no token": Case(tokens=0, bias=True),
    "all on the first expert": Case(top_k=1, all_on_first=True),
    "every expert, transposed": Case(tokens=12, top_k=5, transposed=True),
    "odd widths": Case(hidden=23, intermediate=13, rank=5, bias=True),
    "sentinels, bias, base grad": ALL,
    "fp16, fp32 adapters": Case(dtype=torch.float16, adapter_dtype=torch.float32),
    "bf16, fp32 adapters and routing": Case(
        dtype=torch.bfloat16, adapter_dtype=torch.float32, weights_dtype=torch.float32, rank=12
    ),
}
if DEVICE == "cpu":  # the interpreter multiplies bf16 as if its bits were integers (triton 3.6 and 3.9)
    CASES = {name: case for name, case in CASES.items() if case.dtype != torch.bfloat16}


def draw(case: Case) -> tuple[Problem, ExpertPlan]:
    problem = make_problem(case, DEVICE)
    return problem, build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)


def random_like(values: Tensor) -> Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(7)).to(values.device, values.dtype)


def collect(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradient of every leaf that it depends on, for a random upstream gradient."""
    grads = torch.autograd.grad(out, list(leaves.values()), random_like(out), allow_unused=True)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {"out": out.detach(), **named}


def linear_and_grads(
    problem: Problem, plan: ExpertPlan, linear: Callable[..., Tensor], grouped: bool, output: Output, **options: Any
) -> dict[str, Tensor]:
    case = problem.case
    rows_SH = torch.randn(plan.num_rows, case.hidden, generator=torch.Generator().manual_seed(3))
    rows_SH = rows_SH.to(DEVICE, case.dtype).requires_grad_()
    leaves = {name: leaf for name, leaf in problem.leaves.items() if not name.startswith("down")} | {"rows": rows_SH}
    weights_TK = problem.weights_TK if output == "combined" else None
    x_NX = rows_SH if grouped else problem.x_TH
    out = linear(x_NX, problem.up, plan, grouped=grouped, output=output, weights_TK=weights_TK, **options)
    return collect(out, leaves)


def both_agree(name: str, case: Case, grouped: bool, output: Output, **options: Any) -> dict[str, Tensor]:
    problem, plan = draw(case)
    got = linear_and_grads(problem, plan, expert_linear, grouped, output, **options)
    truth, plain = (
        linear_and_grads(problem, plan, plain_linear, grouped, output, dtype=dtype)
        for dtype in (torch.float32, case.dtype)
    )
    assert got.keys() == truth.keys(), "a gradient is missing or was computed for nothing"
    for key, want in truth.items():
        assert_agrees(f"{name}: {key}", got[key], want, dtype=case.dtype, same_dtype=plain[key])
        if key != "out":
            assert got[key].dtype == want.dtype, f"{name}: {key} has not the dtype of its leaf"
    return got


@pytest.mark.parametrize(
    ("grouped", "output"),
    [(False, "grouped"), (True, "scattered"), (True, "combined")],
    ids=["gathered to grouped", "grouped to scattered", "grouped to combined"],
)
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name] is not ALL])
def test_output_and_gradients_agree_with_the_formula(name: str, grouped: bool, output: Output) -> None:
    both_agree(name, CASES[name], grouped, output, tile=SMALL)


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize(("grouped", "output"), list(product([False, True], ["grouped", "scattered", "combined"])))
def test_every_way_in_and_out_agrees_in_both_forms(grouped: bool, output: Output, form: Form) -> None:
    both_agree("every way", ALL, grouped, output, form=form, tile=SMALL)


@pytest.mark.parametrize("form", ["fused", "split"])
def test_a_rank_above_256_agrees_in_both_forms(form: Form) -> None:
    both_agree("rank 300", SPLITS, False, "grouped", form=form, tile=SMALL)


def test_the_rule_for_the_form() -> None:
    assert [pick_form(rank) for rank in (0, 1, 256, 257, 1024)] == ["fused", "fused", "fused", "split", "split"]
    problem, plan = draw(replace(SPLITS, rank=257))
    by_rule, split = (
        expert_linear(problem.x_TH, problem.up, plan, form=form, tile=SMALL) for form in ("auto", "split")
    )
    assert torch.equal(by_rule, split)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rank", [4, 64])
def test_fused_and_split_agree_to_a_hundredth(rank: int, dtype: torch.dtype) -> None:
    problem, plan = draw(Case(rank=rank, dtype=dtype, adapter_dtype=torch.float32, bias=True))
    fused, split = (
        linear_and_grads(problem, plan, expert_linear, False, "combined", form=form, tile=SMALL)
        for form in ("fused", "split")
    )
    for key, want in fused.items():
        assert relative_error(split[key], want) <= 0.01, key


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize("rank", [16, 256, 384])
def test_real_widths_on_a_gpu(rank: int, form: Form) -> None:
    case = Case(tokens=256, top_k=2, experts=4, hidden=512, intermediate=384, rank=rank, dtype=torch.bfloat16)
    both_agree("real widths", replace(case, adapter_dtype=torch.float32), False, "combined", form=form)


def test_two_runs_give_the_same_bits() -> None:
    problem, plan = draw(ALL)
    first, second = (linear_and_grads(problem, plan, expert_linear, False, "combined", tile=SMALL) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_expanded_upstream_gradient_is_taken() -> None:
    problem, plan = draw(Case())
    expert_linear(problem.x_TH, problem.up, plan, output="scattered", tile=SMALL).sum().backward()
    want = torch.autograd.grad(plain_linear(problem.x_TH, problem.up, plan).sum(), problem.x_TH)[0]
    assert problem.x_TH.grad is not None
    assert_agrees("dx", problem.x_TH.grad, want, dtype=torch.float32)


def test_tables_can_be_shared_and_must_fit_the_tile() -> None:
    problem, plan = draw(Case())
    tables = build_row_tables(plan, SMALL.rows, chunk_rows=8)
    shared, own = (expert_linear(problem.x_TH, problem.up, plan, tile=SMALL, tables=t) for t in (tables, None))
    assert torch.equal(shared, own)
    with pytest.raises(ValueError, match=r"tables: got tiles of 16 rows, need 32 \(rows of the tile\)"):
        expert_linear(problem.x_TH, problem.up, plan, tile=replace(SMALL, rows=32), tables=tables)


# Gradients without autograd.


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "gathered"])
@pytest.mark.parametrize("name", ["plain", "no adapter", "odd widths", "sentinels, bias, base grad", "no token"])
def test_the_input_gradient_alone(name: str, grouped: bool, form: Form) -> None:
    problem, plan = draw(CASES[name])
    num_out, lora = problem.up.weight_EYX.shape[1], problem.up.lora
    dout_NY = random_like(problem.x_TH.new_empty(plan.num_rows if grouped else plan.num_tokens, num_out))
    drows_SX, v_SR = expert_linear_input_grad(dout_NY, problem.up, plan, grouped=grouped, form=form, tile=SMALL)
    x_SX = problem.x_TH.detach()[plan.token_of_row_S].requires_grad_()
    dout_SY = dout_NY if grouped else dout_NY[plan.token_of_row_S]
    (want,) = torch.autograd.grad(plain_linear(x_SX, problem.up, plan, grouped=True), x_SX, dout_SY)
    assert_agrees("drows", drows_SX, want, dtype=torch.float32)
    if lora is None:
        assert v_SR is None
    else:
        assert v_SR is not None
        assert v_SR.shape == (plan.num_rows, 16)
        want_v = torch.einsum("sy,syr->sr", dout_SY, lora.b_EYR[plan.expert_of_row()])
        assert_agrees("v", v_SR[:, : lora.rank], torch.where(local_rows(plan), want_v, 0.0), dtype=torch.float32)
        assert not v_SR[:, lora.rank :].any()


@pytest.mark.parametrize("known", [False, True], ids=["alone", "u and v known"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", ["plain", "rank 64", "odd widths", "sentinels, bias, base grad", "no token"])
def test_the_adapter_gradients_alone(name: str, weighted: bool, known: bool) -> None:
    case = CASES[name]
    problem, plan = draw(case)
    lora = problem.up.lora
    assert lora is not None
    weights_TK = problem.weights_TK if weighted else None
    dout_NY = random_like(problem.x_TH.new_empty(plan.num_tokens if weighted else plan.num_rows, 2 * case.intermediate))
    thin = {}
    if known:
        _, thin["v_SR"] = expert_linear_input_grad(dout_NY, problem.up, plan, grouped=not weighted, tile=SMALL)
        of_a = ExpertProjection(torch.nn.functional.pad(lora.a_ERX, (0, 0, 0, max(16, case.rank) - case.rank)))
        thin["u_SR"] = expert_linear(problem.x_TH, of_a, plan, tile=SMALL).detach()
    da_ERX, db_EYR = expert_linear_adapter_grads(
        dout_NY, problem.x_TH, problem.up, plan, grouped_dout=not weighted, weights_TK=weights_TK, tile=SMALL, **thin
    )
    out = plain_linear(
        problem.x_TH, problem.up, plan, output="combined" if weighted else "grouped", weights_TK=weights_TK
    )
    want_a, want_b = torch.autograd.grad(out, [lora.a_ERX, lora.b_EYR], dout_NY)
    assert_agrees("dA", da_ERX, want_a, dtype=torch.float32)
    assert_agrees("dB", db_EYR, want_b, dtype=torch.float32)
    assert db_EYR.stride() == lora.b_EYR.stride()
    empty = plan.row_fence_F.diff() == 0
    assert bool(empty.any()), "the case has an expert without rows"
    assert not da_ERX[empty].any()
    assert not db_EYR[empty].any()


# Rows.


def plain_group_rows(x_NH: Tensor, plan: ExpertPlan, coefficients_TK: Tensor | None) -> Tensor:
    slots_TKH = x_NH.float().unsqueeze(1).expand(-1, plan.top_k, -1) if x_NH.dim() == 2 else x_NH.float()
    if coefficients_TK is not None:
        slots_TKH = slots_TKH * coefficients_TK.float().unsqueeze(-1)
    return torch.where(local_rows(plan), slots_TKH.flatten(0, 1)[plan.slot_of_row_S], 0.0)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("fan_out", [True, False], ids=["fan-out K", "fan-out 1"])
@pytest.mark.parametrize(
    "name", ["plain", "one token", "no token", "odd widths", "sentinels, bias, base grad", "fp16, fp32 adapters"]
)
def test_grouping_rows(name: str, fan_out: bool, weighted: bool) -> None:
    case = replace(CASES[name], weights_dtype=torch.float32)
    problem, plan = draw(case)
    x_NH = problem.x_TH if fan_out else random_like(problem.x_TH.new_empty(case.tokens, case.top_k, case.hidden))
    leaves = {"x": x_NH.detach().requires_grad_()} | ({"weights": problem.weights_TK} if weighted else {})
    got = collect(group_rows(leaves["x"], plan, coefficients_TK=leaves.get("weights")), leaves)
    want_SH = plain_group_rows(leaves["x"], plan, leaves.get("weights"))
    grads = torch.autograd.grad(want_SH, list(leaves.values()), random_like(got["out"]).float())
    assert got["out"].dtype == case.dtype
    for key, want in zip(got, [want_SH.detach(), *grads], strict=True):
        assert_agrees(f"{name}: {key}", got[key], want, dtype=case.dtype)


def test_grouping_rows_wider_than_a_block_and_strided() -> None:
    plan = build_plan(torch.tensor([[0, 1], [1, 2]], device=DEVICE), 3)
    x_TH = torch.randn(1030, 2, device=DEVICE).t().requires_grad_()
    c_TK = torch.randn(2, 2, device=DEVICE).t().requires_grad_()
    leaves = {"x": x_TH, "c": c_TK}
    got, want = (
        collect(out, leaves)
        for out in (group_rows(x_TH, plan, coefficients_TK=c_TK), plain_group_rows(x_TH, plan, c_TK))
    )
    for key in want:
        assert_agrees(key, got[key], want[key], dtype=torch.float32)


def test_scattered_rows_grouped_again_are_the_grouped_rows() -> None:
    problem, plan = draw(ALL)
    scattered, grouped = (
        expert_linear(problem.x_TH, problem.up, plan, output=output, tile=SMALL) for output in ("scattered", "grouped")
    )
    assert torch.equal(group_rows(scattered, plan), grouped)
    with torch.no_grad():
        together = expert_linear(
            problem.x_TH, problem.up, plan, output="combined", weights_TK=problem.weights_TK, tile=SMALL
        )
        assert torch.equal(combine(grouped, problem.weights_TK, plan), together)


# Bad input.


def test_bad_input_is_named() -> None:
    problem, plan = draw(Case())
    x_TH, up, weights_TK = problem.x_TH, problem.up, problem.weights_TK
    assert up.lora is not None
    double = ExpertProjection(up.weight_EYX.double())
    bad: list[tuple[str, Callable[[], object]]] = [
        (r"x_NX: got shape \(37, 24\), need \(74, 24\)", lambda: expert_linear(x_TH, up, plan, grouped=True)),
        (r"x_NX: got shape \(37, 23\), need \(37, 24\)", lambda: expert_linear(x_TH[:, 1:], up, plan)),
        (r"x_NX: got dtype torch.int64", lambda: expert_linear(x_TH.long(), up, plan)),
        (r"projection.weight_EYX: got dtype torch.float64", lambda: expert_linear(x_TH, double, plan)),
        (r"projection.bias_EY: got \(5, 3\)", lambda: expert_linear(x_TH, replace(up, bias_EY=x_TH[:5, :3]), plan)),
        (r"projection: got 5 experts, the plan has 6", lambda: expert_linear(x_TH, up, replace(plan, num_experts=6))),
        (r"output: got 'rows', need one of", lambda: expert_linear(x_TH, up, plan, output="rows")),  # type: ignore
        (r"form: got 'thin', need one of", lambda: expert_linear(x_TH, up, plan, form="thin")),  # type: ignore
        (r"weights_TK: got None", lambda: expert_linear(x_TH, up, plan, output="combined")),
        (r"weights_TK: got a tensor", lambda: expert_linear(x_TH, up, plan, weights_TK=weights_TK)),
        (
            r"weights_TK: got \(37, 1\) torch.float32, need \(37, 2\)",
            lambda: expert_linear(x_TH, up, plan, output="combined", weights_TK=weights_TK[:, :1]),
        ),
        (r"x_NX: got|x_NX is on meta", lambda: expert_linear(x_TH.to("meta"), up, plan)),
        (r"dout_NY: got shape \(37, 24\), need \(74, 32\)", lambda: expert_linear_input_grad(x_TH, up, plan)),
        (
            r"projection.lora: got None, need an adapter",
            lambda: expert_linear_adapter_grads(x_TH.new_zeros(74, 32), x_TH, replace(up, lora=None), plan),
        ),
        (
            r"u_SR: got \(74, 4\) torch.float32, need \(74, 16\)",
            lambda: expert_linear_adapter_grads(
                x_TH.new_zeros(74, 32), x_TH, up, plan, u_SR=x_TH.new_zeros(74, 4)
            ),
        ),
        (r"x_NH: got shape \(36, 24\), need \[37, width\]", lambda: group_rows(x_TH[1:], plan)),
        (r"x_NH: got dtype torch.float64", lambda: group_rows(x_TH.double(), plan)),
        (r"coefficients_TK: got \(37, 1\)", lambda: group_rows(x_TH, plan, coefficients_TK=weights_TK[:, :1])),
    ]  # fmt: skip
    for match, call in bad:
        with pytest.raises(ValueError, match=match):
            call()
