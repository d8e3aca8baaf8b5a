"""The formats of a row: a small class each, with the columns it uses and `convert` from a raw row to TRL's columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from expertune.train.data.messages import (
    MessageReader,
    SeenNames,
    check_conversation,
    check_prompt_completion,
    checked_text,
    refuse_columns,
)
from expertune.train.data.problems import RowError
from expertune.train.data.readers import type_name
from expertune.train.data.spec import Shape
from expertune.train.data.templates import alpaca_prompt

Row = dict[str, Any]


class RowFormat(Protocol):
    """How the rows of one source are read."""

    @property
    def name(self) -> str:
        """The format in words."""
        ...

    @property
    def shape(self) -> Shape:
        """What convert gives."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are used."""
        ...

    def convert(self, row: Mapping[str, Any], seen: SeenNames) -> Row:
        """The row in its shape. Raises RowError."""
        ...


@dataclass(frozen=True)
class Chat:
    """A list of messages in one column."""

    column: str
    reader: MessageReader
    shape: Shape = "chat"

    @property
    def name(self) -> str:
        keys = (self.reader.role_key, self.reader.content_key)
        said = "" if keys == ("role", "content") else f", keys {keys[0]}/{keys[1]}"
        return f"chat_template (column {self.column}{said})"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def convert(self, row: Mapping[str, Any], seen: SeenNames) -> Row:
        refuse_columns(row)
        messages = self.reader.read(_cell(row, self.column), self.column, seen)
        check_conversation(messages, self.column)
        return {"messages": messages}


@dataclass(frozen=True)
class PromptCompletionMessages:
    """Two columns, each a list of messages."""

    reader: MessageReader
    as_chat: bool = False
    name: str = "prompt_completion (lists of messages)"
    columns: tuple[str, ...] = ("prompt", "completion")

    @property
    def shape(self) -> Shape:
        return "chat" if self.as_chat else "prompt_completion_messages"

    def convert(self, row: Mapping[str, Any], seen: SeenNames) -> Row:
        refuse_columns(row)
        for column in self.columns:
            if isinstance(_cell(row, column), str):
                raise RowError(f"{column} is a string, but the rows before it have lists of messages")
        prompt = self.reader.read(row["prompt"], "prompt", seen)
        completion = self.reader.read(row["completion"], "completion", seen)
        check_prompt_completion(prompt, completion, ("prompt", "completion"))
        if not self.as_chat:
            return {"prompt": prompt, "completion": completion}
        if any(message["role"] == "assistant" for message in prompt):
            raise RowError(
                "prompt holds an assistant message: beside a chat data set this row would become a chat that trains on "
                "it too. Train prompt/completion by itself, or give the row as `messages`"
            )
        return {"messages": prompt + completion}


@dataclass(frozen=True)
class PromptCompletionStrings:
    """Two columns of plain text."""

    name: str = "prompt_completion (strings)"
    shape: Shape = "prompt_completion_strings"
    columns: tuple[str, ...] = ("prompt", "completion")

    def convert(self, row: Mapping[str, Any], seen: SeenNames) -> Row:
        for column in self.columns:
            if isinstance(_cell(row, column), list):
                raise RowError(f"{column} is a list, but the rows before it have strings")
        return {column: checked_text(row[column], column) for column in self.columns}


@dataclass(frozen=True)
class Alpaca:
    """Instruction, optional input, output; the prompt in Alpaca's wording."""

    instruction: str
    context: str
    output: str
    name: str = "alpaca"
    shape: Shape = "prompt_completion_strings"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.instruction, self.context, self.output)

    def convert(self, row: Mapping[str, Any], seen: SeenNames) -> Row:
        instruction = checked_text(_cell(row, self.instruction), self.instruction)
        context = row.get(self.context)
        context = "" if context is None else checked_text(context, self.context, may_be_empty=True)
        output = checked_text(_cell(row, self.output), self.output)
        return {"prompt": alpaca_prompt(instruction, context), "completion": output}


@dataclass(frozen=True)
class PlainText:
    """One column of text, trained on as a whole."""

    column: str
    shape: Shape = "text"

    @property
    def name(self) -> str:
        return f"completion (column {self.column})"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def convert(self, row: Mapping[str, Any], seen: SeenNames) -> Row:
        return {"text": checked_text(_cell(row, self.column), self.column)}


def convert_row(row_format: RowFormat, value: Any, seen: SeenNames) -> Row:
    """One raw row through its format, with the columns it leaves alone noted in `seen`."""
    if not isinstance(value, dict):
        raise RowError(f"is {type_name(value)}, need an object")
    row = row_format.convert(value, seen)
    seen.unused.update(column for column in value if column not in row_format.columns)
    return row


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise RowError(f"has no {column} (its keys: {', '.join(map(str, row)) or 'none'})")
    return row[column]
