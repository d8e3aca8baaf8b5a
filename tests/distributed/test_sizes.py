"""Layouts that cannot be are refused before anything starts, with the arithmetic."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from expertune.cli.main import app
from expertune.distributed.sizes import ParallelSizes, local_experts, sizes_for
from expertune.errors import ConfigError
from expertune.integrations.sharded_model import deal_out_experts
from expertune.train import processes
from expertune.train.config import TrainConfig, load_config
from expertune.train.processes import join_processes
from tests.tiny import tiny_model
from tests.train.runs import write_config


def test_copies_fill_the_world() -> None:
    assert sizes_for(8, expert=2, shard=2, replicate=None) == ParallelSizes(2, 2, 2)
    assert sizes_for(1, expert=1, shard=1, replicate=None) == ParallelSizes()


@pytest.mark.parametrize(
    ("world", "expert", "shard", "replicate", "message"),
    [
        (6, 4, 1, None, "4 x 1 = 4 does not divide the 6 processes; start 4 with `expertune launch CONFIG --nproc 4`"),
        (1, 2, 2, None, "2 x 2 = 4 does not divide the 1 process"),
        (8, 2, 2, 1, "2 x dp_shard_size 2 x dp_replicate_size 1 = 4, and there are 8 processes"),
        (1, 1, 1, 2, "dp_replicate_size 2 = 2, and there is 1 process"),
    ],
)
def test_sizes_that_do_not_multiply(world: int, expert: int, shard: int, replicate: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sizes_for(world, expert=expert, shard=shard, replicate=replicate)
    assert message in str(caught.value)


def test_experts_that_do_not_divide() -> None:
    assert local_experts(60, ParallelSizes(expert=4), "mlp") == 15
    with pytest.raises(ConfigError) as caught:
        local_experts(60, ParallelSizes(expert=8), "model.layers.0.mlp.experts")
    assert str(caught.value) == (
        "expert_parallel_size: model.layers.0.mlp.experts has 60 experts, and 60 / 8 = 7 remainder 4; need a size that "
        "divides them: 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("eager"), "experts_implementation: got eager, which cannot share experts"),
        (lambda: torch.nn.Linear(2, 2), "the model has no experts in Transformers' experts interface; need 1"),
        (lambda: tiny_model("torch_grouped", num_experts=7), "7 experts, and 7 / 2 = 3 remainder 1"),
    ],
)
def test_models_whose_experts_cannot_be_shared(model: Callable[[], torch.nn.Module], message: str) -> None:
    mesh: Any = SimpleNamespace(sizes=ParallelSizes(expert=2))
    with pytest.raises(ConfigError, match=re.escape(message)):
        deal_out_experts(model(), mesh)


def test_launch_checks_before_it_starts_anything(tmp_path: Path) -> None:
    config = write_config(tmp_path, expert_parallel_size=3)
    result = CliRunner().invoke(app, ["launch", str(config), "--nproc", "4"])
    assert result.exit_code == 2
    assert "3 x 1 = 3 does not divide the 4 processes" in result.output.replace("\n", " ")


def settings(tmp_path: Path, *overrides: str) -> TrainConfig:
    return load_config(write_config(tmp_path), overrides).config


def test_one_process_with_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"4 GPUs are visible to one process: `expertune launch CONFIG --nproc 4`"):
        join_processes(settings(tmp_path))


def test_more_processes_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "join_mesh", lambda *_: pytest.fail("joined"))
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="4 processes were started on this machine, and it has 2 GPUs"):
        join_processes(settings(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("expert_parallel_backend=nccl", "got nccl; need gloo on a machine without an NVIDIA GPU"),
        ("optimizer=adafactor", "optimizer: got adafactor; need one of adamw_torch"),
        ("torch_compile=true", "torch_compile is not supported in several processes"),
    ],
)
def test_what_several_processes_cannot_have(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(processes, "join_mesh", lambda *_: pytest.fail("joined"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        join_processes(settings(tmp_path, override))
    assert message in str(caught.value)
