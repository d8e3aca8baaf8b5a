"""The check of the estimate against measured peaks runs in its tiny form, and holds its 10 % there."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_estimate_is_within_ten_percent_of_a_real_run_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "check.csv"
    command = [sys.executable, ROOT / "benchmarks/estimate_check.py", output, "--tiny"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert {row["checkpointing"] for row in rows} == {"True", "False"}
    assert all(abs(float(row["ratio"]) - 1) < 0.1 for row in rows), rows
    assert {"estimated_gib", "measured_gib", "device", "torch", "transformers", "peft", "commit"} <= set(rows[0])
