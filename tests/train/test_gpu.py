"""The same YAML on a GPU: bf16 by itself, it learns, and it follows PEFT's own fold."""

from pathlib import Path

import pytest

from tests.train.runs import losses, run, write_config, write_rows

pytestmark = pytest.mark.gpu


def test_it_learns_in_bf16(tmp_path: Path) -> None:
    heldout = [{"path": str(write_rows(tmp_path / "heldout.jsonl", 12, skip=60))}]
    options = {"test_datasets": heldout, "max_steps": 12, "sample_packing": True, "gradient_checkpointing": True}
    report, printed = run(write_config(tmp_path, **options))
    assert report.heldout_loss_before is not None
    assert report.heldout_loss_after is not None
    assert report.heldout_loss_after < report.heldout_loss_before - 0.2
    assert 0 < report.peak_memory_gib < 4
    assert "experts run on" in printed


def test_the_loss_curve_is_pefts(tmp_path: Path) -> None:
    options = {"max_steps": 50, "num_epochs": 10, "learning_rate": 2e-3, "lora_r": 8}
    run(write_config(tmp_path / "ours", experts_implementation="torch_grouped", **options))
    run(write_config(tmp_path / "pefts", experts_implementation="grouped_mm", **options))
    ours, pefts = losses(tmp_path / "ours" / "run"), losses(tmp_path / "pefts" / "run")
    assert pefts[-1] < 0.7 * pefts[0]
    assert sum(ours[-10:]) == pytest.approx(sum(pefts[-10:]), rel=1e-2)  # bf16 rounds differently on the two paths
