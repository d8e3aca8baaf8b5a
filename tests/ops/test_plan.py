"""The plan: sorted by expert, stable, fences right, sentinels at the end, errors that name the argument."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertune.ops.plan import build_plan


def test_worked_example_of_the_docstring() -> None:
    plan = build_plan(torch.tensor([[1, 0], [2, 1], [2, 2]]), 3)
    assert plan.slot_of_row_S.tolist() == [1, 0, 3, 2, 4, 5]
    assert plan.token_of_row_S.tolist() == [0, 0, 1, 1, 2, 2]
    assert plan.row_fence_F.tolist() == [0, 1, 3, 6]
    assert plan.expert_of_row().tolist() == [0, 1, 1, 2, 2, 2]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 9), st.booleans(), st.integers(0, 10_000))
def test_invariants(tokens: int, top_k: int, experts: int, sentinels: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-1, experts + 2) if sentinels else (0, experts)
    ids_TK = torch.randint(low, high, (tokens, top_k), generator=generator)
    plan = build_plan(ids_TK, experts, sentinels=sentinels)
    ids_S = ids_TK.reshape(-1)
    assert sorted(plan.slot_of_row_S.tolist()) == list(range(tokens * top_k))
    assert torch.equal(plan.slot_of_row_S[plan.row_of_slot_S], torch.arange(tokens * top_k))
    for expert in range(experts):
        rows = plan.slot_of_row_S[plan.row_fence_F[expert] : plan.row_fence_F[expert + 1]]
        assert rows.tolist() == torch.where(ids_S == expert)[0].tolist()  # its slots, in order
    valid = ((ids_S >= 0) & (ids_S < experts)).sum()
    assert plan.row_fence_F[-1] == valid
    assert plan.sentinel_rows().sum() == ids_S.numel() - valid


@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), 2, r"expert_ids_TK: got shape \(3,\)"),
        (torch.zeros(3, 1), 2, "got dtype torch.float32"),
        (torch.zeros(3, 0, dtype=torch.int64), 2, "experts per token"),
        (torch.zeros(3, 1, dtype=torch.int64), 0, "num_experts: got 0"),
        (torch.tensor([[0], [2]]), 2, "ids span 0 to 2, need 0 to 1"),
        (torch.tensor([[0], [-1]]), 2, "ids span -1 to 0"),
    ],
)
def test_bad_input_is_named(ids: torch.Tensor, experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan(ids, experts)


def test_rows_of_sentinels_can_be_cut_off() -> None:
    ids_TK = torch.tensor([[1, -1], [-1, -1], [0, 1]])
    whole, cut = build_plan(ids_TK, 2, sentinels=True), build_plan(ids_TK, 2, sentinels=True, num_live_rows=3)
    assert (whole.num_rows, cut.num_rows) == (6, 3)
    assert cut.slot_of_row_S.tolist() == whole.slot_of_row_S[:3].tolist() == [4, 0, 5]
    assert cut.row_fence_F.tolist() == whole.row_fence_F.tolist()
    assert cut.to_slots(torch.tensor([10.0, 20.0, 30.0])).tolist() == [20, 0, 0, 0, 10, 30]
    none = build_plan(torch.full((2, 2), -1), 2, sentinels=True, num_live_rows=0)
    assert none.to_slots(torch.empty(0, 3)).tolist() == torch.zeros(4, 3).tolist()
