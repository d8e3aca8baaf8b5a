"""`kernels.json` of a run: by our trainer, by a plain one, resumed, cut short, and where nothing can be written."""

import json
import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import expertune.train.run
from expertune.ops.records import KernelRecorder, LaunchDescription, gpu_facts
from expertune.train.records import RecordKernels
from tests.one_gpu import one_gpu
from tests.tiny import tiny_model
from tests.train.runs import run, write_config

LazyDict = pytest.importorskip("triton.compiler").LazyDict
runtime = pytest.importorskip("triton.knobs").runtime

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@LaunchDescription
def _describe(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, str]:
    return {"name": args["name"], "shape": "S8", "tile": "128x256x64"}


class FakeClock:
    """Every launch takes 0.5 ms."""

    def __init__(self) -> None:
        self.events = count()

    def can_time(self) -> bool:
        return True

    def event(self) -> int:
        return next(self.events)

    def elapsed_ms(self, start: int, end: int) -> float:
        return 0.5


def launch(name: str = "fake_product") -> None:
    """Play a launch, as Triton's launcher has it."""
    metadata = LazyDict({"name": "_kernel", "function": 0, "stream": 0})
    metadata.add(_describe, ((1,), SimpleNamespace(num_warps=8, num_stages=3, shared=4096), {"name": name}))
    runtime.launch_enter_hook(metadata)
    runtime.launch_exit_hook(metadata)


class Launching(nn.Module):
    """A model that launches one kernel in its forward, and a second one in its backward."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.forwards, self.fails_at = 0, fails_at

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.forwards += 1
        launch()
        if self.forwards == self.fails_at:
            raise RuntimeError("in the step")
        loss = ((x * self.weight).sum(-1) - labels).square().mean()
        if loss.requires_grad:
            loss.register_hook(lambda grad: launch("fake_backward"))
        return {"loss": loss}


def fake_recorder() -> KernelRecorder:
    return KernelRecorder(clock=FakeClock())


def plain_trainer(output_dir: Path, callback: RecordKernels, model: nn.Module | None = None, **options: Any) -> Trainer:
    rows = [{"x": torch.randn(4), "labels": torch.tensor(1.0)} for _ in range(64)]
    arguments: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=model or Launching(),
        args=TrainingArguments(output_dir=str(output_dir), **(arguments | options)),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[callback],
    )


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "kernels.json").read_text(encoding="utf-8"))


def calls(record: dict[str, Any]) -> dict[str, int]:
    return {kernel["name"]: kernel["calls"] for kernel in record["kernels"]}


@pytest.fixture(autouse=True)
def chains_as_they_were() -> Iterator[None]:
    before = list(runtime.launch_enter_hook.calls), list(runtime.launch_exit_hook.calls)
    yield
    assert (runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls) == before


def test_our_run_leaves_its_kernels_in_the_run_folder(tmp_path: Path) -> None:
    run(write_config(tmp_path, max_steps=5, experts_implementation="torch_grouped"))
    record = read(tmp_path / "run")
    assert record["experts_backend"] == "torch_grouped"
    assert record["kernels"] == []
    assert record["steps"] == [2, 3, 4]
    assert record["problem"] is None
    assert record["versions"]["torch"] == torch.__version__
    facts = gpu_facts(DEVICE)
    assert (record["gpu"] or {}).get("name") == (facts.name if facts else None)
    assert not list((tmp_path / "run").glob(".partial-*"))


class OnTheWay(TrainerCallback):
    """Launch a kernel in each step, fail in step fails_at, and keep what is logged."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.fails_at, self.hooks_then = fails_at, -1
        self.logged: list[tuple[int, dict[str, float]]] = []

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        launch()
        if state.global_step + 1 == self.fails_at:
            self.hooks_then = len(runtime.launch_enter_hook.calls)
            raise RuntimeError("in the step")

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        self.logged.append((state.global_step, dict(logs)))

    def joins_our_run(self, monkeypatch: pytest.MonkeyPatch) -> RecordKernels:
        """Add this callback to the next run, whose recorder gets a fake clock. Returned, so that it stays alive."""
        records, make = RecordKernels(recorder=fake_recorder()), expertune.train.run.Trainer
        monkeypatch.setattr("expertune.train.run.RecordKernels", lambda: records)
        monkeypatch.setattr(
            "expertune.train.run.Trainer",
            lambda **options: make(**(options | {"callbacks": [*options["callbacks"], self]})),
        )
        return records


