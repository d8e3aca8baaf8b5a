"""From the entries of `datasets:` to training and held-out rows: read, validate, map, store, split."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from expertune.errors import DataError
from expertune.train.data.detect import choose_format
from expertune.train.data.formats import PromptCompletionMessages, RowFormat, convert_row
from expertune.train.data.hub import read_hub
from expertune.train.data.locate import local_slice, locate
from expertune.train.data.messages import SeenNames
from expertune.train.data.problems import ProblemLog, RowError, rows_word
from expertune.train.data.readers import Origin, RawRow, read_file
from expertune.train.data.report import DataReport, SourceReport
from expertune.train.data.spec import Kind, Shape, SourceSpec, kind_of
from expertune.train.data.store import Rows, StoredRow, default_folder, store_rows

HEAD_ROWS = 100  # enough to see the columns that only some rows have; they stay in memory until the source is read


@dataclass(frozen=True)
class LoadedData:
    """What a run trains on and is tested on: `train.dataset` and `heldout.dataset` go to SFTTrainer as they are."""

    train: Rows
    heldout: Rows | None
    kind: Kind
    report: DataReport


@dataclass(frozen=True)
class _OpenSource:
    """A source whose format is known and whose rows are still to be read."""

    spec: SourceSpec
    rows: Iterator[RawRow]
    format: RowFormat
    num_files: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """Training or held-out sources, read."""

    rows: Rows
    reports: tuple[SourceReport, ...]
    num_duplicates: int


def load_data(
    specs: Sequence[SourceSpec],
    *,
    heldout_specs: Sequence[SourceSpec] = (),
    val_set_size: float = 0,
    seed: int,
    skip_bad_rows: bool = False,
    folder: Path | None = None,
) -> LoadedData:
    """Reads every source in order and holds some rows out.

    specs: the training sources. heldout_specs: sources held out as they are. val_set_size: instead of those, how much
    of the training rows to hold out: a count from 1 (int), or a share between 0 and 1 (float); which rows, the seed
    says, and both parts keep their order. skip_bad_rows: leave bad rows out and report them; otherwise any is an error.
    folder: where the prepared rows are written (default: in the cache of `datasets`).

    Raises DataError with the file and line of the first bad rows, or with what is wrong with a source as a whole.
    """
    if not specs:
        raise DataError("no data set: `datasets:` is empty")
    if heldout_specs and val_set_size:
        raise DataError("both held-out data sets (test_datasets) and val_set_size are set: keep one of them")
    folder = folder or default_folder()
    opened, heldout_opened = [_open(spec) for spec in specs], [_open(spec) for spec in heldout_specs]
    shape = _common_shape([*opened, *heldout_opened])
    problems = ProblemLog()
    parts = [
        _read_part(sources, shape, problems, folder, heldout=heldout)
        for sources, heldout in ((opened, False), (heldout_opened, True))
        if sources
    ]
    if problems.count and not skip_bad_rows:
        raise DataError(
            f"{rows_word(problems.count)} cannot be trained on:\n{problems.text()}\n"
            "Mend them, or set skip_bad_rows: true to leave them out."
        )
    sources = tuple(chain.from_iterable(part.reports for part in parts))
    for source in sources:
        if source.num_rows == 0:
            raise DataError(
                f"{source.path}: no row is left"
                + (f"; all {source.num_skipped} are bad:\n{problems.text()}" if source.num_skipped else "")
            )
    train, heldout = parts[0].rows, parts[1].rows if heldout_specs else None
    if val_set_size:
        train, heldout = _split(train, val_set_size, seed)
    report = DataReport(
        kind=kind_of(shape),
        sources=sources,
        num_train=len(train),
        num_heldout=len(heldout) if heldout is not None else 0,
        num_duplicates=parts[0].num_duplicates,
        skipped=tuple(problems.lines()),
        notes=(),
    )
    return LoadedData(train, heldout, kind_of(shape), report)


def _open(spec: SourceSpec) -> _OpenSource:
    """Finds a source and settles its format by its first rows."""
    local = locate(spec)
    rows: Iterator[RawRow]
    notes: tuple[str, ...]
    if local is None:
        rows, num_files = read_hub(spec), 0
        notes = ("ds_type has no meaning for a hub data set",) if spec.ds_type else ()
    else:
        rows = islice(chain.from_iterable(map(read_file, local.files)), *local_slice(spec))
        num_files, notes = len(local.files), local.notes
    head: list[RawRow] = []
    for row in rows:
        head.append(row)
        if len(head) >= HEAD_ROWS and any(isinstance(seen.value, dict) for seen in head):
            break
    objects = [row.value for row in head if isinstance(row.value, dict)]
    if not head:
        raise DataError(f"{spec.path}: split {spec.split!r} has no row")
    if not objects:
        log = ProblemLog()
        for row in head:
            log.add(row.where, row.problem or "is not an object")
        raise DataError(f"{spec.path}: no row can be read:\n{log.text()}")
    return _OpenSource(spec, chain(head, rows), choose_format(spec, objects), num_files, notes)


def _common_shape(sources: Sequence[_OpenSource]) -> Shape:
    """The one shape all rows can have without changing what is trained, else DataError.

    Prompt/completion in messages joins a chat: the same conversation, with the loss on the same answers (a row whose
    prompt holds an answer is refused one by one). Strings join nothing: no template says how they would be a chat.
    """
    shapes = {source.format.shape for source in sources}
    if len(shapes) == 1:
        return shapes.pop()
    if shapes == {"chat", "prompt_completion_messages"}:
        return "chat"
    listed = "\n".join(f"  {source.spec.path}: {source.format.name}" for source in sources)
    raise DataError(
        f"the data sets are of different kinds, and one run trains on one kind:\n{listed}\n"
        "Ways out: write them all as `messages` (prompt and completion as lists of messages go together with chats), "
        "or train one run per kind, the second on the adapter of the first (lora_model_dir)."
    )


def _read_part(
    sources: Sequence[_OpenSource], shape: Shape, problems: ProblemLog, folder: Path, heldout: bool
) -> _Part:
    origins: dict[Origin, int] = {}
    hashes = array("q")
    reports: list[SourceReport] = []

    def rows() -> Iterator[StoredRow]:
        for source in sources:
            seen, before, bad_before = SeenNames(), len(hashes), problems.count
            row_format = source.format
            if shape == "chat" and isinstance(row_format, PromptCompletionMessages):
                row_format = PromptCompletionMessages(row_format.reader, as_chat=True)
            for raw in source.rows:
                try:
                    if raw.problem is not None:
                        raise RowError(raw.problem)
                    columns = convert_row(row_format, raw.value, seen)
                except RowError as error:
                    problems.add(raw.where, str(error))
                    continue
                hashes.append(hash(str(columns)))
                yield StoredRow(columns, origins.setdefault(raw.origin, len(origins)), raw.number)
            reports.append(
                SourceReport(
                    path=source.spec.path,
                    heldout=heldout,
                    format=row_format.name,
                    detected=source.spec.type is None,
                    num_files=source.num_files,
                    num_rows=len(hashes) - before,
                    num_skipped=problems.count - bad_before,
                    unused=tuple(sorted(seen.unused)),
                    renamed=tuple(sorted(seen.renamed)),
                    notes=source.notes,
                )
            )

    stored = store_rows(rows(), shape, origins, folder)
    num_duplicates = len(hashes) - len(np.unique(np.frombuffer(hashes, dtype=np.int64))) if hashes else 0
    return _Part(stored, tuple(reports), num_duplicates)


def _split(rows: Rows, size: float, seed: int) -> tuple[Rows, Rows]:
    """(train, held out): a seeded draw without replacement; both keep the order of the data."""
    total = len(rows)
    if isinstance(size, bool) or size < 0 or (isinstance(size, float) and not (size < 1 or size.is_integer())):
        raise DataError(f"val_set_size is {size}; need a share between 0 and 1, or a whole number of rows")
    count = int(size) if size >= 1 else math.ceil(total * size - 1e-9)
    if count >= total:
        raise DataError(
            f"val_set_size {size} holds {rows_word(count)} out of {total}: at least one must be left to train on"
        )
    order = np.random.default_rng(seed).permutation(total)
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))
