"""Sums over the rows of each expert against the plain sum: ranks, chunks, strides, factors, experts without rows."""

import pytest
import torch
from torch import Tensor

from expertune.ops.experts.scattermoe.sums import RowsOf, launch_expert_sum
from expertune.ops.experts.scattermoe.tiles import build_row_tables
from expertune.ops.plan import ExpertPlan, build_plan
from tests.comparing import assert_agrees

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOKENS, EXPERTS = 50, 4


def draw_plan(*, sentinels: bool = False) -> ExpertPlan:
    """Expert 1 has most rows, expert 3 none."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.multinomial(torch.tensor([0.2, 0.7, 0.1]), TOKENS * 2, replacement=True, generator=generator)
    if sentinels:
        ids_TK[::3] = -1
    return build_plan(ids_TK.view(TOKENS, 2).to(DEVICE), EXPERTS, sentinels=sentinels)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def padded(left_SR: Tensor) -> Tensor:
    width = max(16, 1 << (left_SR.shape[1] - 1).bit_length())
    return torch.nn.functional.pad(left_SR, (0, width - left_SR.shape[1])).contiguous()


def plain_sum(left_SR: Tensor, rows_SX: Tensor, plan: ExpertPlan, dtype: torch.dtype = torch.float32) -> Tensor:
    fence = plan.row_fence_F.tolist()
    blocks = [slice(fence[expert], fence[expert + 1]) for expert in range(plan.num_experts)]
    return torch.stack([left_SR[rows].to(dtype).T @ rows_SX[rows].to(dtype) for rows in blocks])


@pytest.mark.parametrize("chunk_rows", [16, 40, 1024], ids="chunks of {}".format)
@pytest.mark.parametrize("rank", [1, 3, 16, 20, 64, 100, 256])
def test_ranks_and_chunks(rank: int, chunk_rows: int) -> None:
    plan = draw_plan()
    left_SR, rows_SX = draw(plan.num_rows, rank), draw(plan.num_rows, 40)
    out_ERX = torch.empty(EXPERTS, rank, 40, device=DEVICE)
    chunks = build_row_tables(plan, 16, chunk_rows).chunks
    launch_expert_sum(padded(left_SR), RowsOf(rows_SX, None), out_ERX, 0.7, plan, chunks)
    assert_agrees("sum", out_ERX, 0.7 * plain_sum(left_SR, rows_SX, plan), dtype=torch.float32)
    assert not out_ERX[3].any()


@pytest.mark.parametrize("chunk_rows", [16, 1024])
@pytest.mark.parametrize("sentinels", [False, True], ids=["all local", "sentinels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_rows_with_a_factor(dtype: torch.dtype, sentinels: bool, chunk_rows: int) -> None:
    plan = draw_plan(sentinels=sentinels)
    left_SR, x_TX, p_S = draw(plan.num_rows, 5, dtype=dtype), draw(TOKENS, 23, dtype=dtype), draw(plan.num_rows)
    out_ERX = torch.empty(EXPERTS, 5, 23, device=DEVICE)
    chunks = build_row_tables(plan, 16, chunk_rows).chunks
    launch_expert_sum(padded(left_SR), RowsOf(x_TX, plan.token_of_row_S), out_ERX, 1.5, plan, chunks, p_S=p_S)
    weighted_SR, x_SX = left_SR.float() * p_S.unsqueeze(1), x_TX[plan.token_of_row_S]
    want = 1.5 * plain_sum(weighted_SR, x_SX, plan)
    plain = 1.5 * plain_sum(weighted_SR.to(dtype), x_SX, plan)
    assert_agrees("sum", out_ERX, want, dtype=dtype, same_dtype=plain)


def test_any_strides_of_out_and_rows_and_no_value_beyond() -> None:
    plan = draw_plan()
    left_SR, rows_SX = draw(plan.num_rows, 6), draw(plan.num_rows, 70)[:, 7:47]
    want = plain_sum(left_SR, rows_SX, plan)
    chunks = build_row_tables(plan, 16, 24).chunks
    for order in ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0)):
        sizes = [(EXPERTS, 6, 40)[dim] for dim in order]
        room = torch.full([size + 1 for size in sizes], 7.0, device=DEVICE)  # a border on every side
        inner = room[tuple(slice(size) for size in sizes)]
        out_ERX = inner.permute(*[order.index(dim) for dim in range(3)])
        launch_expert_sum(padded(left_SR), RowsOf(rows_SX, None), out_ERX, 1.0, plan, chunks)
        assert_agrees(f"order {order}", out_ERX, want, dtype=torch.float32)
        inner.fill_(7.0)
        assert bool((room == 7).all()), "a value was written beyond out"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_sum_is_rounded_once_into_the_dtype_of_out(dtype: torch.dtype) -> None:
    plan = draw_plan()
    left_SR, rows_SX = draw(plan.num_rows, 16), draw(plan.num_rows, 32)
    out_ERX = torch.empty(EXPERTS, 16, 32, device=DEVICE, dtype=dtype)
    chunks = build_row_tables(plan, 16, 16).chunks
    launch_expert_sum(left_SR, RowsOf(rows_SX, None), out_ERX, 1.0, plan, chunks)
    assert_agrees("sum", out_ERX, plain_sum(left_SR, rows_SX, plan), dtype=dtype)


def test_two_runs_give_the_same_bits() -> None:
    plan = draw_plan()
    left_SR, rows_SX = draw(plan.num_rows, 16), draw(plan.num_rows, 40)
    chunks = build_row_tables(plan, 16, 16).chunks
    first, second = torch.empty(2, EXPERTS, 16, 40, device=DEVICE)
    for out_ERX in (first, second):
        launch_expert_sum(left_SR, RowsOf(rows_SX, None), out_ERX, 1.0, plan, chunks)
    assert torch.equal(first, second)


def test_no_row_at_all_gives_zeros() -> None:
    plan = build_plan(torch.empty(0, 2, dtype=torch.int64, device=DEVICE), EXPERTS)
    out_ERX = torch.empty(EXPERTS, 3, 40, device=DEVICE)
    chunks = build_row_tables(plan, 16).chunks
    launch_expert_sum(draw(0, 16), RowsOf(draw(0, 40), None), out_ERX, 1.0, plan, chunks)
    assert not out_ERX.any()
