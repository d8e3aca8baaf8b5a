"""Values against the schema, with every problem in plain words: what the key got, what it needs, the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from expertune.train.config.fields import (
    ConfigModel,
    field_words,
    part_types,
)
from expertune.train.config.problems import Problem, generic, nearest, shown, top_key
from expertune.train.config.schema import TrainConfig

_STAND_INS: Mapping[str, Any] = MappingProxyType({"base_model": "?", "datasets": [{"path": "?"}]})
_MAP_KEY = "[key]"

_TEMPLATE_HINT = (
    "expertune ships no templates of other models: tokenizer_default is an instruct model's own, and any other goes "
    "into chat_template_jinja with chat_template: jinja"
)
_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "base_model": "give a folder or a hub id, for example base_model: Qwen/Qwen3-30B-A3B",
        "datasets": "give for example `datasets: [{path: rows.jsonl}]`",
        "test_datasets": "give for example `test_datasets: [{path: rows.jsonl}]`",
        "datasets[]": "give for example `- path: rows.jsonl`",
        "datasets[].path": "give a file, a folder or a hub id",
        "datasets[].type": "leave it out and the columns decide",
        "datasets[].type=sharegpt": "say type: chat_template with field_messages: conversations",
        "datasets[].type=input_output": "say type: prompt_completion",
        "datasets[].type=pretrain": "say type: completion",
        "adapter=qlora": "quantised base models are not part of this version: say adapter: lora with bf16: true",
        "adapter": "expertune trains LoRA adapters only; say adapter: lora",
        "gradient_checkpointing": "true keeps the least; to move activations to the machine's memory, add "
        "activation_offloading: true",
        "activation_offloading": "true uses TRL's offloading",
        "torch_compile": "say true or false",
        "bf16=full": "say bf16: true",
        "chat_template": _TEMPLATE_HINT,
        "learning_rate": "a common choice for LoRA is 2e-4",
        "lora_r": "a common choice is 16",
        "lora_dropout": "say 0",
        "val_set_size": "0.05 holds out 5 %, 200 holds out 200 rows",
        "eval_steps": "50 is every 50 steps, 0.1 is every tenth of the run",
        "save_steps": "50 is every 50 steps, 0.1 is every tenth of the run",
        "max_steps": "leave it out to train num_epochs",
        "save_strategy=best": "the newest checkpoint is the one that counts in this version",
        "report_to": "say none for nowhere",
        "report_to[]": "say none for nowhere",
        "optimizer": "optimizers of Axolotl's own are not supported",
        "save_total_limit": "leave it out to keep all",
        "wandb_watch": "leave it out for none",
        "special_tokens.additional_special_tokens": "eot_tokens names tokens that end a turn",
    }
)
"""The way out by path, or by path and value."""


@dataclass(frozen=True)
class Checked:
    """config: with defaults in place of the keys that are wrong, so that rules can be checked on the rest."""

    config: TrainConfig
    problems: tuple[Problem, ...]

    @property
    def wrong_keys(self) -> frozenset[str]:
        return frozenset(top_key(problem.keys[0]) for problem in self.problems)


def check_values(values: dict[str, Any]) -> Checked:
    """Build the configuration from plain values, and list every value that does not fit its key."""
    try:
        return Checked(TrainConfig.model_validate(values), ())
    except ValidationError as error:
        problems = tuple(_problems(error, values))
    wrong = {top_key(problem.keys[0]) for problem in problems}
    rest = {name: value for name, value in values.items() if name not in wrong}
    stand_ins = {name: value for name, value in _STAND_INS.items() if name in wrong}
    return Checked(TrainConfig.model_validate({**rest, **stand_ins}), problems)


def _problems(error: ValidationError, values: dict[str, Any]) -> Iterator[Problem]:
    """One problem a path; where the alternatives of a type fail at several depths, the deepest."""
    found: dict[str, tuple[str, Any]] = {}
    for detail in error.errors(include_url=False, include_context=False):
        path, value = _locate(detail["loc"], values)
        what = "missing" if detail["type"] == "missing" else "name" if detail["loc"][-1] == _MAP_KEY else "value"
        found[path] = (what, value)
    for path, (what, value) in found.items():
        if any(other != path and other.startswith((f"{path}[", f"{path}.")) for other in found):
            continue
        yield Problem((path,), _message(path, what, value))


def _locate(location: tuple[int | str, ...], values: Any) -> tuple[str, Any]:
    """The path and value that a location means; parts that name an alternative of a type are not in the values."""
    path = ""
    for position, part in enumerate(location):
        if isinstance(values, Mapping) and part in values:
            path, values = f"{path}.{part}" if path else str(part), values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            path, values = f"{path}[{part}]", values[part]
        elif isinstance(values, Mapping) and position == len(location) - 1 and part != _MAP_KEY and _is_key(path, part):
            return (f"{path}.{part}" if path else str(part)), None
    return path, values


def _is_key(path: str, name: int | str) -> bool:
    part: type[ConfigModel] | None = TrainConfig
    for step in [step.split("[")[0] for step in path.split(".")] if path else []:
        field = part.model_fields.get(step) if part is not None else None
        part = part_types(field.annotation)[0] if field is not None else None
    return part is not None and name in part.model_fields


def _message(path: str, what: str, value: Any) -> str:
    where = generic(path).replace("test_datasets[]", "datasets[]")
    annotation, words = _declared(where)
    text = {"missing": "is missing", "name": "is not a name that is known here"}.get(what, f"got {shown(value)}")
    text += f"; need {words}"
    near = nearest(value, _choices(annotation)) if isinstance(value, str) else None
    way_out = _HINTS.get(f"{where}={value}") or (f"the nearest is {near}" if near else _HINTS.get(where))
    return f"{text}; {way_out}" if way_out else text


def _declared(where: str) -> tuple[Any, str]:
    """The type of a path without indices and what it needs in words; of its nearest owner where it has none itself."""
    part: type[ConfigModel] = TrainConfig
    annotation: Any = None
    words = "a value"
    for step in where.split("."):
        field = part.model_fields.get(step.removesuffix("[]"))
        if field is None:
            break
        annotation = field.annotation
        inner, _ = part_types(annotation)
        is_item = step.endswith("[]")
        words = _item_words(field_words(field)) if is_item else field_words(field)
        if inner is None:
            break
        part = inner
    return annotation, words


def _item_words(words: str) -> str:
    return words.rpartition("of: ")[2] if "of: " in words else "text"


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]
