"""Checked rows in an Arrow file on disk, read back as a memory-mapped Dataset that knows where each row came from.

The file is named after the hash of its content, so it can never be stale, and two runs (or the ranks of one run) on the
same data share one file and with it the tokenised rows that `datasets` caches beside it. Sources are read every time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expertune.errors import DataError
from expertune.train.data.readers import Origin
from expertune.train.data.spec import Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

BATCH_ROWS = 1000
_FILE_COLUMN = "_origin_file"
_NUMBER_COLUMN = "_origin_number"


@dataclass(frozen=True)
class StoredRow:
    """A row ready to be written: its columns, the index of its origin, and its number there."""

    columns: dict[str, Any]
    origin: int
    number: int


@dataclass(frozen=True)
class Rows:
    """A data set beside the place of each of its rows.

    dataset: only the columns TRL knows. origins: the files. origin_index, number: [rows] which file, which row of it.
    """

    dataset: Dataset
    shape: Shape
    origins: tuple[Origin, ...]
    origin_index: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.number)

    def where(self, index: int) -> str:
        """`file:line` of a row."""
        return self.origins[int(self.origin_index[index])].at(int(self.number[index]))

    def select(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """These rows, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Rows(
            self.dataset.select(chosen), self.shape, self.origins, self.origin_index[chosen], self.number[chosen]
        )


def store_rows(rows: Iterable[StoredRow], shape: Shape, origins: Iterable[Origin], folder: Path) -> Rows:
    """Writes rows under `folder` as they come, a batch in memory at a time, and maps the file.

    `origins` may still grow while `rows` is consumed. Raises DataError when the folder cannot be written.
    """
    from datasets import Dataset

    with _temporary_file(folder) as temporary:
        _write(rows, shape, temporary)
        with temporary.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
        final = folder / digest / "rows.arrow"
        if not final.exists():
            final.parent.mkdir(exist_ok=True)
            temporary.replace(final)
    dataset = Dataset.from_file(str(final))
    table = dataset.data
    origin_index = table.column(_FILE_COLUMN).to_numpy()
    number = table.column(_NUMBER_COLUMN).to_numpy()
    return Rows(dataset.remove_columns([_FILE_COLUMN, _NUMBER_COLUMN]), shape, tuple(origins), origin_index, number)


def default_folder() -> Path:
    """Beside the other prepared data sets of this user: $HF_DATASETS_CACHE/expertune."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "expertune"


@contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    """A path beside the final one, gone afterwards unless it was renamed; OSError becomes DataError."""
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="writing-", suffix=".arrow", dir=folder)
        os.close(handle)
        temporary = Path(name)
        yield temporary
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write the prepared rows: {error.strerror or error}. "
            "HF_DATASETS_CACHE names another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _write(rows: Iterable[StoredRow], shape: Shape, path: Path) -> None:
    import pyarrow as pa

    schema = _schema(shape)
    remaining = iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(remaining, BATCH_ROWS)):
            columns: dict[str, list[Any]] = {name: [row.columns[name] for row in batch] for name in schema.names[:-2]}
            columns[_FILE_COLUMN] = [row.origin for row in batch]
            columns[_NUMBER_COLUMN] = [row.number for row in batch]
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))


def _schema(shape: Shape) -> Any:
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    match shape:
        case "chat":
            columns = [("messages", messages)]
        case "prompt_completion_messages":
            columns = [("prompt", messages), ("completion", messages)]
        case "prompt_completion_strings":
            columns = [("prompt", pa.string()), ("completion", pa.string())]
        case "text":
            columns = [("text", pa.string())]
    return pa.schema([*columns, (_FILE_COLUMN, pa.int32()), (_NUMBER_COLUMN, pa.int64())])
