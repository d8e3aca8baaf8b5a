"""One fused projection against the plain formula, and the tables its programs read: interpreted, or on a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from expertune.ops.experts.scattermoe.linear import fits_descriptor
from expertune.ops.experts.scattermoe.pieces import Output, expert_linear
from expertune.ops.experts.scattermoe.tiles import RowTable, build_row_tables
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.plan import build_plan
from tests.comparing import assert_agrees
from tests.ops.experts.cases import Case, make_problem
from tests.ops.experts.scattermoe.plain import plain_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
SMALL = LinearTile(rows=16, columns=32, k_step=16, num_warps=4, num_stages=2)
CASES = {
    "plain": Case(),
    "no adapter": Case(up_lora=False),
    "rank 1": Case(rank=1),
    "rank 3": Case(rank=3),
    "rank 64": Case(rank=64),
    "rank 130, several steps": Case(rank=130, tokens=20),
    "one token": Case(tokens=1),
    "every expert": Case(top_k=5),
    "all on the first expert": Case(top_k=1, all_on_first=True),
    "bias": Case(bias=True),
    "transposed, bias": Case(transposed=True, bias=True),
    "widths of no tile": Case(hidden=40, intermediate=28),
    "odd widths": Case(hidden=23, intermediate=13, rank=5, bias=True),
    "odd widths, transposed": Case(hidden=23, intermediate=13, rank=5, transposed=True),
    "odd in, aligned out": Case(hidden=23, rank=5),
    "aligned in, odd out": Case(intermediate=13, rank=5),
    "sentinels": Case(sentinels=True, bias=True),
    "many experts": Case(tokens=60, experts=32, top_k=4),
    "fp16": Case(dtype=torch.float16),
    "fp16, odd widths": Case(dtype=torch.float16, hidden=23, intermediate=13, rank=5),
    "bf16": Case(dtype=torch.bfloat16, adapter_dtype=torch.float32),
    "bf16, odd widths": Case(dtype=torch.bfloat16, hidden=23, intermediate=13, rank=5),
}
if DEVICE == "cpu":  # the interpreter multiplies bf16 as if its bits were integers (triton 3.6 and 3.9)
    CASES = {name: case for name, case in CASES.items() if case.dtype != torch.bfloat16}
WAYS: list[tuple[bool, Output]] = [(False, "grouped"), (True, "scattered")]


def agrees(name: str, case: Case, *, grouped: bool, output: Output, tile: LinearTile | None) -> None:
    problem = make_problem(case, DEVICE)
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    x_NX = problem.x_TH[plan.token_of_row_S] if grouped else problem.x_TH
    weights_TK = problem.weights_TK if output == "combined" else None
    got = expert_linear(x_NX, problem.up, plan, grouped=grouped, output=output, weights_TK=weights_TK, tile=tile)
    want, plain = (
        plain_linear(x_NX, problem.up, plan, grouped=grouped, output=output, weights_TK=weights_TK, dtype=dtype)
        for dtype in (torch.float32, case.dtype)
    )
    assert got.dtype == case.dtype
    assert_agrees(name, got, want, dtype=case.dtype, same_dtype=plain)


@pytest.mark.parametrize(("grouped", "output"), WAYS, ids=["gathered to grouped", "grouped to scattered"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_agrees_with_the_formula(name: str, grouped: bool, output: Output) -> None:
    agrees(name, CASES[name], grouped=grouped, output=output, tile=SMALL)


@pytest.mark.parametrize("name", ["plain", "odd widths", "sentinels", "one token"])
@torch.no_grad()
def test_combined_agrees_with_the_formula(name: str) -> None:
    agrees(name, CASES[name], grouped=True, output="combined", tile=SMALL)


@pytest.mark.parametrize(
    "tile",
    [replace(SMALL, rows=32, halves=True), replace(SMALL, descriptors=False), None],
    ids=["half tiles", "no descriptors", "default"],
)
@torch.no_grad()
def test_every_kind_of_tile_agrees(tile: LinearTile | None) -> None:
    agrees("tile", Case(sentinels=True, bias=True), grouped=False, output="grouped", tile=tile)
    agrees("tile", Case(sentinels=True, bias=True), grouped=True, output="scattered", tile=tile)


@torch.no_grad()
def test_strided_inputs_agree() -> None:
    problem = make_problem(Case(bias=True), DEVICE)
    plan = build_plan(problem.expert_ids_TK, 5)
    assert problem.up.bias_EY is not None
    want = expert_linear(problem.x_TH, problem.up, plan, tile=SMALL)
    strided = replace(problem.up, bias_EY=problem.up.bias_EY.t().contiguous().t())
    for x_TH in (
        problem.x_TH.t().contiguous().t(),
        torch.cat([problem.x_TH, problem.x_TH], dim=1)[:, 24:],
        torch.cat([problem.x_TH[:, :1], problem.x_TH], dim=1)[:, 1:],  # rows that are not aligned
    ):
        assert_agrees("strided", expert_linear(x_TH, strided, plan, tile=SMALL), want, dtype=torch.float32)
    sparse = torch.empty(5, 32, 48, device=DEVICE)[..., ::2].copy_(problem.up.weight_EYX)  # dense in no dimension
    assert not fits_descriptor(sparse)
    assert_agrees(
        "sparse weight",
        expert_linear(problem.x_TH, replace(problem.up, weight_EYX=sparse), plan, tile=SMALL),
        want,
        dtype=torch.float32,
    )


@pytest.mark.parametrize(("output", "shape"), [("grouped", (0, 32)), ("scattered", (0, 2, 32)), ("combined", (0, 32))])
@torch.no_grad()
def test_no_token_launches_and_returns_nothing(output: Output, shape: tuple[int, ...]) -> None:
    problem = make_problem(Case(tokens=0), DEVICE)
    plan = build_plan(problem.expert_ids_TK, 5)
    weights_TK = problem.weights_TK if output == "combined" else None
    got = expert_linear(problem.x_TH, problem.up, plan, output=output, weights_TK=weights_TK, tile=SMALL)
    assert got.shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 64, 256])
@pytest.mark.parametrize("output", ["grouped", "scattered", "combined"])
@torch.no_grad()
def test_a_real_width_on_a_gpu(output: Output, rank: int) -> None:
    case = Case(tokens=512, top_k=4, experts=8, hidden=1024, intermediate=384, rank=rank, dtype=torch.bfloat16)
    agrees("real width", case, grouped=False, output=output, tile=None)


def entries(table: RowTable) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of the entries in use."""
    experts, first_rows, end_rows, _ = table.entries_4M[:, : int(table.count_1)].tolist()
    return zip(experts, first_rows, end_rows, strict=True)


