"""Local paths: from the current directory, as Axolotl reads them, otherwise from beside the YAML file."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from expertune.train.config.model_keys import DatasetConfig
from expertune.train.config.problems import Problem
from expertune.train.config.schema import TrainConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NO_PATHS = ("true", "yes", "on", "auto", "last", "latest", "false", "no", "off")
_BUILDERS = ("json", "csv", "parquet")


@dataclass(frozen=True)
class Located:
    config: TrainConfig
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Search:
    """Where to look, and what there is to say about what was found."""

    folder: Path | None
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def find(self, key: str, text: str) -> str | None:
        """The absolute path of an existing file, folder or glob; None if there is none."""
        path = Path(text).expanduser()
        here = _absolute(path)
        if _exists(here) or path.is_absolute() or self.folder is None:
            return here if _exists(here) else None
        beside = _absolute(self.folder / path)
        if not _exists(beside):
            return None
        self.notes.append(f"{key}: {text} is not in {Path.cwd()}; taken from beside the configuration, {beside}")
        return beside

    def missing(self, key: str, text: str, need: str) -> None:
        looked = [str(Path.cwd())]
        if self.folder is not None and self.folder != Path.cwd():
            looked.append(str(self.folder))
        places = "" if Path(text).expanduser().is_absolute() else f" in {' or '.join(looked)}"
        self.problems.append(Problem((key,), f"got {text}, and there is no such file or folder{places}; need {need}"))


def locate_paths(config: TrainConfig, folder: Path | None, skip: frozenset[str] = frozenset()) -> Located:
    """Make local paths absolute. folder: of the YAML file. skip: keys that are wrong anyway."""
    search = _Search(folder)
    changes: dict[str, object] = {"output_dir": _absolute(Path(config.output_dir).expanduser())}
    for key in ("base_model", "tokenizer_config"):
        text = getattr(config, key)
        if text is not None and key not in skip:
            changes[key] = _model_source(search, key, text)
    if config.lora_model_dir is not None and "lora_model_dir" not in skip:
        changes["lora_model_dir"] = _adapter_folder(search, config.lora_model_dir)
    if config.resume_from_checkpoint is not None and "resume_from_checkpoint" not in skip:
        changes["resume_from_checkpoint"] = _checkpoint_folder(search, config.resume_from_checkpoint)
    if config.chat_template_jinja is not None and "chat_template_jinja" not in skip:
        changes["chat_template_jinja"] = _template(search, config.chat_template_jinja)
    for key in ("datasets", "test_datasets"):
        entries = getattr(config, key)
        if entries and key not in skip:
            changes[key] = [_entry(search, f"{key}[{index}]", entry) for index, entry in enumerate(entries)]
    return Located(config.model_copy(update=changes), tuple(search.notes), tuple(search.problems))


def _model_source(search: _Search, key: str, text: str) -> str:
    found = search.find(key, text)
    if found is None:
        if not _HUB_ID.fullmatch(text):
            search.missing(key, text, "a model's folder, or a hub id (org/name)")
        return text
    if not Path(found).is_dir():
        search.problems.append(
            Problem((key,), f"got {text}, which is a file; need the folder it is in, or a hub id (org/name)")
        )
    return found


def _adapter_folder(search: _Search, text: str) -> str:
    key, need = "lora_model_dir", "the folder of a trained adapter"
    found = search.find(key, text)
    if found is None:
        search.missing(key, text, need)
    elif not Path(found).is_dir():
        search.problems.append(Problem((key,), f"got {text}, which is a file; need {need}"))
    return found or text


def _checkpoint_folder(search: _Search, text: str) -> str:
    """Not required to exist: a run's saved configuration may name a checkpoint that has been rotated away since."""
    key = "resume_from_checkpoint"
    if text.lower() in _NO_PATHS and not Path(text).exists():
        search.problems.append(
            Problem(
                (key,), f"got {text}; need a checkpoint's folder; auto_resume_from_checkpoints: true takes the newest"
            )
        )
    return search.find(key, text) or _absolute(Path(text).expanduser())


def _template(search: _Search, text: str) -> str:
    """The template itself: the text if it is one, otherwise what the file holds."""
    key = "chat_template_jinja"
    if "{" in text or "\n" in text:
        return text
    found = search.find(key, text)
    if found is None:
        search.missing(key, text, "a Jinja template ({% … %}), or the path of a file with one")
        return text
    try:
        return Path(found).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        search.problems.append(Problem((key,), f"got {text}, which cannot be read; need a file of UTF-8 text"))
        return text


def _entry(search: _Search, key: str, entry: DatasetConfig) -> DatasetConfig:
    if entry.path in _BUILDERS and entry.data_files and not Path(entry.path).exists():
        files = [
            search.find(f"{key}.data_files", text) or _absolute(Path(text).expanduser()) for text in entry.data_files
        ]
        return entry.model_copy(update={"data_files": files})
    found = search.find(f"{key}.path", entry.path)
    if found is None and "://" not in entry.path and not _may_be_hub_data(entry.path):
        found = _absolute(Path(entry.path).expanduser())  # missing: the data reader says so, with the nearest name
    return entry.model_copy(update={"path": found or entry.path})


def _may_be_hub_data(text: str) -> bool:
    is_file_name = Path(text).suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz")
    return _HUB_ID.fullmatch(text) is not None and not is_file_name


def _absolute(path: Path) -> str:
    """Absolute without following links: the hub's cache is made of links, whose targets have other names."""
    return os.path.normpath(path.absolute())


def _exists(text: str) -> bool:
    return Path(text).exists() or (glob.has_magic(text) and bool(glob.glob(text, recursive=True)))  # noqa: PTH207
