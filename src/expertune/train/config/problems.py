"""Problems with a configuration, one line each: the key, what it got, what it needs, and the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expertune.errors import ConfigError

_LONGEST_SHOWN = 60


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    keys: the keys it is about; the first is where it is found in the file. depends: more keys whose values it rests on.
    """

    keys: tuple[str, ...]
    text: str
    depends: tuple[str, ...] = ()

    def line(self, places: Mapping[str, str]) -> str:
        """`key: text (line 3)`; places: where each key was given."""
        found = [place for place in (places.get(key) for key in self.keys) if place]
        where = f" ({', '.join(dict.fromkeys(found))})" if found else ""
        return f"{', '.join(self.keys)}: {self.text}{where}"


def raise_problems(source: str, problems: Iterable[Problem], places: Mapping[str, str]) -> None:
    """Raise a ConfigError with all problems in the order of the file; do nothing if there are none."""
    ordered = sorted(problems, key=lambda problem: _line_number(places.get(problem.keys[0], "")))
    lines = list(dict.fromkeys(problem.line(places) for problem in ordered))
    if not lines:
        return
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def shown(value: Any) -> str:
    """A value as a message shows it: short, and as the person wrote it."""
    if value is None or value == "":
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping (" + ", ".join(str(name) for name in value) + ")" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list (" + ", ".join(shown(item) for item in value) + ")" if value else "an empty list"
    text = str(value)
    if len(text) > _LONGEST_SHOWN:
        text = text[: _LONGEST_SHOWN - 1] + "…"
    return text if re.fullmatch(r"[\w./+-]+", text) else repr(text)


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate most like a name, if any is like it. Of a path, only the last part is compared."""
    by_ending: dict[str, str] = {}
    for candidate in candidates:
        by_ending.setdefault(candidate.rpartition(".")[2].lower(), candidate)
    found = difflib.get_close_matches(name.lower(), by_ending, n=1, cutoff=cutoff)
    return by_ending[found[0]] if found else None


def generic(path: str) -> str:
    """A path without its list indices: datasets[1].type is datasets[].type."""
    return re.sub(r"\[\d+\]", "[]", path)


def top_key(path: str) -> str:
    return re.split(r"[.\[]", path, maxsplit=1)[0]


def _line_number(place: str) -> int:
    found = re.search(r"line (\d+)", place)
    return int(found.group(1)) if found else 10**9
