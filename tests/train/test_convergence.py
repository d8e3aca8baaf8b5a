"""Fifty steps with our experts follow PEFT's own fold, loss by loss, on the same seed."""

from pathlib import Path

import pytest

from tests.train.runs import losses, run, write_config


@pytest.mark.slow
def test_the_loss_curve_is_pefts(tmp_path: Path) -> None:
    options = {"max_steps": 50, "num_epochs": 10, "learning_rate": 2e-3, "lora_r": 8}
    run(write_config(tmp_path / "ours", experts_implementation="torch_grouped", **options))
    run(write_config(tmp_path / "pefts", experts_implementation="grouped_mm", **options))
    ours, pefts = losses(tmp_path / "ours" / "run"), losses(tmp_path / "pefts" / "run")
    assert len(ours) == len(pefts) == 50
    assert pefts[-1] < 0.7 * pefts[0], "it did not learn, so the curves say nothing"
    assert ours[-1] == pytest.approx(pefts[-1], rel=1e-3)
    assert ours == pytest.approx(pefts, rel=3e-3)
