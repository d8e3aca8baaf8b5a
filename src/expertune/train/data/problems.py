"""Bad rows: why one row cannot be trained on, and the bounded list of them that a person reads."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN_PROBLEMS = 20


class RowError(ValueError):
    """Why one row cannot be trained on. The place is added by whoever knows it."""


@dataclass
class ProblemLog:
    """Counts every bad row and keeps the first few in words."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, why: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(f"{where}: {why}")

    def lines(self) -> list[str]:
        hidden = self.count - len(self.shown)
        return [*self.shown, f"and {hidden} more"] if hidden else list(self.shown)

    def text(self) -> str:
        return "\n".join(f"  {line}" for line in self.lines())


def rows_word(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
