"""Every row is dealt out once, and every process makes as many steps."""

import pytest
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from expertune.train.batches import FILLER, CollateFiller, DealtBatches, WithFiller


def dealt(num_rows: int, size: int, num_processes: int, *, drop_last: bool = False) -> list[list[list[int]]]:
    batches = BatchSampler(SequentialSampler(range(num_rows)), size, drop_last)
    loaders = [DealtBatches(batches, num_processes, rank, num_rows) for rank in range(num_processes)]
    out = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(each) for each in out]
    return out


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 45])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_row_once(num_rows: int, size: int, num_processes: int) -> None:
    out = dealt(num_rows, size, num_processes)
    assert len({len(each) for each in out}) == 1, "processes make different numbers of steps"
    rows = [row for each in out for batch in each for row in batch if row != num_rows]
    assert sorted(rows) == list(range(num_rows))
    in_order = [batch for round_ in zip(*out, strict=True) for batch in round_ if batch != [num_rows]]
    assert in_order == list(BatchSampler(SequentialSampler(range(num_rows)), size, False)), "not one process's order"


def test_a_round_that_is_not_full_can_be_dropped() -> None:
    assert dealt(7, 2, 2, drop_last=True) == [[[0, 1]], [[2, 3]]]


def test_nothing_is_learned_from_a_filler() -> None:
    rows = WithFiller([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}])
    assert len(rows) == 2

    def collate(chosen: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in chosen]) for key in chosen[0]}

    collated = CollateFiller(collate)
    plain, filler = collated(rows.__getitems__([0, 1])), collated(rows.__getitems__([2]))
    assert FILLER not in plain
    assert plain["labels"].tolist() == [[5, 6], [7, 8]]
    assert FILLER in filler
    assert filler["input_ids"].tolist() == [[5, 6]]
    assert filler["labels"].tolist() == [[-100, -100]]