def test_our_run_writes_and_reports_what_was_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_way = OnTheWay()
    on_the_way.joins_our_run(monkeypatch)
    report, _ = run(write_config(tmp_path, max_steps=5, experts_implementation="torch_grouped"))
    assert calls(read(tmp_path / "run")) == {"fake_product": 3}
    assert (4, {"kernels/fake_product_ms_per_step": 0.5}) in on_the_way.logged
    assert [entry["step"] for entry in report.log if "loss" in entry] == [1, 2, 3, 4, 5]


def test_our_run_takes_the_hooks_out_when_a_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_way = OnTheWay(fails_at=3)
    records = on_the_way.joins_our_run(monkeypatch)
    with pytest.raises(RuntimeError, match="in the step"):
        run(write_config(tmp_path, max_steps=4))
    assert on_the_way.hooks_then == 1, "the hooks were not in when the step failed: this tests nothing"
    assert not runtime.launch_enter_hook.calls
    del records  # until here no garbage collection can have helped


def test_a_plain_trainer_records_the_window_and_no_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = RecordKernels(recorder=fake_recorder())
    trainer = plain_trainer(
        tmp_path / "new", callback, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1
    )
    with caplog.at_level(logging.INFO, logger="expertune"):
        trainer.train()
    record = read(tmp_path / "new")
    assert record["steps"] == [2, 3, 4]
    assert record["experts_backend"] is None
    assert record["gpu"] is None
    assert calls(record) == {"fake_product": 6, "fake_backward": 6}
    assert record["kernels"][0] == {
        "name": "fake_product",
        "shape": "S8",
        "tile": "128x256x64",
        "num_warps": 8,
        "num_stages": 3,
        "shared_memory_bytes": 4096,
        "calls": 6,
        "median_ms": 0.5,
    }
    assert "fake_product S8: tile 128x256x64, 8 warps, 3 stages, 0.500 ms x 6" in caplog.text


def test_the_file_is_there_once_the_window_is_through(tmp_path: Path) -> None:
    seen: dict[int, bool] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            seen[state.global_step] = (tmp_path / "kernels.json").exists()

    callback = RecordKernels(first_step=1, last_step=3, recorder=fake_recorder())
    trainer = plain_trainer(tmp_path, callback)
    trainer.add_callback(Look())
    trainer.train()
    assert seen == {1: False, 2: False, 3: True, 4: True, 5: True, 6: True}
    assert read(tmp_path)["steps"] == [1, 2, 3]


@pytest.mark.parametrize(("max_steps", "steps"), [(1, []), (3, [2, 3])])
def test_a_short_run_writes_what_it_has(max_steps: int, steps: list[int], tmp_path: Path) -> None:
    plain_trainer(tmp_path, RecordKernels(recorder=fake_recorder()), max_steps=max_steps).train()
    record = read(tmp_path)
    assert record["steps"] == steps
    assert sum(calls(record).values()) == 2 * len(steps)


