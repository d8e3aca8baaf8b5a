"""Results as rows of a CSV, with everything that says where they come from; files that are whole or not there."""

import csv
import io
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path

import torch

import expertune
from expertune.bench.cases import Case, ExpertShape
from expertune.bench.measure import TENSORS, Result

_PACKAGES = ("torch", "triton", "transformers", "peft", "axolotl", "sonic-moe", "quack-kernels", "nvidia-cutlass-dsl")


@dataclass(frozen=True)
class CaseResults:
    """A case, the seed and dtype it was drawn with, how often each way was called, and every way's result."""

    case: Case
    seed: int
    dtype: str
    repeats: int
    results: Sequence[Result]


def rows(measured: CaseResults, environment: Mapping[str, str]) -> list[dict[str, object]]:
    """One row for each way; an empty cell where there is nothing to say."""
    case, shape = measured.case, measured.case.shape
    return [
        {
            "shape": shape.name,
            "experts": shape.num_experts,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "top_k": shape.top_k,
            "tokens": case.tokens,
            "rank": case.rank,
            "routing": case.routing,
            "dtype": measured.dtype,
            "seed": measured.seed,
            "repeats": measured.repeats,
            "way": result.way,
            "kind": result.kind,
            "status": result.status,
            "note": result.note,
            "first_call_s": _rounded(result.first_call_s, 3),
            "p20_ms": _rounded(result.p20_ms, 4),
            "p50_ms": _rounded(result.p50_ms, 4),
            "p80_ms": _rounded(result.p80_ms, 4),
            "p50_queued_ms": _rounded(result.p50_queued_ms, 4),
            "p50_sustained_ms": _rounded(result.p50_sustained_ms, 4),
            "p50_host_ms": _rounded(result.p50_host_ms, 4),
            "tflops": _rounded(result.tflops, 1),
            "share_of_dense": _rounded(result.share_of_dense, 4),
            "share_of_dense_queued": _rounded(result.share_of_dense_queued, 4),
            "share_of_dense_sustained": _rounded(result.share_of_dense_sustained, 4),
            "peak_gib": _rounded(result.peak_gib, 3),
            "best_rival": result.best_rival or "",
            "speedup_over_best_rival": _rounded(result.speedup_over_best_rival, 3),
            "speedup_sustained": _rounded(result.speedup_sustained, 3),
            "worst_error": _scientific(result.worst_error),
            **{
                f"error_{name}": _scientific(result.errors[index] if result.errors else None)
                for index, name in enumerate(TENSORS)
            },
            **environment,
        }
        for result in measured.results
    ]


def csv_text(measured: Sequence[CaseResults], environment: Mapping[str, str]) -> str:
    """The whole CSV; only a header line if nothing was measured."""
    lines = [row for each in measured for row in rows(each, environment)]
    text = io.StringIO(newline="")
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def read_csv(text: str) -> tuple[list[CaseResults], dict[str, str]]:
    """What `csv_text` wrote: the cases with their results, and where they were measured (of the first row).

    A column of a number that an older file does not have is empty.

    Raises ValueError if it is no such file.
    """
    lines = list(csv.DictReader(io.StringIO(text, newline="")))
    columns = {"shape", "tokens", "way", "p50_ms", "worst_error"}
    if not lines or not columns <= set(lines[0]):
        raise ValueError(f"it has no rows with the columns {', '.join(sorted(columns))}")
    cases: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        cases.setdefault(tuple(line[name] for name in ("shape", "tokens", "rank", "routing", "seed")), []).append(line)
    names = list(lines[0])
    return [_case_of(each) for each in cases.values()], {
        name: lines[0][name] for name in names[names.index(f"error_{TENSORS[-1]}") + 1 :]
    }


def _case_of(lines: Sequence[Mapping[str, str]]) -> CaseResults:
    first = lines[0]
    sizes = (int(first[name]) for name in ("experts", "hidden", "intermediate", "top_k"))
    case = Case(ExpertShape(first["shape"], *sizes), int(first["tokens"]), int(first["rank"]), first["routing"])
    numbers = [each.name for each in fields(Result) if each.name in first and each.type == (float | None)]
    results = [
        Result(
            line["way"],
            line["kind"],
            line["status"],
            line["note"],
            best_rival=line["best_rival"] or None,
            errors=tuple(float(line[f"error_{name}"]) for name in TENSORS if line[f"error_{name}"]),
            **{name: float(line[name]) if line[name] else None for name in numbers},
        )
        for line in lines
    ]
    return CaseResults(case, int(first["seed"]), first["dtype"], int(first["repeats"]), results)


def describe_environment(device: torch.device) -> dict[str, str]:
    """Device, versions and commit, "+" after the commit for a changed source tree."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({platform.machine()} CPU)",
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "expertune": expertune.__version__,
        "commit": commit_of(Path(expertune.__file__).parent),
    }


def commit_of(folder: Path) -> str:
    """The commit that the package's files are at, or "unknown" where they are not tracked or git is missing."""

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", *arguments]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short", "HEAD")
    if not commit or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"  # installed into an environment that lies in somebody's checkout
    return commit + ("+" if git("status", "--porcelain", "--", ".") else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _rounded(value: float | None, digits: int) -> float | str:
    return "" if value is None else round(value, digits)


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
