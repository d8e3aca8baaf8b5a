"""Axolotl's keys: taken, taken with a note, or refused by name. A key that neither knows is a misspelling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from expertune.train.config.axolotl_names import DATASET_KEYS, KEYS
from expertune.train.config.axolotl_table import (
    OTHER_NAMES,
    PLUGINS_WITH_NOTE,
    REASONS,
    REFUSED_PLUGINS,
    SAME_AS_HERE,
    TAKEN_WITH_NOTE,
)
from expertune.train.config.fields import ConfigModel, argument_of, is_null, part_types, plain_scalar
from expertune.train.config.problems import Problem, generic, nearest, shown
from expertune.train.config.schema import TrainConfig

_ATTENTION_FLAGS = {"sdp_attention": "sdpa", "eager_attention": "eager", "flex_attention": "flex_attention"}
_TARGET_LINEAR_NOTE = (
    "not used: it would reach routers on some models and miss the experts on others; attention and every expert are "
    "adapted instead. Name further layers, such as a dense or shared MLP's, in lora_target_modules"
)


@dataclass(frozen=True)
class Translation:
    """values: with keys of TrainConfig only. notes: one line each. problems: keys that cannot be taken."""

    values: dict[str, Any]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]


def translate(values: dict[str, Any]) -> Translation:
    """Sort the keys of a file into those of TrainConfig, those that are taken with a note, and problems."""
    known: dict[str, Any] = {}
    notes: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for name, value in values.items():
        if name in TrainConfig.model_fields:
            known[name] = value
        elif name == "plugins":
            problems += _plugins(value, notes)
        elif name == "lora_target_linear" or name in _ATTENTION_FLAGS:
            if _is_on(value):
                problems += _shorthand(name, values, known, notes)
        elif name in TAKEN_WITH_NOTE:
            if _is_on(value):
                notes.setdefault(TAKEN_WITH_NOTE[name], []).append(name)
        else:
            problems += _stranger(name, name, value, TrainConfig)
    for name, value in list(known.items()):
        known[name], found = _inner(name, value, *part_types(TrainConfig.model_fields[name].annotation))
        problems += found
    if "adapter" in known and is_null(known["adapter"]):
        known.pop("adapter")
        text = "got nothing, which asks for full fine-tuning; need lora; expertune trains adapters only"
        problems.append(Problem(("adapter",), text))
    return Translation(known, tuple(f"{', '.join(names)}: {text}" for text, names in notes.items()), tuple(problems))


def _is_on(value: Any) -> bool:
    return plain_scalar(value) not in (None, False, 0, [], {})


def _plugins(value: Any, notes: dict[str, list[str]]) -> Iterator[Problem]:
    if is_null(value):
        return
    for index, name in enumerate([value] if isinstance(value, str) else value):
        path = f"plugins[{index}]"
        integration = name.removeprefix("axolotl.integrations.").split(".")[0] if isinstance(name, str) else ""
        taken = next((plugin for plugin in PLUGINS_WITH_NOTE if plugin.split(".")[2] == integration), None)
        if not isinstance(name, str) or not name.startswith("axolotl.integrations."):
            yield Problem(
                (path,),
                f"got {shown(name)}, which is not a plugin that expertune knows; it loads no plugins, so remove it",
            )
        elif taken is not None:
            notes.setdefault(PLUGINS_WITH_NOTE[taken], []).append(f"plugins ({taken.rpartition('.')[2]})")
        elif integration in REFUSED_PLUGINS:
            yield Problem((path,), f"got {name}, which is not supported: {REFUSED_PLUGINS[integration]}; remove it")
        else:
            yield Problem((path,), f"got {name}, which is not a plugin that expertune knows; remove it")


def _shorthand(
    name: str, values: dict[str, Any], known: dict[str, Any], notes: dict[str, list[str]]
) -> Iterator[Problem]:
    """Axolotl's flags that stand for a value of another key."""
    if name == "lora_target_linear":
        if is_null(values.get("lora_target_modules")):
            notes.setdefault(_TARGET_LINEAR_NOTE, []).append(name)
        else:
            notes.setdefault("not used: lora_target_modules says which layers are adapted", []).append(name)
        return
    wanted = _ATTENTION_FLAGS[name]
    given = values.get("attn_implementation")
    flags = [flag for flag in ("flash_attention", *_ATTENTION_FLAGS) if _is_on(values.get(flag))]
    if len(flags) > 1:
        yield Problem((name,), f"is set together with {' and '.join(flag for flag in flags if flag != name)}; keep one")
    elif not is_null(given) and given != wanted:
        yield Problem(
            (name, "attn_implementation"), f"{name} means {wanted} and attn_implementation is {given}; keep one"
        )
    else:
        known["attn_implementation"] = wanted
        notes.setdefault(f"read as attn_implementation: {wanted}", []).append(name)


