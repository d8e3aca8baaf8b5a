"""Where tokens go: the kernels beside plain torch, and both beside a loop in Python."""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from expertune.ops.destination_kernels import launch_destinations
from expertune.ops.destinations import Destinations, find_destinations, plain_destinations, unpack_choices

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Case:
    tokens: int
    top_k: int = 2
    owners: int = 2
    local: int = 4
    dtype: torch.dtype = torch.int64
    weights: torch.dtype = torch.float32
    only: int | None = None  # the owner of all experts that are chosen


CASES = {
    "a block and a half": Case(97),
    "several blocks": Case(300, owners=4),
    "one token": Case(1),
    "no token": Case(0),
    "K is no power of two": Case(70, top_k=6),
    "eight owners": Case(130, top_k=8, owners=8, local=2),
    "three owners": Case(65, top_k=3, owners=3, local=5),
    "one owner": Case(40, owners=1),
    "all to the first": Case(80, only=0),
    "all to the last": Case(80, owners=4, only=3),
    "int32": Case(50, dtype=torch.int32),
    "weights in bf16": Case(90, top_k=3, weights=torch.bfloat16),
    "weights in fp64": Case(90, weights=torch.float64),
}


def draw(case: Case) -> tuple[Tensor, Tensor]:
    """(expert ids, routing weights)"""
    experts = case.local if case.only is not None else case.owners * case.local
    ids_TK = torch.rand(case.tokens, experts).argsort(1)[:, : case.top_k] + (case.only or 0) * case.local
    return ids_TK.to(case.dtype).to(DEVICE), torch.rand(ids_TK.shape).to(case.weights).to(DEVICE)


def by_hand(ids_TK: Tensor, weights_TK: Tensor, case: Case) -> Destinations:
    ids, num_most = ids_TK.tolist(), case.tokens * case.owners
    rows, counts, row_of_slot = [], [], [num_most] * num_most
    for owner in range(case.owners):
        first, before = owner * case.local, len(rows)
        local = [[i - first if first <= i < first + case.local else -1 for i in chosen] for chosen in ids]
        for token, chosen in enumerate(local):
            if any(i >= 0 for i in chosen):
                row_of_slot[token * case.owners + owner] = len(rows)
                rows.append((token, token * case.owners + owner, chosen))
        counts.append((len(rows) - before, sum(i >= 0 for chosen in local for i in chosen)))
    token_P = torch.tensor([token for token, _, _ in rows], dtype=torch.int64)
    ids_PK = torch.tensor([chosen for _, _, chosen in rows], dtype=torch.int32).view(-1, case.top_k)
    wide = torch.float64 if case.weights == torch.float64 else torch.float32
    weights_PK = weights_TK.cpu().to(wide)[token_P]
    return Destinations(
        token_P,
        torch.tensor([slot for _, slot, _ in rows], dtype=torch.int64),
        torch.cat((ids_PK, weights_PK.view(torch.int32)), dim=1),
        torch.tensor(row_of_slot, dtype=torch.int64),
        torch.tensor(counts, dtype=torch.int64),
        torch.tensor([0, len(rows)], dtype=torch.int32),
    )


def assert_equal(got: Destinations, want: Destinations) -> None:
    num_rows = int(want.fence_2[1])
    for field in fields(Destinations):
        value = getattr(got, field.name).cpu()
        value = value[:num_rows] if field.name in ("token_M", "slot_M", "choices_MX") else value
        assert value.dtype == getattr(want, field.name).dtype, field.name
        assert torch.equal(value, getattr(want, field.name)), field.name


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str) -> None:
    case, drawn = CASES[name], draw(CASES[name])
    want = by_hand(*drawn, case)
    for find in (find_destinations, plain_destinations):
        assert_equal(find(*drawn, case.owners, case.local), want)


@pytest.mark.skipif(ON_GPU, reason="in Triton's interpreter; the GPU's test runs it as well")
@pytest.mark.parametrize("name", CASES)
def test_on_a_cpu(name: str) -> None:
    case, drawn = CASES[name], draw(CASES[name])
    want = by_hand(*drawn, case)
    for find in (find_destinations, plain_destinations, launch_destinations):
        if find is not launch_destinations or case.weights != torch.float64:
            assert_equal(find(*drawn, case.owners, case.local), want)


def test_an_id_that_nobody_owns_goes_nowhere() -> None:
    ids_TK = torch.tensor([[0, 8], [-1, 9], [7, 3]], device=DEVICE)
    finds = (plain_destinations, find_destinations) if ON_GPU else (plain_destinations, launch_destinations)
    for find in finds:
        assert find(ids_TK, torch.ones(3, 2, device=DEVICE), 2, 4).counts_N2.tolist() == [[2, 2], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_choices_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    ids_TK, weights_TK = draw(Case(30, top_k=3, owners=1, weights=dtype))
    choices_MX = find_destinations(ids_TK, weights_TK, 1, 4).choices_MX
    got_ids, got_weights = unpack_choices(choices_MX, 3, dtype)
    assert torch.equal(got_ids.long(), ids_TK)
    assert got_weights.dtype == dtype
    assert torch.equal(got_weights, weights_TK)
