"""Which format the rows of a source have: by its `type:`, or by looking at the columns of its first rows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from expertune.errors import DataError
from expertune.train.data.formats import (
    Alpaca,
    Chat,
    PlainText,
    PromptCompletionMessages,
    PromptCompletionStrings,
    RowFormat,
)
from expertune.train.data.messages import ROLES, MessageReader, role_names
from expertune.train.data.spec import SUPPORTED_TYPES, SourceSpec

_NEEDS = (
    "chat_template: messages (or conversations); prompt_completion: prompt, completion; "
    "alpaca: instruction, output, optionally input; completion: text"
)


def choose_format(spec: SourceSpec, head: Sequence[dict[str, Any]]) -> RowFormat:
    """The format of a source, given its first rows (at least one object). Raises DataError when it is not clear."""
    columns = list(dict.fromkeys(column for row in head for column in row))
    kind = _known_type(spec) if spec.type is not None else _detect(spec, columns)
    match kind:
        case "chat_template":
            return _chat(spec, head, columns)
        case "alpaca":
            instruction, output = spec.field_instruction or "instruction", spec.field_output or "output"
            _require(spec, columns, instruction, "field_instruction")
            _require(spec, columns, output, "field_output")
            context = spec.field_input or "input"
            if spec.field_input:
                _require(spec, columns, context, "field_input")
            return Alpaca(instruction, context, output)
        case "prompt_completion":
            _require(spec, columns, "prompt")
            _require(spec, columns, "completion")
            return _prompt_completion(spec, head)
        case _:
            column = spec.field or "text"
            _require(spec, columns, column, "field")
            return PlainText(column)


def _known_type(spec: SourceSpec) -> str:
    if spec.type in SUPPORTED_TYPES:
        return spec.type
    if spec.type == "sharegpt":
        raise DataError(
            f"{spec.path}: type 'sharegpt' is spelt `type: chat_template` with `field_messages: conversations`; "
            "from/value and human/gpt are recognised"
        )
    near = difflib.get_close_matches(str(spec.type), SUPPORTED_TYPES, n=1)
    raise DataError(
        f"{spec.path}: type {spec.type!r} is not supported; need one of {', '.join(SUPPORTED_TYPES)}, "
        "or none (then the columns decide)" + (f". The nearest is {near[0]}" if near else "")
    )


def _detect(spec: SourceSpec, columns: list[str]) -> str:
    has = set(columns)
    fits = []
    if has & {spec.field_messages or "messages", "conversations"} or spec.field_messages:
        fits.append("chat_template")
    if {"prompt", "completion"} <= has:
        fits.append("prompt_completion")
    if {spec.field_instruction or "instruction", spec.field_output or "output"} <= has:
        fits.append("alpaca")
    if (spec.field or "text") in has:
        fits.append("completion")
    if len(fits) == 1:
        return fits[0]
    found = ", ".join(columns) or "none"
    if fits:
        raise DataError(
            f"{spec.path}: the columns fit more than one format ({' and '.join(fits)}): say which with `type:`. "
            f"Columns found: {found}"
        )
    hint = ""
    if {"chosen", "rejected"} <= has:
        hint = "\nchosen/rejected is preference data, which supervised fine-tuning does not use."
    elif "input_ids" in has:
        hint = "\nRows that are tokenised already are not supported: give the text."
    raise DataError(
        f"{spec.path}: no supported format has these columns: {found}.\nSupported types and their columns: {_NEEDS}.\n"
        "Other names: field_messages, field_instruction, field_input, field_output, field (text)." + hint
    )


def _require(spec: SourceSpec, columns: list[str], column: str, key: str | None = None) -> None:
    """The first rows must have `column`; `key` is the setting that gives it another name."""
    if column not in columns:
        raise DataError(
            f"{spec.path}: type {spec.type or 'chat_template'} needs a column {column!r}; "
            f"columns found: {', '.join(columns) or 'none'}." + (f" Another name is set with {key}." if key else "")
        )


def _chat(spec: SourceSpec, head: Sequence[dict[str, Any]], columns: list[str]) -> RowFormat:
    column = spec.field_messages
    if column is None:
        usual = [name for name in ("messages", "conversations") if name in columns]
        if len(usual) == 2:
            raise DataError(f"{spec.path}: has both messages and conversations: say which with field_messages")
        column = usual[0] if usual else "messages"
    _require(spec, columns, column, "field_messages")
    return Chat(column, _message_reader(spec, [row.get(column) for row in head]))


def _prompt_completion(spec: SourceSpec, head: Sequence[dict[str, Any]]) -> RowFormat:
    """Strings or messages, as the first row has it that has either."""
    for row in head:
        cell = row.get("completion")
        if isinstance(cell, str):
            return PromptCompletionStrings()
        if isinstance(cell, list):
            cells = [row.get(column) for row in head for column in ("prompt", "completion")]
            return PromptCompletionMessages(_message_reader(spec, cells))
    return PromptCompletionStrings()


def _message_reader(spec: SourceSpec, cells: Sequence[Any]) -> MessageReader:
    """role/content, or from/value when that is what the first rows' messages have."""
    for role in spec.roles:
        if role not in ROLES:
            raise DataError(f"{spec.path}: roles maps to {role!r}; need one of {', '.join(ROLES)}")
    keys = {key for cell in cells if isinstance(cell, list) for item in cell if isinstance(item, dict) for key in item}
    sharegpt = {"from", "value"} <= keys and not {"role", "content"} & keys
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    return MessageReader(spec.role_key or role_key, spec.content_key or content_key, role_names(spec.roles))
