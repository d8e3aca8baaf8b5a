"""Stopping: SIGINT and SIGTERM save and say how to go on; kill -9 costs no more than the steps since the last save."""

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.runs import losses, run, start, write_config

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
    from expertune.train import run as run_module

    def interrupted(*_args: object, **_kwargs: object) -> str:
        signal.raise_signal(signal.SIGTERM)
        return ""

    monkeypatch.setattr(run_module, "reply", interrupted)
    with pytest.raises(run_module.Interrupted, match="stopped by SIGTERM"):
        run(write_config(tmp_path, sample_prompts=["hello"], max_steps=3))
