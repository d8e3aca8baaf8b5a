"""YAML text and `--set` to one plain mapping, with the place of every key. Every scalar stays the text it was."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expertune.errors import ConfigError
from expertune.train.config.fields import is_null
from expertune.train.config.problems import Problem, raise_problems, shown

COMMAND_LINE = "--set"
_SET_FORM = "need key=value, for example --set learning_rate=1e-4 or --set datasets.0.path=rows.jsonl"
_LONGEST_LIST = 1000


@dataclass(frozen=True)
class RawConfig:
    """What was written, before anything is known about its keys.

    values: nested dicts and lists of text. places: "line 3" or "--set", by path (`datasets[0].path`).
    folder: of the YAML file, None without one. source: what messages call it.
    """

    values: dict[str, Any]
    places: dict[str, str]
    folder: Path | None
    source: str


class _TextLoader(yaml.SafeLoader):
    """SafeLoader that resolves no plain scalar: `2e-4`, `no` and `007` stay text. Merge keys (<<) work."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile(r"^<<$"))]}  # noqa: RUF012


def read_config(path: Path | None, overrides: Sequence[str] = ()) -> RawConfig:
    """Read the file, then lay the overrides over it. Raises ConfigError for anything that cannot be read."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    if path is None:
        source = "--set" if overrides else "configuration"
    else:
        source = str(path)
        values, places = _parse(_read_text(path), source)
    problems: list[Problem] = []
    for override in overrides:
        error = _apply(values, places, override)
        if error is not None:
            problems.append(Problem((f"{COMMAND_LINE} {override}",), error))
    raise_problems(source, problems, {})
    folder = path.absolute().parent if path is not None else None
    return RawConfig(values, places, folder, source)


def _read_text(path: Path) -> str:
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".yaml", ".yml"))
        hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise ConfigError(f"{path}: is a folder; need a YAML file{hint}")
    if not path.exists():
        others = [path.with_suffix(suffix) for suffix in (".yaml", ".yml")]
        there = [str(other) for other in others if other.is_file()]
        raise ConfigError(f"{path}: no such file" + (f"; there is {there[0]}" if there else ""))
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(text: str, source: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        loader = _TextLoader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_message(error, source)) from error
    if root is None:
        raise ConfigError(f"{source}: is empty; need at least base_model and datasets (see `expertune config`)")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "plain text"
        raise ConfigError(f"{source}: holds {kind}; need lines of the form `key: value`")
    places: dict[str, str] = {}
    problems = list(_walk(root, "", places, []))
    raise_problems(source, problems, {})
    try:
        return _unshared(loader.construct_document(root)), places
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_message(error, source)) from error


def _walk(node: yaml.Node, path: str, places: dict[str, str], above: list[yaml.Node]) -> Iterator[Problem]:
    """Note the line of every key and yield keys that stand twice in one mapping, and aliases that hold themselves."""
    if any(node is parent for parent in above):
        yield Problem((path,), "refers to itself; write it out")
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[f"{path}[{index}]"] = f"line {item.start_mark.line + 1}"
            yield from _walk(item, f"{path}[{index}]", places, [*above, node])
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                yield Problem((path or "top level",), f"line {line} has a list or a mapping as a key; need a name")
                continue
            name = key_node.value
            inner = f"{path}.{name}" if path else name
            if name in lines and name != "<<":
                yield Problem((inner,), f"is given twice, in lines {lines[name]} and {line}; keep one of them")
                continue
            lines[name] = line
            places[inner] = f"line {line}"
            yield from _walk(value_node, inner, places, [*above, node])


def _unshared(value: Any) -> Any:
    """A copy in which an alias (*name) is an entry of its own, so that --set changes one and not both."""
    if isinstance(value, dict):
        return {name: _unshared(item) for name, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _syntax_message(error: yaml.YAMLError, source: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{source}: is not valid YAML: {str(error).splitlines()[0]}"
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
    problem = error.problem or "cannot be read"
    hint = ""
    if "\\t" in problem or "tab" in problem:
        hint = "; indent with spaces, not with tabs"
    elif "mapping values are not allowed" in problem:
        hint = "; put quotes around a value with a colon in it, and check the indentation"
    elif "single document" in (error.context or ""):
        problem, hint = "a second document starts here", "; keep one (a line of --- separates documents)"
    elif "python/" in problem or "could not determine a constructor" in problem:
        problem, hint = "a tag (!…) that is not allowed here", "; write plain values"
    return f"{source}: is not valid YAML at {where}: {problem}{hint}"


def _apply(values: dict[str, Any], places: dict[str, str], override: str) -> str | None:
    """Lay one key=value over the values. Returns what is wrong with it."""
    dotted, equals, text = override.partition("=")
    steps = [step.strip() for step in re.sub(r"\[(\d+)\]", r".\1", dotted).split(".")]
    if not equals or not all(steps) or steps[0].isdigit():
        return _SET_FORM
    target: Any = values
    path = ""
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        empty: Any = [] if not last and steps[index + 1].isdigit() else {}
        if isinstance(target, list):
            if not step.isdigit():
                return f"{path} is a list; need an index such as {path}.0"
            position = int(step)
            if position > min(len(target), _LONGEST_LIST):
                return f"{path} has {len(target)} entries; need an index from 0 to {len(target)}"
            if position == len(target):
                target.append(empty)
            path = f"{path}[{position}]"
            slot: Any = position
        elif isinstance(target, dict):
            path = f"{path}.{step}" if path else step
            slot = step
        else:
            return f"{path} is {shown(target)}, which has no part {step!r}"
        places[path] = COMMAND_LINE
        if last:
            target[slot] = _parse_value(text)
            return None
        current = target[slot] if isinstance(target, list) else target.get(slot)
        if is_null(current):
            target[slot] = empty
        target = target[slot]
    return None


def _parse_value(text: str) -> Any:
    """A value as YAML; text that is no YAML (a template, say) is itself."""
    try:
        value = yaml.load(text, Loader=_TextLoader)
    except yaml.YAMLError:
        return text
    return "" if value is None else value
