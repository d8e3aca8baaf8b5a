"""The configuration described: every key with its meaning, the JSON schema, and a run's values as YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from expertune.train.config.fields import field_words, part_types
from expertune.train.config.schema import SECTIONS, TrainConfig

_INTRODUCTION = """\
# Configuration

`expertune train my.yaml` reads these keys; `--set key=value` counts over the file, the file over the default. Names are
Axolotl's wherever it has one. A key that is not listed is an error that names the nearest; keys that only turn on
Axolotl's own accelerations are taken with a note. Local paths are read from the current directory, otherwise from
beside the file. Only `base_model` and `datasets` must be given:

```yaml
base_model: Qwen/Qwen3-30B-A3B
datasets:
  - path: chats.jsonl
val_set_size: 0.02
```

This page is written by `expertune.train.config.render_markdown`.
"""


@dataclass(frozen=True)
class KeyInfo:
    """One key. path: `lora_r` or `datasets[].type`. needs: its type in plain words. default: as YAML, or "required".

    meaning: one sentence. section: the title of its group.
    """

    path: str
    needs: str
    default: str
    meaning: str
    section: str


def iter_keys() -> Iterator[KeyInfo]:
    """Every key in reading order, those inside another key right after it."""
    for section in SECTIONS:
        title = section.__doc__ or section.__name__
        for name, field in section.model_fields.items():
            yield from _describe(name, field, title)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    schema = _without_arguments(TrainConfig.model_json_schema())
    schema["title"] = "expertune training configuration"
    own = {name: schema["properties"][name] for section in SECTIONS for name in section.model_fields}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "properties": own}


def resolved_yaml(config: TrainConfig) -> str:
    """A configuration with every value, by section, as YAML that loads back to an equal one."""
    values = config.model_dump(mode="json")
    parts = []
    for section in SECTIONS:
        own = {
            name: values[name] if part_types(field.annotation)[0] is None else _without_nulls(values[name])
            for name, field in section.model_fields.items()
        }
        text = yaml.safe_dump(own, sort_keys=False, allow_unicode=True, width=100)
        parts.append(f"# {section.__doc__}\n{text}")
    return "\n".join(parts)


def render_markdown() -> str:
    """The page docs/config.md."""
    lines = [_INTRODUCTION]
    title = None
    for info in iter_keys():
        if info.section != title:
            title = info.section
            lines.append(f"## {title}\n\n| Key | Takes | Default | Meaning |\n| --- | --- | --- | --- |")
        cells = [f"`{info.path}`", info.needs, f"`{info.default}`", info.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    text = "\n".join(lines)
    return text.replace("\n## ", "\n\n## ").replace("\n\n\n", "\n\n") + "\n"


def _describe(path: str, field: FieldInfo, section: str) -> Iterator[KeyInfo]:
    default = "required" if field.is_required() else _default_text(field.default)
    part, is_list = part_types(field.annotation)
    needs = field_words(field)
    if part is not None:
        needs = "a list of entries" if is_list else "a mapping"
    yield KeyInfo(path, needs, default, field.description or "", section)
    if part is None or path == "test_datasets":  # its entries are those of datasets
        return
    for name, inner in part.model_fields.items():
        yield from _describe(f"{path}{'[]' if is_list else ''}.{name}", inner, section)


def _default_text(value: Any) -> str:
    if value is None:
        return "null"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _without_nulls(value: Any) -> Any:
    """An entry without the keys that say nothing."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


def _without_arguments(schema: Any) -> Any:
    """A schema without what `key` notes for expertune itself."""
    if isinstance(schema, dict):
        return {name: _without_arguments(item) for name, item in schema.items() if name != "argument"}
    return [_without_arguments(item) for item in schema] if isinstance(schema, list) else schema
