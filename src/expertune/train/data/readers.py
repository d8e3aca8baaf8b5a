"""Files to raw rows, one at a time, each with the number a person finds it by.

A row that cannot be read but whose neighbours can (one broken line of JSON) comes out with its problem. What makes the
rest of the file unreadable (an open quote in CSV, a broken JSON array, a truncated archive) is a DataError at once:
there is no telling where the next row begins.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from expertune.errors import DataError

FileFormat = Literal["jsonl", "json", "csv", "parquet"]
ROW_KEYS = ("messages", "conversations")
PARQUET_BATCH_ROWS = 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Origin:
    """A file or a hub data set as the messages name it; rows are counted from 1."""

    label: str
    unit: Literal["line", "element", "row"]

    def at(self, number: int) -> str:
        return f"{self.label}:{number}" if self.unit == "line" else f"{self.label}: {self.unit} {number}"


@dataclass(frozen=True)
class SourceFile:
    """One local file of a source."""

    path: Path
    label: str
    format: FileFormat


@dataclass(frozen=True)
class RawRow:
    """One row as it was read; `problem` says why there is no value."""

    origin: Origin
    number: int
    value: Any
    problem: str | None = None

    @property
    def where(self) -> str:
        return self.origin.at(self.number)


def read_file(file: SourceFile) -> Iterator[RawRow]:
    """The rows of one file, in order. Raises DataError when the file as a whole cannot be read or has no row."""
    readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
    empty = True
    try:
        for row in readers[file.format](file):
            empty = False
            yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file.label}: not a readable gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{file.label}: cannot be read: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{file.label}: the file is empty: it has no row")


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(file: SourceFile) -> Iterator[RawRow]:
    origin = Origin(file.label, "line")
    with _open_bytes(file.path) as lines:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(_BOM) if number == 1 else line
            if not text.strip():
                continue
            if number == 1 and text.lstrip().startswith(b"["):
                raise DataError(
                    f"{file.label}:1: begins with '[', so it is a JSON array and not one JSON object per line: "
                    "name it .json (or set ds_type: json and give it that suffix)"
                )
            yield _parse_line(origin, number, text)


def _parse_line(origin: Origin, number: int, line: bytes) -> RawRow:
    try:
        return RawRow(origin, number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RawRow(origin, number, None, _utf8_problem(error))
    except json.JSONDecodeError as error:
        return RawRow(origin, number, None, f"invalid JSON at column {error.colno}: {error.msg}")
    except RecursionError:
        return RawRow(origin, number, None, "invalid JSON: nested too deeply")


def _utf8_problem(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1} of the line"


def _read_json(file: SourceFile) -> Iterator[RawRow]:
    with _open_bytes(file.path) as stream:
        data = stream.read().removeprefix(_BOM)
    if not data.strip():
        return
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file.label}:{line}: invalid UTF-8: byte 0x{data[error.start]:02x}. Save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        if (
            error.msg == "Extra data"
        ):  # a complete value, then more: JSON Lines with the suffix of JSON, as hubs like it
            yield from _read_jsonl(file)
            return
        raise DataError(f"{file.label}:{error.lineno}: invalid JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{file.label}: invalid JSON: nested too deeply") from error
    origin = Origin(file.label, "element")
    for number, element in enumerate(_elements(file, value), 1):
        yield RawRow(origin, number, element)


def _elements(file: SourceFile, value: Any) -> list[Any]:
    """The rows in a JSON value: a list, an object that holds one list, or one row that is by itself in the file."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{file.label}: holds {type_name(value)}; need a list of objects")
    if any(key in value for key in ROW_KEYS):
        return [value]
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if len(lists) != 1:
        raise DataError(
            f"{file.label}: an object with {len(lists)} lists (its keys: {', '.join(map(str, value)) or 'none'}); "
            "need a list of objects, or an object that holds exactly one"
        )
    return list(value[lists[0]])


def _read_csv(file: SourceFile) -> Iterator[RawRow]:
    """Rows of a CSV file with a header, each at the real line it begins on."""
    origin = Origin(file.label, "line")
    with _open_bytes(file.path) as stream:
        # Bytes that are no UTF-8 become lone surrogates, so that the row that has them can be named.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        records = _csv_records(file, text)
        line, header = next(records, (0, []))
        if not header:
            return
        if _has_surrogate("".join(header)):
            raise DataError(f"{origin.at(line)}: the header is invalid UTF-8. Save the file as UTF-8")
        names = [name.strip() for name in header]
        if "" in names or len(set(names)) != len(names):
            raise DataError(
                f"{origin.at(line)}: the header has an empty or repeated column name: {', '.join(map(repr, names))}"
            )
        for number, cells in records:
            if len(cells) != len(names):
                yield RawRow(origin, number, None, f"{len(cells)} cells, but the header has {len(names)}")
            elif _has_surrogate("".join(cells)):
                yield RawRow(origin, number, None, "invalid UTF-8")
            else:
                yield RawRow(origin, number, dict(zip(names, cells, strict=True)))


def _csv_records(file: SourceFile, text: io.TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
    """(line the record begins on, its cells), without blank lines."""
    reader = csv.reader(text, strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{file.label}:{begins}: invalid CSV: {error}. The rows after it cannot be told apart"
                + ("; use jsonl or parquet for cells this long" if "field larger" in str(error) else "")
            ) from error
        if cells:
            yield begins, cells


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def _read_parquet(file: SourceFile) -> Iterator[RawRow]:
    import pyarrow as pa
    from pyarrow import parquet

    origin = Origin(file.label, "row")
    number = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(origin, number, value)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file.label}: not a readable parquet file (after row {number}): {error}") from error


def type_name(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
