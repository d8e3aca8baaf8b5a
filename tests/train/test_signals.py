"""Stopping: SIGINT and SIGTERM save and say how to go on; kill -9 costs no more than the steps since the last save."""

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expertune.errors import Interrupted
from expertune.train import run as run_module
from expertune.train.trainer import Trainer
from tests.train.runs import losses, run, start, write_config, write_rows

OPTIONS = {"max_steps": 40, "save_steps": 5, "num_epochs": 10, "micro_batch_size": 4}
TIMEOUT_SECONDS = 120


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(write_config(folder, **OPTIONS))  # a process like the interrupted ones: one thread, same sums
    assert process.wait(TIMEOUT_SECONDS) == 0, process.stdout.read() if process.stdout else ""
    return folder / "run"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def assert_same_run(resumed: Path, whole: Path) -> None:
    assert losses(resumed) == losses(whole)
    got, want = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (resumed, whole))
    assert all(torch.equal(got[name], want[name]) for name in want)


def resume(config: Path) -> str:
    process = start(config, "--resume")
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_names_the_resume_command(
    number: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **OPTIONS)
    process = start(config)
    wait_for(tmp_path / "run" / "checkpoint-5")
    process.send_signal(number)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert f"stopped by {number.name} at step" in output
    assert f"train {config} --resume" in output
    assert not (tmp_path / "run" / "adapter").exists()
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert f"at step {steps[-1]};" in output, "the step that was under way was not saved"
    resume(config)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_kill_9_costs_only_the_steps_since_the_last_save(uninterrupted: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, **OPTIONS)
    process = start(config)
    wait_for(tmp_path / "run" / "checkpoint-10")
    process.kill()
    process.wait(TIMEOUT_SECONDS)
    (tmp_path / "run" / ".partial-checkpoint-15").mkdir(exist_ok=True)  # as if it had been in the middle of a save
    output = resume(config)
    assert "which an interrupted run had half written" in output
    first_step = int(output.split("step ")[1].split("/")[0])
    assert first_step >= 11, "steps before the last save were done again"
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_signal_before_the_first_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> str:
        signal.raise_signal(signal.SIGTERM)
        return ""

    monkeypatch.setattr(run_module, "reply", interrupted)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        run(write_config(tmp_path, sample_prompts=["hello"], max_steps=3))


def test_a_signal_during_an_evaluation_saves_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout = [{"path": str(write_rows(tmp_path / "heldout.jsonl", 12, skip=60))}]
    options = {"test_datasets": heldout, "max_steps": 6, "eval_steps": 3, "eval_on_start": False, "num_epochs": 2}
    config = write_config(tmp_path / "stopped", **options)
    real = Trainer.prediction_step

    def interrupted(self: Trainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "prediction_step", interrupted)
    with pytest.raises(Interrupted, match=r"stopped by SIGINT at step 3; saved .*checkpoint-3"):
        run(config)
    monkeypatch.undo()
    run(config, resume=True)
    run(write_config(tmp_path / "whole", **options))
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")


def test_a_signal_after_the_last_step_keeps_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> str:
        if (tmp_path / "run" / "adapter").exists():
            signal.raise_signal(signal.SIGTERM)
        return ""

    monkeypatch.setattr(run_module, "reply", interrupted)
    with pytest.raises(Interrupted, match="after the last step; the adapter is complete"):
        run(write_config(tmp_path, sample_prompts=["hello"], max_steps=2))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
