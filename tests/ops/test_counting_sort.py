"""The GPU's sort gives the plan that torch's sort gives: interpreted here, compiled on a GPU."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from expertune.ops import counting_sort
from expertune.ops.counting_sort import sort_and_cut, sort_slots
from expertune.ops.experts.scattermoe.tiles import build_row_tables
from expertune.ops.plan import ExpertPlan, build_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


def expected(ids_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    plan = build_plan(ids_TK.cpu(), num_experts, sentinels=True)
    return plan.slot_of_row_S, plan.row_of_slot_S, plan.token_of_row_S, plan.row_fence_F


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(1, 1, 1), (37, 2, 5), (300, 8, 64), (70, 3, 300), (5, 4, 4), (0, 2, 3), (513, 1, 2)],
)
@pytest.mark.parametrize("sentinels", [False, True])
def test_agrees_with_torchs_sort(tokens: int, top_k: int, experts: int, sentinels: bool) -> None:
    generator = torch.Generator().manual_seed(tokens + experts)
    low, high = (-2, experts + 3) if sentinels else (0, experts)
    ids_TK = torch.randint(low, high, (tokens, top_k), generator=generator)
    got = sort_slots(ids_TK.to(DEVICE), experts)
    rows = int(expected(ids_TK, experts)[3][-1])
    for name, mine, want in zip(got._fields, got, expected(ids_TK, experts), strict=True):
        assert mine.dtype == want.dtype
        if name == "row_of_slot_S":
            valid = ((ids_TK >= 0) & (ids_TK < experts)).reshape(-1)
            mine, want = mine.cpu()[valid], want[valid]
        elif name != "row_fence_F":  # sentinels come last, in an order of their own
            assert sorted(got.slot_of_row_S.tolist()) == list(range(tokens * top_k))
            mine, want = mine.cpu()[:rows], want[:rows]
        assert torch.equal(mine.cpu(), want), name


def test_many_blocks_of_several_tiles() -> None:
    ids_TK = torch.randint(0, 9, (1000, 2), generator=torch.Generator().manual_seed(0))
    with patch.object(counting_sort, "MAX_BLOCKS", 4), patch.object(counting_sort, "TILE", 32):
        got = sort_slots(ids_TK.to(DEVICE), 9)
    for mine, want in zip(got, expected(ids_TK, 9), strict=True):
        assert torch.equal(mine.cpu(), want)


@pytest.mark.gpu
def test_build_plan_uses_it_on_a_gpu_and_takes_any_strides() -> None:
    ids_TK = torch.randint(0, 128, (8, 4096)).t()[:, ::2]
    got, want = build_plan(ids_TK.cuda(), 128), build_plan(ids_TK, 128)
    for name in ("slot_of_row_S", "row_of_slot_S", "token_of_row_S", "row_fence_F"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (37, 2, 5), (100, 8, 64), (30, 3, 130), (0, 2, 3), (600, 1, 2)]
)
@pytest.mark.parametrize("sentinels", [False, True])
def test_the_tables_in_passing_are_those_of_their_own_launch(
    tokens: int, top_k: int, experts: int, sentinels: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens + experts)
    low, high = (-2, experts + 3) if sentinels else (0, experts)
    ids_TK = torch.randint(low, high, (tokens, top_k), generator=generator).to(DEVICE)
    rows, tables = sort_and_cut(ids_TK, experts, 16, 8)
    alone = sort_slots(ids_TK, experts)
    assert torch.equal(rows.row_fence_F, alone.row_fence_F)
    assert torch.equal(rows.row_of_slot_S, alone.row_of_slot_S)
    plan = ExpertPlan(tokens, top_k, experts, *alone, has_sentinels=sentinels)
    want = build_row_tables(plan, 16, chunk_rows=8)
    for mine, theirs in ((tables.tiles, want.tiles), (tables.chunks, want.chunks)):
        count = int(theirs.count_1)
        assert int(mine.count_1) == count
        assert int(mine.entries_4M[3, 1]) == int(theirs.entries_4M[3, 1]) == 0  # the counter
        assert torch.equal(mine.entries_4M[:3, :count], theirs.entries_4M[:3, :count])
        assert mine.entries_4M.shape == theirs.entries_4M.shape
    with_tables = replace(plan, tables=tables)
    assert build_row_tables(with_tables, 16, chunk_rows=8) is tables
    assert build_row_tables(with_tables, 32, chunk_rows=8) is not tables


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 1023, 8192, 32768, 200_000])
@pytest.mark.parametrize("experts", [8, 64, 128, 256, 513])
def test_real_sizes(tokens: int, experts: int) -> None:
    """Even loads, one expert with most tokens, and one with all: the order, and the same bits again."""
    generator = torch.Generator().manual_seed(tokens + experts)
    even = torch.randint(0, experts, (tokens, 8), generator=generator)
    skewed = (torch.rand(tokens, 8, generator=generator) ** 6 * experts).long()
    for ids_TK in (even, skewed, torch.full_like(even, experts - 1)):
        rows, tables = sort_and_cut(ids_TK.cuda(), experts, 128, 1024)
        for mine, want in zip(rows, expected(ids_TK, experts), strict=True):
            assert torch.equal(mine.cpu(), want)
        plan = ExpertPlan(tokens, 8, experts, *rows, has_sentinels=False)
        alone, again = build_row_tables(plan, 128), sort_and_cut(ids_TK.cuda(), experts, 128, 1024)
        for other in (alone, again[1]):
            for mine, theirs in ((tables.tiles, other.tiles), (tables.chunks, other.chunks)):
                count = int(theirs.count_1)
                assert int(mine.count_1) == count
                assert int(mine.entries_4M[3, 1]) == 0
                assert torch.equal(mine.entries_4M[:3, :count], theirs.entries_4M[:3, :count])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(rows, again[0], strict=True))


@pytest.mark.gpu
def test_build_plan_cuts_the_rows_where_it_is_asked_to() -> None:
    ids_TK = torch.randint(0, 128, (4096, 8), device="cuda")
    plan = build_plan(ids_TK, 128, table_rows=(128, 1024))
    assert plan.tables is not None
    want = build_row_tables(build_plan(ids_TK, 128), 128)
    count = int(want.tiles.count_1)
    assert torch.equal(plan.tables.tiles.entries_4M[:3, :count], want.tiles.entries_4M[:3, :count])
