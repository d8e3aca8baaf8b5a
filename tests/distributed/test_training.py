"""Runs in several processes beside one process with the same batches: losses, norms, adapters, resumption."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.errors import ConfigError
from expertune.integrations.audit import audit_adapter
from tests.distributed.processes import Crew
from tests.distributed.runs import (
    STEPS,
    adapter_of,
    log_of,
    make_base_model,
    report_of,
    run_together,
    write_run,
)

BATCHES = 4  # of a step, over all processes
SHORT = 13  # past the end of the first epoch, where processes are left without a row


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh, and more keys."""

    processes: int
    keys: dict[str, Any]


LAYOUTS = {
    "ep 2": Layout(2, {"expert_parallel_size": 2}),
    "dp_shard 2": Layout(2, {"dp_shard_size": 2}),
    "two copies": Layout(2, {"max_steps": SHORT}),
    "ep 4": Layout(4, {"expert_parallel_size": 4}),
    "ep 2 x dp_shard 2": Layout(4, {"expert_parallel_size": 2, "dp_shard_size": 2}),
    "ep 2 x dp_shard 2, checkpointed": Layout(
        4, {"expert_parallel_size": 2, "dp_shard_size": 2, "gradient_checkpointing": True, "max_steps": 10}
    ),
    "ep 2 x dp_replicate 2": Layout(4, {"expert_parallel_size": 2, "dp_replicate_size": 2, "max_steps": SHORT}),
}


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """The folder of the run in one process, with a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("alone")
    run_together(None, write_run(folder, base_model, batches=BATCHES, save_steps=STEPS // 2, save_strategy="steps"))
    return folder


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, base_model: Path, two: Crew) -> Path:
    """The same of the run in two processes that share the experts."""
    folder = tmp_path_factory.mktemp("divided")
    run_in(LAYOUTS["ep 2"], folder, base_model, two, save_steps=STEPS // 2, save_strategy="steps")
    return folder


def run_in(layout: Layout, folder: Path, base_model: Path, crew: Crew, *, resume: bool = False, **changes: Any) -> None:
    config = write_run(folder, base_model, batches=BATCHES // layout.processes, **(layout.keys | changes))
    printed = run_together(crew, config, resume=resume)
    steps = layout.keys.get("max_steps", STEPS)
    assert f"step {steps}/{steps}" in printed[0]
    assert not any(printed[1:]), "a process other than the first one printed"


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_equals_one_process(
    name: str, alone: Path, divided: Path, base_model: Path, tmp_path: Path, two: Crew, four: Crew
) -> None:
    layout, folder = LAYOUTS[name], divided if name == "ep 2" else tmp_path
    if name != "ep 2":
        run_in(layout, folder, base_model, two if layout.processes == 2 else four)
    steps = layout.keys.get("max_steps", STEPS)
    assert_same_losses(folder, alone, steps)
    if steps == STEPS:
        assert_same_end(folder, alone)


@pytest.mark.parametrize("name", ["one process", "ep 2 x dp_shard 2"])
def test_it_resumes_on_another_mesh(
    name: str, alone: Path, divided: Path, base_model: Path, tmp_path: Path, four: Crew
) -> None:
    before = alone if name == "ep 2 x dp_shard 2" else divided
    shutil.copytree(before / "run" / f"checkpoint-{STEPS // 2}", tmp_path / "run" / f"checkpoint-{STEPS // 2}")
    if name == "one process":
        run_together(None, write_run(tmp_path, base_model, batches=BATCHES), resume=True)
    else:
        run_in(LAYOUTS[name], tmp_path, base_model, four, resume=True)
    assert report_of(tmp_path)["resumed_from"] is not None
    assert_same_losses(tmp_path, alone, STEPS)
    assert_same_end(tmp_path, alone)


def test_a_checkpoint_is_that_of_one_process(alone: Path, divided: Path) -> None:
    got, want = (folder / "run" / f"checkpoint-{STEPS}" for folder in (divided, alone))
    missing = {path.name for path in want.iterdir()} - {path.name for path in got.iterdir()}
    assert missing == {"rng_state.pth"}, "rng_state_0.pth is in its place"
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (got, want)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, values in states[1]["state"].items():
        assert states[0]["state"][index].keys() == values.keys()
        for name, value in values.items():
            assert states[0]["state"][index][name].shape == value.shape
            assert_near(f"{name} of {index}", states[0]["state"][index][name], value)


def test_other_rows_in_a_step_are_refused(divided: Path, base_model: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, base_model, batches=1, resume_from_checkpoint=str(divided / "run" / "checkpoint-15"))
    with pytest.raises(ConfigError, match=r"4 rows in a step \(2 processes\).*_size 1 x .* 1 x 1 process = 1"):
        run_together(None, config)


def test_going_on_from_an_adapter(alone: Path, base_model: Path, tmp_path: Path, two: Crew) -> None:
    changes = {"lora_model_dir": str(alone / "run"), "max_steps": 1, "learning_rate": 1e-12}
    run_together(two, write_run(tmp_path, base_model, batches=2, expert_parallel_size=2, **changes))
    assert_same_adapter(adapter_of(tmp_path), adapter_of(alone))


def test_a_held_out_loss_before_the_first_step(base_model: Path, tmp_path: Path, two: Crew) -> None:
    changes = {"max_steps": 1, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
    for folder, crew, batches in (("alone", None, 2), ("two", two, 1)):
        sharded = {} if crew is None else {"expert_parallel_size": 2}
        run_together(crew, write_run(tmp_path / folder, base_model, batches=batches, **changes, **sharded))
    got, want = (report_of(tmp_path / folder) for folder in ("two", "alone"))
    assert got["heldout_loss_before"] == pytest.approx(want["heldout_loss_before"], abs=1e-5)
    assert got["heldout_loss_after"] == pytest.approx(want["heldout_loss_after"], abs=1e-5)
    assert want["heldout_loss_after"] != want["heldout_loss_before"]


def test_packed_rows(base_model: Path, tmp_path: Path, two: Crew) -> None:
    """13 sequences an epoch, four a step: one process of two gets the last one, the other a filler."""
    packed = {
        "sample_packing": True,
        "max_steps": None,
        "num_epochs": 1.5,
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
    }
    run_together(None, write_run(tmp_path / "alone", base_model, batches=4, **packed))
    run_together(two, write_run(tmp_path / "two", base_model, batches=2, expert_parallel_size=2, **packed))
    rows = log_of(tmp_path / "alone")
    assert [entry["epoch"] for entry in rows].count(1.0) == 1, "no epoch ended: nobody was left without a row"
    assert_same_losses(tmp_path / "two", tmp_path / "alone", 6)


def assert_same_losses(got: Path, want: Path, steps: int) -> None:
    got_log, want_log = log_of(got), log_of(want)[:steps]
    assert len(got_log) == steps
    for key, tolerance in {"loss": 1e-5, "grad_norm": 1e-4}.items():
        worst = max(abs(a[key] - b[key]) for a, b in zip(got_log, want_log, strict=True))
        assert worst <= tolerance, f"{key} differs by {worst:.1e}"
    assert want_log[-1]["loss"] < want_log[0]["loss"] - 0.5, "nothing was learned, so equality says little"
    assert max(entry["grad_norm"] for entry in want_log) > 1.0, "clipping did nothing"


def assert_same_end(got: Path, want: Path) -> None:
    got_loss, want_loss = (report_of(folder)["heldout_loss_after"] for folder in (got, want))
    assert abs(got_loss - want_loss) <= 1e-5
    if report_of(got)["resumed_from"] is None:
        assert report_of(got)["samples_before"] == report_of(want)["samples_before"] != []
    assert report_of(got)["samples_after"] == report_of(want)["samples_after"] != [], "all processes generate together"
    assert_same_adapter(adapter_of(got), adapter_of(want))
    audit = audit_adapter(got / "run" / "adapter")
    assert not audit.problems
    assert audit.num_experts == 32  # of two layers


def assert_same_adapter(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert {name: tensor.shape for name, tensor in got.items()} == {name: t.shape for name, t in want.items()}
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert_near(name, got[name], tensor)


def assert_near(name: str, got: Tensor, want: Tensor) -> None:
    """Adam divides by moments that are nearly 0, so rounding shows; two swapped experts would make an error of 1."""
    error = float((got - want).norm() / want.norm())
    assert error <= 1e-3, f"{name}: {error:.1e}"
