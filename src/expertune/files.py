"""Files that are either whole or not there."""

import os
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial-"  # in front of the name while a file or a folder is written


def partial_of(path: Path) -> Path:
    """Where something is written before it takes its own name."""
    return path.with_name(f"{PARTIAL}{path.name}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that it is either the old one or the new one, never half of it."""
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
