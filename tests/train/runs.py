"""Small real runs for the tests: the shipped model on a few of the shipped rows."""

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from expertune.train.config import load_config
from expertune.train.run import RunReport, train
from tests.one_gpu import FIRST_GPU, one_gpu

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny_moe" / "model"
TRAIN_ROWS = ROOT / "examples" / "tiny_moe" / "data" / "train.jsonl"


def write_rows(path: Path, count: int, *, skip: int = 0) -> Path:
    """The first rows of the shipped set that are short, so that a step takes a fraction of a second."""
    short = [line for line in TRAIN_ROWS.read_text(encoding="utf-8").splitlines() if len(line) < 400]
    path.write_text("\n".join(short[skip : skip + count]) + "\n", encoding="utf-8")
    return path


def write_config(folder: Path, **changes: Any) -> Path:
    """A configuration in `folder` that trains on a few rows; `changes` override or, as None, remove keys."""
    folder.mkdir(parents=True, exist_ok=True)
    keys: dict[str, Any] = {
        "base_model": str(MODEL),
        "datasets": [{"path": str(write_rows(folder / "train.jsonl", 48)), "type": "chat_template"}],
        "sequence_len": 256,
        "lora_r": 4,
        "lora_alpha": 8,
        "micro_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "output_dir": str(folder / "run"),
    }
    keys = {name: value for name, value in (keys | changes).items() if value is not None}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def run(config: Path, *overrides: str, resume: bool = False) -> tuple[RunReport, str]:
    """Train in this process; returns the report and what was printed."""
    output = StringIO()
    console = Console(file=output, width=200)
    with one_gpu():
        report = train(load_config(config, overrides).config, console, resume=resume, resume_command="RESUME")
    return report, output.getvalue()


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    """Train in a process of its own, to be stopped by signals."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | FIRST_GPU | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        [sys.executable, "-m", "expertune", "train", str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def losses(output_dir: Path) -> list[float]:
    report = json.loads((output_dir / "report.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in report["log"] if "loss" in entry]
