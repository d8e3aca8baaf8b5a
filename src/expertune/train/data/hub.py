"""Rows of a data set on the Hugging Face hub, through datasets.load_dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from expertune.errors import DataError
from expertune.train.data.locate import missing_message
from expertune.train.data.readers import Origin, RawRow
from expertune.train.data.spec import SourceSpec

BATCH_ROWS = 1024


def read_hub(spec: SourceSpec) -> Iterator[RawRow]:
    """The rows of one split (`train` unless said otherwise) of a hub data set, in the hub's order."""
    split = spec.split or "train"
    label = f"{spec.path}{f'/{spec.name}' if spec.name else ''} ({split})"
    dataset = _load(spec, split)
    if not hasattr(dataset, "iter") or isinstance(dataset, dict):
        raise DataError(f"{spec.path}: split {split!r} gave {type(dataset).__name__}, not one data set: name one split")
    origin = Origin(label, "row")
    number = 0
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        columns = list(batch)
        for cells in zip(*batch.values(), strict=True):
            number += 1
            yield RawRow(origin, number, dict(zip(columns, cells, strict=True)))
    if number == 0:
        raise DataError(f"{label}: the data set is empty")


def _load(spec: SourceSpec, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            spec.path,
            name=spec.name,
            split=split,
            revision=spec.revision,
            data_files=list(spec.data_files) or None,
        )
    except Exception as error:  # the loaders of the hub fail in a dozen unrelated types; the words are what helps
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{missing_message(spec.path)}. Taken as a hub id instead, it could not be loaded: {reason}\n"
            "Check the name, the split and the network (HF_HUB_OFFLINE uses only what is cached), "
            "or point path at a local file."
        ) from error
