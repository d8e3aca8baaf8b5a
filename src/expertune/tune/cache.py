"""The file with tuned tiles: JSON, one entry for each machine and shape, shared by all processes of a user.

A reader needs no lock: the file is replaced as a whole. A writer holds a lock on a file beside it while it reads,
changes and replaces. What is broken or was measured with other versions is ignored, and said.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

import expertune
from expertune.errors import ConfigError
from expertune.files import partial_of, write_whole
from expertune.ops.experts.scattermoe.tiling import LinearTile, pad_rank
from expertune.ops.records import gpu_facts

SCHEMA = 1
KERNEL = "scattermoe.linear"
LOCK_TIMEOUT_S = 30.0
_LOCK_POLL_S = 0.02
_MOST = {"rows": 1024, "columns": 1024, "k_step": 1024, "num_warps": 32, "num_stages": 16, "programs_per_sm": 32}
_LEAST = {"rows": 16, "columns": 16, "k_step": 16}  # of a tensor-core product

logger = logging.getLogger("expertune")
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Machine:
    """Where and with what a tile was measured; an entry is used only where all of it is the same.

    source: the first 16 hexadecimal digits of the SHA-256 of the kernel's file.
    """

    gpu: str
    capability: str
    kernel: str
    source: str
    triton: str
    torch: str
    expertune: str

    def same_gpu(self, other: "Machine") -> bool:
        return (self.gpu, self.capability, self.kernel) == (other.gpu, other.capability, other.kernel)


@dataclass(frozen=True)
class TunedShape:
    """The shape of a call: experts, hidden and intermediate size, experts for each token, and classes of the rest.

    rows_per_expert: the mean, to the nearest power of two (8192 tokens of Qwen3-30B-A3B: 512, which 363 to 724 are
    too). rank: as the kernels pad it, a power of two from 16 on; 0 without an adapter. dtype: as in "bfloat16".
    """

    num_experts: int
    hidden: int
    intermediate: int
    top_k: int
    rows_per_expert: int
    rank: int
    dtype: str

    @classmethod
    def of_call(
        cls, num_rows: int, num_experts: int, hidden: int, intermediate: int, top_k: int, rank: int, dtype: torch.dtype
    ) -> "TunedShape":
        mean = max(1.0, num_rows / num_experts)
        return cls(
            num_experts=num_experts,
            hidden=hidden,
            intermediate=intermediate,
            top_k=top_k,
            rows_per_expert=2 ** round(math.log2(mean)),
            rank=pad_rank(rank) if rank else 0,
            dtype=str(dtype).removeprefix("torch."),
        )


@dataclass(frozen=True)
class Entry:
    """What was found: the tile that won, its time and the default tile's, of the whole expert MLP."""

    machine: Machine
    shape: TunedShape
    tile: LinearTile
    tile_ms: float
    default_ms: float


@dataclass(frozen=True)
class TunedTiles:
    """What a file says for one machine. stale: shapes that only other versions measured, on such a GPU, and why."""

    path: Path
    tiles: Mapping[TunedShape, LinearTile]
    stale: Mapping[TunedShape, str]


def default_cache_path() -> Path | None:
    """`expertune/tiles.json` in the user's cache folder, on every platform by the XDG rule.

    That is $XDG_CACHE_HOME where it is an absolute path (the specification ignores others), else ~/.cache; None if
    neither is known.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given and Path(given).is_absolute():
        return Path(given) / "expertune" / "tiles.json"
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "expertune" / "tiles.json"
    return None


def this_machine(device: torch.device) -> Machine | None:
    """Describe the GPU and the versions; None for a device that is no GPU, or without Triton."""
    gpu = gpu_facts(device)
    if gpu is None:
        return None
    try:
        import triton
    except ImportError:
        return None
    return Machine(
        gpu=gpu.name,
        capability=gpu.capability,
        kernel=KERNEL,
        source=source_hash(),
        triton=triton.__version__,
        torch=torch.__version__,
        expertune=expertune.__version__,
    )


def source_hash() -> str:
    """Of the kernel's file."""
    source = resources.files("expertune.ops.experts.scattermoe").joinpath("linear.py")
    return sha256(source.read_bytes()).hexdigest()[:16]


def read_tiles(path: Path, machine: Machine) -> TunedTiles:
    """What the file says for this machine; nothing, with a warning, if it cannot be read. Never raises."""
    tiles: dict[TunedShape, LinearTile] = {}
    stale: dict[TunedShape, str] = {}
    for entry in read_entries(path):
        if entry.machine == machine:
            tiles[entry.shape] = entry.tile
        elif entry.machine.same_gpu(machine):
            stale[entry.shape] = _difference(entry.machine, machine)
    return TunedTiles(path, tiles, {shape: why for shape, why in stale.items() if shape not in tiles})


