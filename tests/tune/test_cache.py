"""The file with tuned tiles: many writers, broken files, other versions."""

import json
import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expertune.errors import ConfigError
from expertune.integrations import tuned
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.tune import cache
from expertune.tune.cache import Entry, Machine, TunedShape, read_entries, read_tiles, store

MACHINE = Machine("NVIDIA H200", "9.0", cache.KERNEL, "0123456789abcdef", "3.6.0", "2.11.0+cu130", "0.1.0")
SHAPE = TunedShape(128, 2048, 768, 8, 512, 16, "bfloat16")
ENTRY = Entry(MACHINE, SHAPE, LinearTile(rows=64), 2.5, 3.0)
WRITERS, ENTRIES_EACH = 8, 6


def keep(path: Path, entry: Entry = ENTRY) -> bool:
    return store(path, entry.machine, entry.shape, entry)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def write_many(path: Path, writer: int, barrier: Any) -> None:
    barrier.wait()
    for index in range(ENTRIES_EACH):
        keep(path, replace(ENTRY, shape=replace(SHAPE, hidden=1000 * writer + index)))


def read_many(path: Path, stop: Any, failures: Any) -> None:
    """Readers take no lock; a file that is half written would not be JSON."""
    while not stop.is_set():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except ValueError as error:
            failures.put(str(error))


