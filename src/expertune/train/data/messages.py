"""One conversation: from the data's own keys and role names to TRL's {role, content}, or the reason it is bad."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from expertune.train.data.problems import RowError
from expertune.train.data.readers import type_name

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
# What the data sets of the ShareGPT family call the same roles; Axolotl maps these two without being told, too.
USUAL_ALIASES = (("human", "user"), ("gpt", "assistant"))
# Keys of a message that change what is said or what is trained on. To leave one out would train on something else
# than the data says, so a row that uses one is refused.
REFUSED_MESSAGE_KEYS = (
    *("tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "refusal"),
    *("image", "images", "audio", "video", "videos", "weight", "train", "training", "loss"),
)
REFUSED_CHAT_COLUMNS = ("tools", "functions", "image", "images", "audio", "video", "videos", "chat_template_kwargs")


@dataclass
class SeenNames:
    """What reading a source leaves out or renames, gathered for the report."""

    unused: set[str] = field(default_factory=set)
    renamed: set[tuple[str, str]] = field(default_factory=set)


def has_value(value: Any) -> bool:
    """Whether a cell says anything: Arrow fills the keys a row does not have with null, some writers with [] or ''."""
    return value is not None and value not in ("", [], {})


def checked_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """`value` if it is a string that can be trained on, else RowError naming `name`."""
    if value is None:
        raise RowError(f"{name} is missing or null")
    if not isinstance(value, str):
        hint = ": content in parts (images, audio) is not supported, give one string" if isinstance(value, list) else ""
        raise RowError(f"{name} is {type_name(value)}, need a string{hint}")
    if not may_be_empty and not value.strip():
        raise RowError(f"{name} is empty")
    if "\x00" in value:
        raise RowError(f"{name} holds a NUL character (at position {value.index(chr(0)) + 1})")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"{name} holds half a surrogate pair (at position {error.start + 1})") from None
    return value


@dataclass(frozen=True)
class MessageReader:
    """Reads the lists of messages of one source.

    role_key, content_key: the keys of a message. roles: the data's name of a role -> system, user or assistant.
    """

    role_key: str
    content_key: str
    roles: Mapping[str, str]

    def read(self, value: Any, column: str, seen: SeenNames) -> list[Message]:
        """A non-empty list of checked messages. Raises RowError naming the message by index, counted from 0."""
        if value is None:
            raise RowError(f"{column} is missing or null")
        if not isinstance(value, list):
            raise RowError(f"{column} is {type_name(value)}, need a list of messages")
        if not value:
            raise RowError(f"{column} is empty: no message")
        return [self._message(message, f"{column}[{index}]", seen) for index, message in enumerate(value)]

    def _message(self, message: Any, where: str, seen: SeenNames) -> Message:
        if not isinstance(message, dict):
            raise RowError(
                f"{where} is {type_name(message)}, need an object with {self.role_key} and {self.content_key}"
            )
        for key in REFUSED_MESSAGE_KEYS:
            if key != self.content_key and has_value(message.get(key)):
                raise RowError(f"{where} has {key}, which is not supported and would be lost")
        for key in (self.role_key, self.content_key):
            if key not in message:
                raise RowError(f"{where} has no {key} (its keys: {', '.join(map(str, message)) or 'none'})")
        role = self._role(message[self.role_key], f"{where}.{self.role_key}", seen)
        content = checked_text(message[self.content_key], f"{where}.{self.content_key}")
        column = where.partition("[")[0]
        seen.unused.update(f"{column}[].{key}" for key in message if key not in (self.role_key, self.content_key))
        return {"role": role, "content": content}

    def _role(self, value: Any, where: str, seen: SeenNames) -> str:
        if not isinstance(value, str):
            raise RowError(f"{where} is {type_name(value)}, need a string")
        role = self.roles.get(value)
        if role is None:
            near = difflib.get_close_matches(value.lower(), self.roles, n=1)
            raise RowError(
                f"{where} is {value!r}, an unknown role"
                + (f"; did you mean {near[0]!r}?" if near else f"; need {', '.join(ROLES)}, or name it under `roles:`")
            )
        if role != value:
            seen.renamed.add((value, role))
        return role


def role_names(extra: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The data's role name -> role, from the roles themselves, the usual aliases and a source's `roles:`."""
    names = {role: role for role in ROLES} | dict(USUAL_ALIASES)
    for role, aliases in extra.items():
        names |= dict.fromkeys(aliases, role)
    return names


def check_conversation(messages: list[Message], column: str) -> None:
    """A whole conversation must have an assistant turn and end on one."""
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{column} has no assistant message, so nothing would be trained")
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"{column} ends with a {messages[-1]['role']} message: nothing after the last answer is trained; remove it"
        )


def check_prompt_completion(prompt: list[Message], completion: list[Message], names: tuple[str, str]) -> None:
    """A prompt that does not answer itself, and a completion that is answers only (all of it is trained)."""
    if prompt[-1]["role"] == "assistant":
        raise RowError(f"{names[0]} ends with an assistant message: it belongs to {names[1]}")
    for index, message in enumerate(completion):
        if message["role"] != "assistant":
            raise RowError(
                f"{names[1]}[{index}] is a {message['role']} message, but all of a completion is trained: "
                "put conversations of several turns in `messages`"
            )


def refuse_columns(row: Mapping[str, Any]) -> None:
    """Columns that would change how a conversation is rendered."""
    for column in REFUSED_CHAT_COLUMNS:
        if has_value(row.get(column)):
            raise RowError(f"has {column}, which is not supported and would be lost")
