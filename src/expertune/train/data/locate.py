"""From a data set's `path` to the files it means, or to the answer that it is a hub id."""

from __future__ import annotations

import difflib
import glob
import re
from dataclasses import dataclass
from pathlib import Path

from expertune.errors import DataError
from expertune.train.data.readers import FileFormat, SourceFile
from expertune.train.data.spec import SourceSpec

READABLE = ".jsonl, .ndjson, .json, .csv (each also .gz), .parquet"
_BUILDERS = ("json", "csv", "parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SLICE = re.compile(r"train(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class LocalFiles:
    """The files of one source in the order they are read, and what the report must say about the choice."""

    files: tuple[SourceFile, ...]
    notes: tuple[str, ...] = ()


def locate(spec: SourceSpec) -> LocalFiles | None:
    """The local files a source means, sorted by name; None when its path can only be a hub id."""
    path = Path(spec.path).expanduser()
    if not spec.path.strip():
        raise DataError("a data set has an empty path")
    if spec.path in _BUILDERS and spec.data_files and not path.exists():  # load_dataset's own spelling
        return _listed_files(spec, Path(), ds_type=spec.ds_type or spec.path)
    if path.is_file():
        if spec.data_files:
            raise DataError(f"{spec.path}: is a file, so data_files has no meaning beside it")
        return LocalFiles((_source_file(path, spec.ds_type),))
    if spec.data_files and (path.is_dir() or not _may_be_hub_id(spec.path)):
        return _listed_files(spec, path, ds_type=spec.ds_type)
    if path.is_dir():
        return _folder(path, spec.ds_type)
    if glob.has_magic(spec.path):
        return LocalFiles(tuple(_source_file(found, spec.ds_type) for found in _expand(str(path))))
    if not _may_be_hub_id(spec.path):
        raise DataError(missing_message(spec.path) + "\n" + _why_not_hub(spec.path))
    return None


def local_slice(spec: SourceSpec) -> tuple[int, int | None]:
    """The rows of a local source that `split` asks for: `train`, `train[:100]`, `train[100:]`, `train[10:20]`."""
    match = _SLICE.fullmatch((spec.split or "train").replace(" ", ""))
    if match is None:
        raise DataError(
            f"{spec.path}: split {spec.split!r} does not exist in local files: they have only `train`, or rows of it "
            "such as `train[:100]`. To choose files, use data_files"
        )
    start, stop = match.group(1), match.group(2)
    return int(start or 0), int(stop) if stop else None


def missing_message(path_text: str) -> str:
    """'no such file or folder', with the nearest name that does exist beside it."""
    path = Path(path_text).expanduser()
    parent = path.parent
    if not parent.is_dir():
        return f"{path_text}: no such file or folder (nor is there a folder {parent})"
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in parent.iterdir()), n=1, cutoff=0.5)
    return f"{path_text}: no such file or folder" + (f"; the nearest name there is {near[0]}" if near else "")


def _may_be_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None and _format_of(Path(text)) is None


def _why_not_hub(text: str) -> str:
    if _format_of(Path(text)) is not None:
        why = f"it ends in {''.join(Path(text).suffixes[-2:])}"
    elif text.count("/") > 1:
        why = "it has more parts than org/name"
    else:
        why = "it is not spelt like org/name"
    return f"It was not taken as a hub id either, because {why}."


def _format_of(path: Path) -> FileFormat | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes = suffixes[:-1]
        if suffixes[-1:] == [".parquet"]:  # pyarrow seeks in it, and parquet compresses by itself
            return None
    match suffixes[-1:]:
        case [".jsonl"] | [".ndjson"]:
            return "jsonl"
        case [".json"]:
            return "json"
        case [".csv"]:
            return "csv"
        case [".parquet"]:
            return "parquet"
    return None


def _source_file(path: Path, ds_type: str | None) -> SourceFile:
    by_suffix = _format_of(path)
    match ds_type:
        case None:
            if by_suffix is None:
                raise DataError(
                    f"{path}: unknown kind of file {path.suffix or '(no suffix)'!r}; readable are {READABLE}. "
                    "With another suffix, say ds_type: json, csv or parquet"
                )
            return SourceFile(path, str(path), by_suffix)
        case "json":
            return SourceFile(path, str(path), "jsonl" if by_suffix == "jsonl" else "json")
        case "jsonl" | "csv" | "parquet":
            return SourceFile(path, str(path), ds_type)
    raise DataError(f"{path}: ds_type {ds_type!r} is not supported; need json, jsonl, csv or parquet")


def _expand(pattern: str) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 (patterns may be absolute)
    files = [path for path in found if path.is_file()]
    if not files:
        raise DataError(f"{pattern}: no file matches this pattern")
    return files


def _listed_files(spec: SourceSpec, folder: Path, ds_type: str | None) -> LocalFiles:
    """`data_files`, in the order they are listed; a pattern's own files sorted by name."""
    files: list[SourceFile] = []
    for name in spec.data_files:
        path = folder / Path(name).expanduser()
        if glob.has_magic(name) and not path.exists():
            files += [_source_file(found, ds_type) for found in _expand(str(path))]
        elif path.is_file():
            files.append(_source_file(path, ds_type))
        else:
            raise DataError(f"data_files: {missing_message(str(path))}")
    return LocalFiles(tuple(files))


def _folder(folder: Path, ds_type: str | None) -> LocalFiles:
    """Every readable file under a folder, at any depth, sorted by path; hidden names (. or _ first) are left alone."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    readable = [path for path in paths if ds_type is not None or _format_of(path) is not None]
    ignored = [str(path.relative_to(folder)) for path in paths if path not in set(readable)]
    if not readable:
        listed = f"; it has: {', '.join(ignored[:10])}" if ignored else " (it is empty)"
        raise DataError(f"{folder}: the folder has no file that can be read ({READABLE}){listed}")
    notes = (f"files not read: {', '.join(ignored[:10])}{', …' if len(ignored) > 10 else ''}",) if ignored else ()
    return LocalFiles(tuple(_source_file(path, ds_type) for path in readable), notes)