def test_a_resumed_run_counts_its_own_steps_and_writes_anew(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    plain_trainer(tmp_path, RecordKernels(recorder=fake_recorder()), max_steps=3, **options).train()
    assert read(tmp_path)["steps"] == [2, 3]
    trainer = plain_trainer(tmp_path, RecordKernels(recorder=fake_recorder()), max_steps=9, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    record = read(tmp_path)
    assert record["steps"] == [5, 6, 7]
    assert calls(record) == {"fake_product": 3, "fake_backward": 3}


def test_a_second_training_starts_anew_after_one_that_failed(tmp_path: Path) -> None:
    callback = RecordKernels(recorder=fake_recorder())
    trainer = plain_trainer(tmp_path, callback, Launching(fails_at=3))
    with pytest.raises(RuntimeError, match="in the step"):
        trainer.train()
    assert len(runtime.launch_enter_hook.calls) == 1, "the hooks were not in when the step failed: this tests nothing"
    trainer.train()
    assert calls(read(tmp_path)) == {"fake_product": 3, "fake_backward": 3}


def test_the_hooks_go_with_the_callback() -> None:
    callback = RecordKernels(recorder=fake_recorder())
    state = TrainerState(is_world_process_zero=True, global_step=1)
    callback.on_step_begin(TrainingArguments("unused", use_cpu=True), state, TrainerControl())
    state.global_step = 2
    callback.on_step_begin(TrainingArguments("unused", use_cpu=True), state, TrainerControl())
    assert len(runtime.launch_enter_hook.calls) == 1
    del callback
    assert not runtime.launch_enter_hook.calls


def test_only_process_zero_records_and_writes(tmp_path: Path) -> None:
    class NotZero(TrainerCallback):
        def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            state.is_world_process_zero = False

    class Recorder(KernelRecorder):
        def start(self) -> None:
            raise AssertionError("started")

    trainer = plain_trainer(tmp_path, RecordKernels(recorder=Recorder()))
    trainer.add_callback(NotZero())
    trainer.train()
    assert not (tmp_path / "kernels.json").exists()


def test_reporters_get_the_time_per_step_and_lose_no_log(tmp_path: Path) -> None:
    reporter = OnTheWay()
    callback = RecordKernels(recorder=fake_recorder())
    trainer = plain_trainer(tmp_path, callback, gradient_accumulation_steps=2)
    callback.also_log_to(trainer)
    trainer.add_callback(reporter)
    trainer.train()
    kernels = [(step, logs) for step, logs in reporter.logged if "loss" not in logs and "train_runtime" not in logs]
    assert kernels == [(4, {"kernels/fake_product_ms_per_step": 1.5, "kernels/fake_backward_ms_per_step": 1.0})]
    assert [step for step, logs in reporter.logged if "loss" in logs] == [1, 2, 3, 4, 5, 6]


def test_the_backend_is_the_argument_or_the_models(tmp_path: Path) -> None:
    model = Launching()
    for name, argument, implementation, want in (
        ("a", None, "grouped_mm", "grouped_mm"),
        ("b", None, "torch_grouped", "torch_grouped"),
        ("c", "mine", "grouped_mm", "mine"),
    ):
        model.config = tiny_model(implementation).config
        callback = RecordKernels(experts_backend=argument, recorder=fake_recorder())
        plain_trainer(tmp_path / name, callback, model, max_steps=1).train()
        assert read(tmp_path / name)["experts_backend"] == want


def test_the_automatic_backend_is_written_as_what_it_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertune.train.records.pick_backend", lambda device_type: f"picked for {device_type}")
    model = Launching()
    model.config = tiny_model("expertune").config
    plain_trainer(tmp_path, RecordKernels(recorder=fake_recorder()), model, max_steps=1).train()
    assert read(tmp_path)["experts_backend"] == "picked for cpu"


def test_a_file_that_cannot_be_written_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels.json").mkdir()
    trainer = plain_trainer(tmp_path, RecordKernels(recorder=fake_recorder()))
    with caplog.at_level(logging.WARNING, logger="expertune"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert "could not be written" in caplog.text


@pytest.mark.parametrize(("first", "last"), [(0, 4), (3, 2)])
def test_a_window_that_is_none_is_refused(first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"first_step, last_step: got {first} and {last}"):
        RecordKernels(first_step=first, last_step=last)


@pytest.mark.gpu
def test_a_real_run_records_real_kernels(tmp_path: Path) -> None:
    from tests.ops.test_records import Double

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (Double.apply(x * self.weight, []).sum(-1) - labels).square().mean()}

    with one_gpu():  # Transformers' trainer would run the model on all of them
        plain_trainer(tmp_path, RecordKernels(), Doubling(), use_cpu=False).train()
    record = read(tmp_path)
    assert record["gpu"]["name"] == torch.cuda.get_device_name()
    (kernel,) = record["kernels"]
    assert (kernel["name"], kernel["tile"], kernel["num_warps"], kernel["calls"]) == ("double", "256", 4, 3)
    assert kernel["median_ms"] > 0
