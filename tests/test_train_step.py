"""The benchmark of the whole training step runs in its tiny form, and its ways train alike."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = {"way", "p20_ms", "p50_ms", "p80_ms", "tokens_per_s", "ratio_to_peft", "first_step_s", "peak_gib", "losses"}


def test_the_ways_have_the_same_losses(tmp_path: Path) -> None:
    output = tmp_path / "train_step.csv"
    command = [sys.executable, ROOT / "benchmarks/train_step.py", output, "--tiny", "--rounds", "2", "--steps", "2"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with output.open(newline="") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["attention only", "PEFT on grouped_mm", "ours (torch_grouped)"]
    assert set(rows["PEFT on grouped_mm"]) >= COLUMNS | {"torch", "transformers", "peft", "device", "commit"}
    pefts, ours, floor = (
        [float(loss) for loss in rows[way]["losses"].split()]
        for way in ("PEFT on grouped_mm", "ours (torch_grouped)", "attention only")
    )
    assert len(pefts) == len(ours) == 12
    assert max(abs(a - b) for a, b in zip(pefts, ours, strict=True)) < 1e-4
    assert pefts[-1] < pefts[0]
    assert abs(floor[-1] - pefts[-1]) > 1e-4  # the adapters on experts do something
    assert "skipped" not in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("ours (torch_grouped)")
