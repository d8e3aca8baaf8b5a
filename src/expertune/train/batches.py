"""The batches of an epoch dealt out to processes, each row once, however many there are.

Process w of W takes batches w, W + w, 2 W + w ... of the order that one process has. Where the last round has fewer
than W batches, the processes without one take part with a filler: the first row of the data with nothing to learn from
in it, so that every process makes the same number of steps, as their messages need, and the gradients stay those of
one process. (accelerate would start over from the first rows, and train on them twice.)
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import DataLoader, Dataset

FILLER = "expertune_filler"
"""The key of a batch that is one."""

_NOTHING_LEFT = -100  # what a label says of a token that is not trained


class DealtBatches(BatchSamplerShard):
    """The batches of one process. A filler is the one index past the end of the data."""

    def __init__(self, batches: Any, num_processes: int, process_index: int, filler: int) -> None:
        super().__init__(batches, num_processes, process_index, even_batches=False)
        self.filler = filler

    @property
    def sampler(self) -> Any:
        """What draws the order: where batches are skipped to resume, accelerate looks here to tell it the epoch."""
        return self.batch_sampler.sampler

    def __iter__(self) -> Iterator[list[int]]:
        """Whole rounds, the last one with fillers. With `drop_last` a round that is not full is left out."""
        mine: list[int] | None = None
        place = -1
        for number, batch in enumerate(self.batch_sampler):
            place = number % self.num_processes
            if place == self.process_index:
                mine = batch
            if place == self.num_processes - 1:
                assert mine is not None
                yield mine
                mine = None
        if 0 <= place < self.num_processes - 1 and not self.drop_last:
            yield [self.filler] if mine is None else mine

    def __len__(self) -> int:
        rounds, rest = divmod(len(self.batch_sampler), self.num_processes)
        return rounds + int(rest > 0 and not self.drop_last)


class WithFiller(Dataset[Any]):
    """A data set with one more row, the filler, at its end."""

    total_dataset_length = 0  # what accelerate cuts metrics of a last batch down to: nothing is there twice

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.rows):
            return self.rows[index]
        return {**self.rows[0], FILLER: True}

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if indices != [len(self.rows)] and hasattr(self.rows, "__getitems__"):
            return list(self.rows.__getitems__(indices))
        return [self[index] for index in indices]


class CollateFiller:
    """Makes batches as `collate` does; in a filler no token is trained, and the key FILLER says what it is."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        is_filler = any(FILLER in row for row in rows)
        batch = self.collate([{key: value for key, value in row.items() if key != FILLER} for row in rows])
        if is_filler:
            batch["labels"] = torch.full_like(batch["labels"], _NOTHING_LEFT)
            batch[FILLER] = torch.ones(())
        return batch


def deal_out(loader: DataLoader[Any], num_processes: int, process_index: int) -> DataLoaderShard:
    """The loader that accelerate prepared for one process of several, with every row once and no round short."""
    shard = loader.batch_sampler
    assert isinstance(shard, BatchSamplerShard)
    rows = WithFiller(loader.dataset)
    kept = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
    return DataLoaderShard(
        rows,
        device=loader.device,  # type: ignore[attr-defined]
        batch_sampler=DealtBatches(shard.batch_sampler, num_processes, process_index, len(rows)),
        collate_fn=CollateFiller(loader.collate_fn),
        persistent_workers=loader.persistent_workers,
        **{name: getattr(loader, name) for name in kept},
    )
