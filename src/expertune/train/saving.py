"""Folders that are either whole or not there: written under a temporary name, flushed, then renamed.

A run killed at any moment leaves complete checkpoints and at most one temporary folder, which the next start removes.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertune.errors import ConfigError
from expertune.files import PARTIAL, partial_of

CHECKPOINT_PREFIX = "checkpoint-"
_REPLACED = ".replaced-"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new empty folder that becomes `target` when the block ends without an error; else it is removed.

    A folder that stands at `target` is replaced only once the new one is complete.
    """
    partial = partial_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = target.parent / f"{_REPLACED}{target.name}"
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(folder: Path) -> list[str]:
    """Finish or remove what a killed run left half done in a run folder; returns what was done, in words."""
    done = []
    for replaced in folder.glob(f"{_REPLACED}*"):
        target = folder / replaced.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(replaced)
        else:  # killed between the two renames: the old one is the newest whole one
            replaced.rename(target)
            done.append(f"restored {target.name}, whose replacement was not finished")
    for partial in folder.glob(f"{PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()
        done.append(f"removed {partial.name.removeprefix(PARTIAL)}, which an interrupted run had half written")
    return done


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest step first."""
    found = {
        int(path.name.removeprefix(CHECKPOINT_PREFIX)): path
        for path in folder.glob(f"{CHECKPOINT_PREFIX}*")
        if path.name.removeprefix(CHECKPOINT_PREFIX).isdecimal() and (path / "trainer_state.json").is_file()
    }
    return [found[step] for step in sorted(found)]


def check_output_dir(folder: Path, need_bytes: int) -> None:
    """Raise ConfigError unless the folder can be made, written and renamed in, and has `need_bytes` free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{PARTIAL}probe"
        probe.write_bytes(b"x" * 4096)
        probe.replace(folder / f"{PARTIAL}probe2")
        (folder / f"{PARTIAL}probe2").unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be written ({error.strerror or error}). Choose another output_dir."
        ) from error
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise ConfigError(
            f"output_dir: {folder} has {free_bytes / 2**20:.0f} MiB free, and the checkpoints to be kept need about "
            f"{need_bytes / 2**20:.0f} MiB. Free some space, choose another output_dir, or lower save_total_limit."
        )


def check_new_folder(option: str, output: Path) -> None:
    """Raise ConfigError unless `output` is not there yet and can be made. option: what a message calls it."""
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{option}: {output} exists; choose another folder or delete it")
    try:
        with tempfile.TemporaryDirectory(dir=_existing_parent(output), prefix=".partial-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option}: {output} cannot be written ({error.strerror or error}); choose another folder"
        ) from error


def check_room(option: str, output: Path, need_bytes: int, what: str) -> None:
    """Raise ConfigError unless the disk of `output` has `need_bytes` free for `what`."""
    free_bytes = shutil.disk_usage(_existing_parent(output)).free
    if free_bytes < need_bytes:
        raise ConfigError(
            f"{option}: the disk of {output} has {free_bytes / 2**20:,.0f} MiB free, and the {what} takes "
            f"{need_bytes / 2**20:,.0f} MiB; free some space or choose another folder"
        )


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _flush(folder: Path) -> None:
    """Bring every file to the disk, readable for whom the umask says (safetensors writes for the owner alone)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | (0o444 & ~umask))
            with path.open("rb") as file:
                os.fsync(file.fileno())