@pytest.mark.parametrize("case", [Case(tokens=90, experts=7, top_k=3), Case(sentinels=True), Case(tokens=0)])
def test_tiles_and_chunks_cover_every_row_once(case: Case) -> None:
    problem = make_problem(case, DEVICE)
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    tables, fence = build_row_tables(plan, 16, chunk_rows=8), plan.row_fence_F.tolist()
    for table, block in ((tables.tiles, 16), (tables.chunks, 8)):
        assert table.block_rows == block
        assert int(table.count_1) <= table.capacity
        covered = []
        for expert, first, end in entries(table):
            assert fence[expert] <= first
            assert end == min(first + block, fence[expert + 1])
            covered += range(first, end)
        assert covered == list(range(fence[-1]))


def test_an_expert_without_rows_has_one_empty_chunk_and_no_tile() -> None:
    plan = build_plan(make_problem(Case(), DEVICE).expert_ids_TK, 5)
    counts = [end - first for first, end in pairwise(plan.row_fence_F.tolist())]
    assert counts[-1] == 0
    tables = build_row_tables(plan, 16, chunk_rows=8)
    tiles, chunks = ([expert for expert, _, _ in entries(table)] for table in (tables.tiles, tables.chunks))
    assert [tiles.count(expert) for expert in range(5)] == [-(-count // 16) for count in counts]
    assert [chunks.count(expert) for expert in range(5)] == [max(1, -(-count // 8)) for count in counts]


def test_an_expert_of_very_many_entries_has_them_all() -> None:
    plan = build_plan(torch.zeros(300, 1, dtype=torch.int64, device=DEVICE), 2)
    tables = build_row_tables(plan, 1, chunk_rows=2)
    assert list(entries(tables.tiles)) == [(0, row, row + 1) for row in range(300)]
    assert list(entries(tables.chunks)) == [*((0, row, row + 2) for row in range(0, 300, 2)), (1, 300, 300)]