def read_entries(path: Path) -> list[Entry]:
    """All entries of the file, the broken ones left out; one warning if there is anything wrong, none if no file is."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, RecursionError) as error:  # bytes that are no UTF-8 or no JSON are ValueErrors
        _warn(path, f"cannot be read ({_first_line(error)})")
        return []
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        _warn(path, "is no cache of expertune's")
        return []
    if content.get("schema") != SCHEMA:
        _warn(path, f"has the schema {content.get('schema')!r}, and this version of expertune reads {SCHEMA}")
        return []
    entries, problems = [], []
    for raw in content["entries"]:
        try:
            entries.append(_parse_entry(raw))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        _warn(path, f"has {len(problems)} broken of {len(content['entries'])} entries (the first: {problems[0]})")
    return entries


def store(
    path: Path,
    machine: Machine,
    shape: TunedShape,
    entry: Entry | None,
    *,
    timeout_s: float = LOCK_TIMEOUT_S,
) -> bool:
    """Put an entry in the place of what the file has for this machine and shape, or take that out (None).

    Returns whether the file changed. Raises ConfigError if it cannot be written or the lock is not had in time.
    """
    with _locked(path, timeout_s):
        before = read_entries(path)
        after = [each for each in before if (each.machine, each.shape) != (machine, shape)]
        if entry is not None:
            after.append(entry)
        if after == before:
            return False
        try:
            write_whole(path, _to_json(after))
        except OSError as error:
            raise _unwritable(path, error) from error
    return True


def check_writable(path: Path, *, timeout_s: float = LOCK_TIMEOUT_S) -> None:
    """Raise ConfigError unless `store` can work; before anything is measured."""
    with _locked(path, timeout_s):
        try:
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder, need a file")
            probe = partial_of(path)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise _unwritable(path, error) from error


@contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock of a cache file; the system frees it when a process dies. The lock's file stays."""
    try:
        import fcntl
    except ImportError as error:
        raise ConfigError("--cache: this system has no file locks (fcntl), so tuned tiles cannot be kept") from error
    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")  # writable: network file systems lock nothing else exclusively
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"--cache: another process has held {lock} for {timeout_s:.0f} s; wait for it or stop it, or "
                        "choose another file"
                    ) from error
                time.sleep(_LOCK_POLL_S)
            except OSError as error:
                raise _unwritable(path, error) from error
        yield  # closing the file frees the lock


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"--cache: {path} cannot be written ({error.strerror or error}); choose another file, or measure with --dry-run"
    )


def _to_json(entries: Sequence[Entry]) -> str:
    return json.dumps({"schema": SCHEMA, "entries": [asdict(entry) for entry in entries]}, indent=1) + "\n"


def _parse_entry(raw: object) -> Entry:
    """An entry out of JSON; raises ValueError, naming the field."""
    if not isinstance(raw, dict):
        raise ValueError(f"got {type(raw).__name__}, need an object")
    tile = _parse(LinearTile, raw.get("tile"), "tile")
    for name, most in _MOST.items():
        value, least = getattr(tile, name), _LEAST.get(name, 1)
        power_needed = name not in ("num_stages", "programs_per_sm")
        if not least <= value <= most or (power_needed and value & (value - 1)):
            kind = "a power of two" if power_needed else "a number"
            raise ValueError(f"tile.{name}: got {value}, need {kind} from {least} to {most}")
    times = []
    for name in ("tile_ms", "default_ms"):
        value = raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}: got {value!r}, need a number")
        times.append(float(value))
    machine, shape = _parse(Machine, raw.get("machine"), "machine"), _parse(TunedShape, raw.get("shape"), "shape")
    return Entry(machine, shape, tile, *times)


def _parse(kind: type[_Record], raw: object, where: str) -> _Record:
    """A dataclass of plain values out of a JSON object with exactly its fields."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: got {type(raw).__name__}, need an object")
    types = get_type_hints(kind)
    if raw.keys() != types.keys():
        raise ValueError(f"{where}: has the keys {sorted(raw)}, need {sorted(types)}")
    for name, value in raw.items():
        if type(value) is not types[name]:  # True is no int here
            raise ValueError(f"{where}.{name}: got {value!r}, need {types[name].__name__}")
    values: dict[str, Any] = raw
    return kind(**values)


def _difference(then: Machine, now: Machine) -> str:
    """In which versions two machines differ, in words."""
    parts = []
    for each in fields(Machine):
        before, after = getattr(then, each.name), getattr(now, each.name)
        if before != after:
            name = "another kernel source" if each.name == "source" else f"{each.name} {before}, now {after}"
            parts.append(name)
    return "; ".join(parts)


def _warn(path: Path, what: str) -> None:
    logger.warning(
        "tuned tiles: %s %s; that is ignored, and the default tiles run. Delete the file or run `expertune tune` again",
        path,
        what,
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), "") or type(error).__name__
