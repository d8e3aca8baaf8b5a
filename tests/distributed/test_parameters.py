"""Cutting adapters by experts and joining them again, beside the layout that PEFT and the kernels read."""

import pytest
import torch

from expertune.distributed.parameters import Cut, _chunks, cut_experts, join_experts
from expertune.layers.layout import lora_from_peft

EXPERTS, RANK, IN, OUT = 6, 3, 5, 4


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_each_process_gets_its_experts(size: int) -> None:
    a, b = torch.randn(EXPERTS * RANK, IN), torch.randn(OUT, RANK * EXPERTS)
    whole = lora_from_peft(a, b, EXPERTS, 1.0)
    parts_a = [cut_experts(a, Cut.EXPERT_SLOWEST, EXPERTS, index, size) for index in range(size)]
    parts_b = [cut_experts(b, Cut.EXPERT_FASTEST, EXPERTS, index, size) for index in range(size)]
    for index in range(size):
        part = lora_from_peft(parts_a[index], parts_b[index], EXPERTS // size, 1.0)
        mine = slice(index * EXPERTS // size, (index + 1) * EXPERTS // size)
        assert torch.equal(part.a_ERX, whole.a_ERX[mine])
        assert torch.equal(part.b_EYR, whole.b_EYR[mine])
    assert torch.equal(join_experts(parts_a, Cut.EXPERT_SLOWEST, EXPERTS), a)
    assert torch.equal(join_experts(parts_b, Cut.EXPERT_FASTEST, EXPERTS), b)


@pytest.mark.parametrize(("length", "size"), [(8, 2), (7, 3), (2, 4), (5, 4), (0, 2)])
def test_shards_are_those_of_torch_chunk(length: int, size: int) -> None:
    rows = [list(chunk) for chunk in _chunks(length, size)]
    want = [chunk.tolist() for chunk in torch.arange(length).chunk(size)] if length else []
    assert rows == want + [[]] * (size - len(want))


def test_what_all_share_is_not_cut() -> None:
    weight = torch.randn(4, 4)
    assert cut_experts(weight, Cut.NONE, 0, 1, 2) is weight
    assert join_experts([weight, weight], Cut.NONE, 0) is weight
