"""The loss of 50 steps with our experts beside PEFT's own fold, on the same seed, model and data.

    python benchmarks/loss_curve.py              # writes benchmarks/results/loss_curve.csv

Both runs go through `expertune train` with examples/quickstart.yaml; only `experts_implementation` differs.
"""

import csv
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from environment import environment
from expertune.train.config import load_config
from expertune.train.run import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "loss_curve.csv"
NUM_STEPS = 50
OURS, PEFTS = "torch_grouped", "eager"


def losses(implementation: str, overrides: tuple[str, ...] = ()) -> list[float]:
    """The training loss of each step; with `eager`, PEFT folds the adapters into the weights itself."""
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            f"experts_implementation={implementation}",
            f"base_model={ROOT / 'examples/tiny_moe/model'}",
            f"datasets.0.path={ROOT / 'examples/tiny_moe/data/train.jsonl'}",
            f"test_datasets.0.path={ROOT / 'examples/tiny_moe/data/heldout.jsonl'}",
            f"output_dir={folder}/run",
            f"max_steps={NUM_STEPS}",
            "logging_steps=1",
            "eval_on_start=false",
            "sample_prompts=[]",
            *overrides,
        )
        config = load_config(ROOT / "examples" / "quickstart.yaml", settings).config
        report = train(config, Console(quiet=True), resume_command="")
    return [entry["loss"] for entry in report.log if "loss" in entry]


def main() -> None:
    curves = {name: losses(name) for name in (OURS, PEFTS)}
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        where = environment()
        writer.writerow(["step", f"loss_{OURS}", f"loss_peft_fold_{PEFTS}", "relative_difference", *where])
        for step, (ours, pefts) in enumerate(zip(curves[OURS], curves[PEFTS], strict=True), start=1):
            writer.writerow([step, f"{ours:.7f}", f"{pefts:.7f}", f"{abs(ours - pefts) / pefts:.2e}", *where.values()])
    last = abs(curves[OURS][-1] - curves[PEFTS][-1]) / curves[PEFTS][-1]
    print(f"step {NUM_STEPS}: {curves[OURS][-1]:.6f} and {curves[PEFTS][-1]:.6f}, relative difference {last:.1e}")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
