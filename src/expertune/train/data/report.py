"""What loading did, for a person to read: counts per source and everything that was left out or renamed."""

from __future__ import annotations

from dataclasses import dataclass

from expertune.train.data.problems import rows_word
from expertune.train.data.spec import Kind


@dataclass(frozen=True)
class SourceReport:
    """One entry of `datasets:`.

    format: the format in words, and whether it was detected. num_rows: usable rows. num_skipped: bad rows left out.
    unused: columns and message keys that are not trained on. renamed: (data's role, role). notes: anything else.
    """

    path: str
    heldout: bool
    format: str
    detected: bool
    num_files: int
    num_rows: int
    num_skipped: int
    unused: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        files = f", {self.num_files} files" if self.num_files > 1 else ""
        skipped = f", {self.num_skipped} bad rows skipped" if self.num_skipped else ""
        held_out = " (held out)" if self.heldout else ""
        found = ", detected from the columns" if self.detected else ""
        lines = [f"{self.path}{held_out}: {rows_word(self.num_rows)}{files}{skipped}; {self.format}{found}"]
        if self.renamed:
            lines.append("  roles renamed: " + ", ".join(f"{old} → {new}" for old, new in self.renamed))
        if self.unused:
            lines.append("  not used: " + ", ".join(self.unused))
        return lines + [f"  {note}" for note in self.notes]


@dataclass(frozen=True)
class DataReport:
    """The whole of load_data.

    num_duplicates: training rows that repeat an earlier one exactly (before the split). skipped: the first bad rows in
    words, with a last line "and N more" when there are more; empty unless bad rows are skipped.
    """

    kind: Kind
    sources: tuple[SourceReport, ...]
    num_train: int
    num_heldout: int
    num_duplicates: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def num_skipped(self) -> int:
        return sum(source.num_skipped for source in self.sources)

    def lines(self) -> list[str]:
        lines = [line for source in self.sources for line in source.lines()]
        held_out = f", {self.num_heldout} held out" if self.num_heldout else ""
        lines.append(f"{rows_word(self.num_train)} to train on{held_out} ({self.kind.replace('_', '/')})")
        if self.num_duplicates:
            lines.append(f"{rows_word(self.num_duplicates)} repeated exactly (kept)")
        lines += self.notes
        if self.skipped:
            lines.append(f"bad rows skipped: {self.num_skipped}")
            lines += [f"  {line}" for line in self.skipped]
        return lines
