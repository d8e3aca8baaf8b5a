"""What every key is declared with: its types in plain words, and how text from YAML becomes a value.

The YAML reader hands over every scalar as text, so one rule holds for a file and for `--set`: the type of the key
decides what `2`, `no` or `2e-4` means, and a key that is text keeps its text.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

_INTEGER = re.compile(r"[-+]?\d+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Words:
    """What a type needs, in plain words, where its parts do not say it well."""

    text: str


def key(default: Any, description: str, *, argument: str | None = None) -> Any:
    """Declare a key. argument: the SFTConfig argument that takes its value as it is, if there is one."""
    extra: dict[str, Any] | None = {"argument": argument} if argument else None
    return Field(default, description=description, json_schema_extra=extra)


def argument_of(field: FieldInfo) -> str | None:
    extra = field.json_schema_extra
    return str(extra["argument"]) if isinstance(extra, dict) and "argument" in extra else None


def plain_scalar(value: Any) -> Any:
    """Text as the null, truth value or number that it spells; anything else as it is. Goes into lists and mappings."""
    if isinstance(value, list):
        return [plain_scalar(item) for item in value]
    if isinstance(value, Mapping):
        return {name: plain_scalar(item) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    text = value.strip()
    if is_null(text):
        return None
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else value


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "null", "~"))


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _reporters(value: Any) -> Any:
    listed = _listed(value)
    return [] if listed in (["none"], ["None"]) else listed


def _share_or_whole(value: int | float) -> int | float:
    """Shares lie below 1; from 1 on it is a count, so 1.0 (all of it, for Axolotl) and 1.5 are neither."""
    if isinstance(value, float) and value >= 1:
        raise ValueError("neither a share nor a whole number")
    return value


def _role_names(value: Any) -> Any:
    return {role: _listed(names) for role, names in value.items()} if isinstance(value, Mapping) else value


Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Texts = Annotated[list[str], BeforeValidator(_listed)]
Options = Annotated[dict[str, Any], BeforeValidator(plain_scalar), Words("a mapping of options")]
AboveZero = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
ShareOrCount = Annotated[
    int | float,
    BeforeValidator(plain_scalar),
    Ge(0),
    AfterValidator(_share_or_whole),
    Words("a share from 0 to below 1, or a whole number of rows"),
]
ShareOrSteps = Annotated[
    int | float,
    BeforeValidator(plain_scalar),
    Gt(0),
    AfterValidator(_share_or_whole),
    Words("a whole number of steps, or a share of all steps between 0 and 1"),
]
AutoOrBool = Annotated[Literal["auto"] | bool, Words("true, false or auto")]
Reporter = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "swanlab"]
Reporters = Annotated[list[Reporter], BeforeValidator(_reporters)]
RoleNames = Annotated[
    dict[str, list[str]], BeforeValidator(_role_names), Words("a mapping of a role to the names the data has for it")
]


class ConfigModel(BaseModel):
    """A part of the configuration: frozen, no unknown keys, null means "not said"."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """A null (`key:` with nothing after it) is None where the key can be None, and otherwise its default."""
        if not isinstance(data, Mapping):
            return data
        cleaned: dict[str, Any] = {}
        for name, value in data.items():
            field = cls.model_fields.get(name)
            if field is not None and _says_nothing(field, value):
                if accepts_none(field.annotation):
                    cleaned[name] = None
            else:
                cleaned[name] = value
        return cleaned


def _says_nothing(field: FieldInfo, value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() == "none":
        return accepts_none(field.annotation) and not _takes_text(field.annotation)
    return is_null(value)


def accepts_none(annotation: Any) -> bool:
    return type(None) in _members(annotation)


def _takes_text(annotation: Any) -> bool:
    if annotation is str:
        return True
    if typing.get_origin(annotation) is Literal:
        return any(isinstance(value, str) for value in typing.get_args(annotation))
    return any(_takes_text(part) for part in typing.get_args(annotation))


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type: the parts of a union, otherwise the type itself."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def field_words(field: FieldInfo) -> str:
    """What a key takes, in plain words: "a whole number of at least 1"."""
    return type_words(field.annotation, tuple(field.metadata))


def type_words(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    for mark in metadata:
        if isinstance(mark, Words):
            return mark.text
    if typing.get_origin(annotation) is Annotated:
        inner, *marks = typing.get_args(annotation)
        return type_words(inner, tuple(marks))
    members = [member for member in _members(annotation) if member is not type(None)]
    if len(members) > 1 or members[0] is not annotation:
        return " or ".join(type_words(member, metadata) for member in members)
    return _single_words(members[0], metadata)


def _single_words(annotation: Any, metadata: tuple[Any, ...]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is bool:
        return "true or false"
    if annotation is int:
        return "a whole number" + _bounds(metadata)
    if annotation is float:
        return "a number" + _bounds(metadata)
    if origin is Literal:
        values = [str(value) for value in arguments]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if origin is list:
        several = "a list of at least one of: " if any(isinstance(mark, MinLen) for mark in metadata) else "a list of: "
        return several + type_words(arguments[0])
    if origin is dict:
        return f"a mapping of {type_words(arguments[0])} to {type_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        return "a mapping with " + ", ".join(list(annotation.model_fields)[:3]) + ", …"
    return "text" if annotation is str else "any value"


def _bounds(metadata: tuple[Any, ...]) -> str:
    low = next((f" of at least {mark.ge}" for mark in metadata if isinstance(mark, Ge)), "")
    low = next((f" above {mark.gt}" for mark in metadata if isinstance(mark, Gt)), low)
    high = next((f" of at most {mark.le}" for mark in metadata if isinstance(mark, Le)), "")
    high = next((f" below {mark.lt}" for mark in metadata if isinstance(mark, Lt)), high)
    return low + (" and" if low and high else "") + high


def part_types(annotation: Any) -> tuple[type[ConfigModel] | None, bool]:
    """The nested part that a key holds, and whether it holds a list of them; None for a key without parts."""
    for member in _members(annotation):
        while typing.get_origin(member) is Annotated:
            member = typing.get_args(member)[0]
        if isinstance(member, type) and issubclass(member, ConfigModel):
            return member, False
        if typing.get_origin(member) is list:
            part, _ = part_types(typing.get_args(member)[0])
            if part is not None:
                return part, True
    return None, False