def test_what_was_kept_is_found(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "tiles.json"
    assert keep(path)
    assert not keep(path), "nothing changed"
    faster = replace(ENTRY, tile=LinearTile(columns=128, descriptors=False), tile_ms=2.0)
    assert keep(path, faster)
    assert read_entries(path) == [faster]
    assert read_tiles(path, MACHINE).tiles == {SHAPE: faster.tile}
    assert store(path, MACHINE, SHAPE, None)
    assert read_entries(path) == []
    assert {each.name for each in path.parent.iterdir()} == {"tiles.json", "tiles.json.lock"}


def test_no_file_is_no_warning_and_taking_out_makes_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tiles.json"
    assert read_tiles(path, MACHINE).tiles == {}
    assert read_entries(tmp_path / "tiles.json" / "x") == []
    assert not store(path, MACHINE, SHAPE, None)
    assert not path.exists()
    assert warnings_of(caplog) == []


def test_no_entry_of_many_processes_is_lost(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    path, barrier = tmp_path / "tiles.json", context.Barrier(WRITERS)
    stop, failures = context.Event(), context.Queue()
    reader = context.Process(target=read_many, args=(path, stop, failures))
    reader.start()
    writers = [context.Process(target=write_many, args=(path, number, barrier)) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    stop.set()
    reader.join(60)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    assert failures.empty()
    kept = {entry.shape.hidden for entry in read_entries(path)}
    assert kept == {1000 * writer + index for writer in range(WRITERS) for index in range(ENTRIES_EACH)}


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    keep(path)
    before = path.read_bytes()

    def die(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(ConfigError, match=r"tiles\.json cannot be written \(No space left on device\)"):
        keep(path, replace(ENTRY, tile_ms=1.0))
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".partial-*"))


def test_a_lock_that_is_held_is_waited_for_and_then_named(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    with (
        cache._locked(path, 1.0),
        pytest.raises(ConfigError, match=r"another process has held .*tiles\.json\.lock for 0 s"),
    ):
        store(path, MACHINE, SHAPE, ENTRY, timeout_s=0.1)
    assert keep(path), "the lock is free again"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read (Expecting value"),
        (b'{"schema": 1, "entries": [{', "cannot be read (Expecting property name"),
        (b"\xff\xfe\x00", "cannot be read ('utf-8' codec"),
        (b"[" * 100_000, "cannot be read ("),
        (b"[1, 2]", "is no cache of expertune's"),
        (b'{"schema": 1}', "is no cache of expertune's"),
        (b'{"schema": 99, "entries": []}', "has the schema 99, and this version of expertune reads 1"),
    ],
)
def test_a_broken_file_is_one_warning_and_the_next_write_mends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, says: str
) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(content)
    assert read_tiles(path, MACHINE).tiles == {}
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"tuned tiles: {path} {says}")
    assert warning.endswith("Delete the file or run `expertune tune` again")
    keep(path)
    assert read_tiles(path, MACHINE).tiles == {SHAPE: ENTRY.tile}


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("tile", "rows"), 100, "tile.rows: got 100, need a power of two from 16 to 1024"),
        (("tile", "columns"), 2**40, "tile.columns: got"),
        (("tile", "num_stages"), 0, "tile.num_stages: got 0, need a number from 1 to 16"),
        (("tile", "num_warps"), True, "tile.num_warps: got True, need int"),
        (("tile", "halves"), 1, "tile.halves: got 1, need bool"),
        (("tile", "new"), 1, "tile: has the keys"),
        (("shape", "rank"), "16", "shape.rank: got '16', need int"),
        (("machine", "gpu"), None, "machine.gpu: got None, need str"),
        (("tile_ms",), "fast", "tile_ms: got 'fast', need a number"),
        (("tile",), [], "tile: got list, need an object"),
    ],
)
def test_a_broken_entry_is_named_and_the_others_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: tuple[str, ...], value: object, says: str
) -> None:
    path, other = tmp_path / "tiles.json", replace(ENTRY, shape=replace(SHAPE, rank=64))
    keep(path)
    keep(path, other)
    content = json.loads(path.read_text())
    inner = content["entries"][0]
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path.write_text(json.dumps(content))
    assert read_tiles(path, MACHINE).tiles == {other.shape: other.tile}
    (warning,) = warnings_of(caplog)
    assert f"has 1 broken of 2 entries (the first: {says}" in warning


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "tiles.json").mkdir()
    for path in (tmp_path / "file" / "tiles.json", tmp_path / "tiles.json"):
        with pytest.raises(ConfigError, match=r"cannot be written .*; choose another file, or measure with --dry-run"):
            cache.check_writable(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_still_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    keep(folder / "tiles.json")
    folder.chmod(0o555)
    try:
        assert read_tiles(folder / "tiles.json", MACHINE).tiles == {SHAPE: ENTRY.tile}
        with pytest.raises(ConfigError, match="cannot be written"):
            keep(folder / "tiles.json", replace(ENTRY, tile_ms=1.0))
    finally:
        folder.chmod(0o755)


def test_reading_needs_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read-only folder again, for root: opening for anything but reading fails."""
    path, opened = tmp_path / "tiles.json", Path.open
    keep(path)

    def read_only(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode != "r":
            raise OSError(30, "Read-only file system")
        return opened(self, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", read_only)
    assert read_tiles(path, MACHINE).tiles == {SHAPE: ENTRY.tile}
    with pytest.raises(ConfigError, match="Read-only file system"):
        cache.check_writable(path)


@pytest.mark.parametrize("field", ["source", "triton", "torch", "expertune"])
def test_another_version_is_stale_until_it_is_measured_again(tmp_path: Path, field: str) -> None:
    path, now = tmp_path / "tiles.json", replace(MACHINE, **{field: "9.9"})
    keep(path)
    read = read_tiles(path, now)
    assert read.tiles == {}
    (why,) = read.stale.values()
    assert why == ("another kernel source" if field == "source" else f"{field} {getattr(MACHINE, field)}, now 9.9")
    keep(path, replace(ENTRY, machine=now))
    assert (read_tiles(path, now).tiles, read_tiles(path, now).stale) == ({SHAPE: ENTRY.tile}, {})
    assert read_tiles(path, MACHINE).tiles == {SHAPE: ENTRY.tile}, "two environments share a file"


@pytest.mark.parametrize(
    "field", ["gpu", "capability", "kernel"], ids=["name", "capability", "kernel"]
)  # "gpu" is a mark
def test_another_gpu_is_no_concern(tmp_path: Path, field: str) -> None:
    keep(tmp_path / "tiles.json")
    read = read_tiles(tmp_path / "tiles.json", replace(MACHINE, **{field: "other"}))
    assert (read.tiles, read.stale) == ({}, {})


def test_classes_of_a_shape() -> None:
    def of(num_rows: int = 65536, rank: int = 16, dtype: torch.dtype = torch.bfloat16) -> TunedShape:
        return TunedShape.of_call(num_rows, 128, 2048, 768, 8, rank, dtype)

    assert of() == SHAPE
    assert [of(128 * mean).rows_per_expert for mean in (0, 1, 362, 363, 724, 725)] == [1, 1, 256, 512, 512, 1024]
    assert [of(rank=rank).rank for rank in (0, 1, 8, 16, 17, 48, 64)] == [0, 16, 16, 16, 32, 64, 64]
    assert of(dtype=torch.float16) != of()


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for given, want in (
        ("/big/cache", "/big/cache"),
        ("relative", "/home/someone/.cache"),
        ("", "/home/someone/.cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache.default_cache_path() == Path(want) / "expertune" / "tiles.json"


def test_the_source_hash_is_of_the_kernel_file() -> None:
    from hashlib import sha256

    source = Path(cache.__file__).parents[1] / "ops" / "experts" / "scattermoe" / "linear.py"
    assert cache.source_hash() == sha256(source.read_bytes()).hexdigest()[:16]


class TestTunedTile:
    """What training asks."""

    GPU = torch.device("cuda", 0)

    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(tuned, "this_machine", lambda _device: MACHINE)
        tuned._tuned.cache_clear()
        tuned._say_stale.cache_clear()
        return tmp_path / "expertune" / "tiles.json"

    @staticmethod
    def ask(num_rows: int = 65536, rank: int = 16, device: torch.device = GPU) -> LinearTile | None:
        return tuned.tuned_tile(num_rows, 128, 2048, 768, 8, rank, torch.bfloat16, device)

    def test_the_tile_of_the_shape(self, path: Path) -> None:
        keep(path)
        assert self.ask() == self.ask(60000) == self.ask(rank=8) == ENTRY.tile
        assert self.ask(num_rows=2 * 65536) is None
        assert self.ask(rank=64) is None
        assert self.ask(device=torch.device("cpu")) is None

    def test_the_file_is_read_once(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.ask() is None
        keep(path)
        assert self.ask() is None, "a running job does not change its tiles"

    def test_stale_is_said_once_and_only_to_whom_it_concerns(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for rank in (16, 32):
            keep(path, replace(ENTRY, machine=replace(MACHINE, torch="2.10"), shape=replace(SHAPE, rank=rank)))
        assert self.ask(num_rows=128) is None
        assert warnings_of(caplog) == []
        assert [self.ask(), self.ask(), self.ask(rank=32)] == [None] * 3
        (warning,) = warnings_of(caplog)
        assert f"what {path} has" in warning
        assert "(torch 2.10, now 2.11.0+cu130)" in warning
        assert "Run `expertune tune` again, or delete the file" in warning
