"""What one entry of `datasets:` says, and the words this package uses for shapes of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Kind = Literal["chat", "prompt_completion", "text"]
"""What a whole run trains on; TRL's own three dataset types."""

Shape = Literal["chat", "prompt_completion_messages", "prompt_completion_strings", "text"]
"""The columns of a prepared data set. Two shapes share the kind `prompt_completion`."""

SUPPORTED_TYPES = ("chat_template", "prompt_completion", "alpaca", "completion")
"""Values of a data set's `type:`; leaving it out means: look at the columns."""


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One entry of `datasets:`, with Axolotl's names; None means "not said".

    path: a file, a folder, a glob, a hub id, or `json`/`csv`/`parquet` together with `data_files`.
    type: one of SUPPORTED_TYPES. split: `train`, or `train[10:20]`; any split name for a hub id.
    name, revision: the hub data set's configuration and commit. ds_type: the format when the suffix does not say it.
    field_messages: the column of a chat. role_key, content_key: the keys in a message (message_property_mappings).
    roles: role -> the names the data uses for it, besides the role itself, `human` and `gpt`.
    field: the column of `completion`. field_instruction, field_input, field_output: the columns of `alpaca`.
    """

    path: str
    type: str | None = None
    split: str | None = None
    name: str | None = None
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    ds_type: str | None = None
    field_messages: str | None = None
    role_key: str | None = None
    content_key: str | None = None
    roles: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    field: str | None = None
    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None


def kind_of(shape: Shape) -> Kind:
    """The kind of run that a shape of rows belongs to."""
    match shape:
        case "chat":
            return "chat"
        case "text":
            return "text"
        case _:
            return "prompt_completion"
