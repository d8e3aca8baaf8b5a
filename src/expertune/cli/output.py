"""Where the commands print."""

from typing import Any

from rich.console import Console


class Output(Console):
    """A console that prints text as it is and lays out tables.

    Text is not wrapped, so that paths and commands can be copied and searched for; `:name:` is no emoji, and numbers
    have no colours of their own.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, emoji=False, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        options.setdefault("soft_wrap", all(isinstance(each, str) for each in objects))
        super().print(*objects, **options)
