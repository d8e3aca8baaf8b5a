"""The command line called in this process, and the small inputs it is called with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner, Result

from expertune.cli.main import app
from tests.one_gpu import FIRST_GPU, one_gpu

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny_moe" / "model"
DATA = ROOT / "examples" / "tiny_moe" / "data"


def call(*arguments: str | Path, typed: str | None = None, columns: int = 80) -> Result:
    """Run `expertune ARGUMENTS`; `output` is standard output and standard error as they came.

    typed: standard input. columns: width of the terminal, which it does not write to.
    """
    environment = {"COLUMNS": str(columns), "FORCE_COLOR": ""}
    with one_gpu():
        return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments], input=typed)


def call_alone(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a process of its own that can import this repository."""
    environment = {
        **os.environ,
        **FIRST_GPU,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])),
        "COLUMNS": "80",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, check=False, timeout=300
    )


def short_rows(name: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a shipped set that are short, so that a step takes a fraction of a second."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if len(line) < 400][:count]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(path: Path, **changes: Any) -> Path:
    """A configuration that trains the shipped model; `changes` add or replace keys, None takes one away."""
    keys: dict[str, Any] = {
        "base_model": str(MODEL),
        "datasets": [{"path": "train.jsonl"}],
        "sequence_len": 256,
        "lora_r": 4,
        "lora_alpha": 8,
        "micro_batch_size": 2,
        "max_steps": 4,
        "output_dir": "run",
    }
    keys = {name: value for name, value in (keys | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path