def _inner(path: str, value: Any, part: type[ConfigModel] | None, is_list: bool) -> tuple[Any, list[Problem]]:
    """A value without the keys inside it that the part does not have, and a problem for each that says something."""
    if part is None:
        return value, []
    problems: list[Problem] = []
    if is_list and isinstance(value, list):
        cleaned = []
        for index, item in enumerate(value):
            kept, found = _inner(f"{path}[{index}]", item, part, False)
            cleaned.append(kept)
            problems += found
        return cleaned, problems
    if not isinstance(value, dict):
        return value, []
    kept = {}
    for name, item in value.items():
        inner = f"{path}.{name}"
        if name in part.model_fields:
            kept[name], found = _inner(inner, item, *part_types(part.model_fields[name].annotation))
        else:
            found = list(_stranger(inner, name, item, part))
        problems += found
    return kept, problems


def _stranger(path: str, name: str, value: Any, part: type[ConfigModel]) -> Iterator[Problem]:
    """A key that TrainConfig (or a part of it) does not have."""
    where = generic(path).replace("test_datasets", "datasets")
    names = KEYS if part is TrainConfig else DATASET_KEYS if "datasets" in where else frozenset()
    if where in SAME_AS_HERE:
        plain = plain_scalar(value)
        if is_null(value) or plain in (SAME_AS_HERE[where], [SAME_AS_HERE[where]]):
            return
        text = f"got {shown(value)}; need {shown(SAME_AS_HERE[where])}, which is what expertune does"
        yield Problem((path,), text + (f"; {REASONS[where]}" if where in REASONS else ""))
    elif name in names:
        if not _is_on(value):  # switched off: that is how it is here
            return
        reason = REASONS.get(where, "remove it")
        yield Problem((path,), f"is known to Axolotl but not supported by expertune: {reason}")
    else:
        yield Problem((path,), f"is not a key{_suggestion(name, part)}; `expertune config` lists all keys")


def _suggestion(name: str, part: type[ConfigModel]) -> str:
    top = TrainConfig.model_fields
    by_argument = {argument: own for own, field in top.items() if (argument := argument_of(field))}
    other = OTHER_NAMES.get(name) or by_argument.get(name)
    if part is TrainConfig and other is not None:
        return f"; it is spelt {other} here"
    nested = {
        f"{owner}{'[]' if is_list else ''}.{inner}"
        for owner, (inner_part, is_list) in ((own, part_types(field.annotation)) for own, field in top.items())
        if inner_part is not None and owner != "test_datasets"
        for inner in inner_part.model_fields
    }
    own = [f"{inner}" for inner in part.model_fields]
    exact = (
        name if part is not TrainConfig and name in top else next((p for p in nested if p.endswith(f".{name}")), None)
    )
    if exact is not None:
        return f" here; it belongs to {'the top level' if exact == name else exact}"
    found = nearest(name, own) or nearest(name, nested if part is TrainConfig else top, cutoff=0.75)
    if found is None and part is TrainConfig:
        found = nearest(name, KEYS, cutoff=0.75)
    return f"; the nearest is {found}" if found else ""
