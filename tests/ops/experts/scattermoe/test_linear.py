"""The fused projection against the fp32 oracle's formula: in Triton's interpreter on the CPU, compiled on a GPU."""

from dataclasses import replace

import pytest
import torch

from expertune.ops.experts.scattermoe.linear import LinearTile, expert_linear
from expertune.ops.experts.scattermoe.tiles import build_row_tiles
from expertune.ops.experts.types import ExpertProjection
from expertune.ops.plan import ExpertPlan, build_plan
from tests.comparing import assert_agrees
from tests.ops.experts.cases import Case, make_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SMALL = LinearTile(rows=16, columns=32, k_step=16, num_warps=4, num_stages=2)
CASES = {
    "plain": Case(),
    "no adapter": Case(up_lora=False),
    "rank 1": Case(rank=1),
    "rank 3": Case(rank=3),
    "rank 64": Case(rank=64),
    "one token": Case(tokens=1),
    "every expert": Case(top_k=5),
    "all on the first expert": Case(top_k=1, all_on_first=True),
    "bias": Case(bias=True),
    "transposed, bias": Case(transposed=True, bias=True),
    "widths of no tile": Case(hidden=40, intermediate=28),
    "sentinels": Case(sentinels=True),
    "fp16": Case(dtype=torch.float16),
    "many experts": Case(tokens=100, experts=32, top_k=4),
    "bf16": Case(dtype=torch.bfloat16, adapter_dtype=torch.float32),
}
if DEVICE == "cpu":
    del CASES["bf16"]  # the interpreter multiplies bf16 as if its bits were integers (triton 3.6 and 3.9)


def truth(x_SX: torch.Tensor, projection: ExpertProjection, plan: ExpertPlan, dtype: torch.dtype) -> torch.Tensor:
    """Row by row from the formula, in `dtype`."""
    expert_S = plan.expert_of_row()
    x_SX, weight = x_SX.to(dtype), projection.weight_EYX.to(dtype)
    out = torch.einsum("sx,syx->sy", x_SX, weight[expert_S])
    if projection.bias_EY is not None:
        out = out + projection.bias_EY.to(dtype)[expert_S]
    if projection.lora is not None:
        u = torch.einsum("sx,srx->sr", x_SX, projection.lora.a_ERX.to(dtype)[expert_S])
        out = out + projection.lora.scaling * torch.einsum("sr,syr->sy", u, projection.lora.b_EYR.to(dtype)[expert_S])
    return out


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("grouped", [False, True], ids=["gathered", "grouped"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_agrees_with_the_formula(name: str, grouped: bool) -> None:
    case = CASES[name]
    problem = make_problem(case, DEVICE)
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    x_SX = problem.x_TH[plan.token_of_row_S]
    got = expert_linear(x_SX if grouped else problem.x_TH, problem.up, plan, grouped=grouped, tile=SMALL)
    rows = int(plan.row_fence_F[-1])
    want, plain = (truth(x_SX, problem.up, plan, dtype)[:rows] for dtype in (torch.float32, case.dtype))
    assert_agrees(name, got[:rows], want, dtype=case.dtype, same_dtype=plain)


def test_no_token_launches_and_returns_nothing() -> None:
    problem = make_problem(Case(tokens=0), DEVICE)
    plan = build_plan(problem.expert_ids_TK, 5)
    with torch.no_grad():
        assert expert_linear(problem.x_TH, problem.up, plan, tile=SMALL).shape == (0, 32)


def test_the_tiles_cover_every_row_once() -> None:
    problem = make_problem(Case(tokens=90, experts=7, top_k=3), DEVICE)
    plan = build_plan(problem.expert_ids_TK, 7)
    tiles = build_row_tiles(plan, 16)
    covered = []
    for tile in range(int(tiles.num_tiles_1)):
        expert, first = int(tiles.expert_of_tile_M[tile]), int(tiles.first_row_of_tile_M[tile])
        assert plan.row_fence_F[expert] <= first
        covered += range(first, min(first + 16, int(plan.row_fence_F[expert + 1])))
    assert covered == list(range(plan.num_rows))


def test_bad_input_is_named() -> None:
    problem = make_problem(Case(), DEVICE)
    plan = build_plan(problem.expert_ids_TK, 5)
    with pytest.raises(ValueError, match=r"x_NX: got shape \(37, 24\), need \(74, 24\)"):
        expert_linear(problem.x_TH, problem.up, plan, grouped=True)
    with pytest.raises(ValueError, match=r"got torch\.float32, x_NX has torch\.bfloat16"):
        expert_linear(problem.x_TH.bfloat16(), problem.up, plan)
    odd = ExpertProjection(problem.up.weight_EYX[:, :, :23].contiguous())
    with pytest.raises(ValueError, match="need multiples of 16"):
        expert_linear(problem.x_TH[:, :23], odd, plan)
    assert replace(odd).bias_EY is None
