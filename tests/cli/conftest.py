"""One finished run, and its merged checkpoint, for all tests of this folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.calling import call, short_rows, write_config, write_rows

PROMPT = "Give the signature of `Queue.put`, described as: Put an item into the queue."
REPLY_TOKENS = 16


@dataclass(frozen=True)
class FinishedRun:
    """folder: its output_dir. config: the file it was started with. printed: everything it printed."""

    folder: Path
    config: Path
    printed: str

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished")
    train, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    config = write_config(
        folder / "config.yaml",
        datasets=[{"path": str(write_rows(train, short_rows("train.jsonl", 24)))}],
        test_datasets=[{"path": str(write_rows(heldout, short_rows("heldout.jsonl", 8)))}],
        max_steps=8,
        learning_rate=3e-3,
        bf16=False,
        tf32=False,
        sample_prompts=[PROMPT],
        sample_max_new_tokens=REPLY_TOKENS,
        output_dir=str(folder / "my runs" / "first"),
    )
    result = call("train", config)
    assert result.exit_code == 0, result.output
    return FinishedRun(folder / "my runs" / "first", config, result.output)


@pytest.fixture(scope="session")
def merged(finished_run: FinishedRun) -> tuple[Path, str]:
    """The merged checkpoint, and what was printed."""
    folder = finished_run.folder.parent / "merged"
    result = call("merge", finished_run.folder, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output
