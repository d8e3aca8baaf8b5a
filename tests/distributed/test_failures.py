"""What stalls or dies ends in an error that says who, where and what to do; and the run goes on from its last save."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from expertune.distributed.dispatch import ExpertShard, send_to_experts
from expertune.distributed.mesh import EXPERT, join_mesh
from expertune.distributed.sizes import ParallelSizes
from expertune.errors import CollectiveError
from expertune.train.callbacks import StopTogether
from tests.distributed.processes import Crew
from tests.train.runs import MODEL, ROOT, write_config


def stall(_: None) -> str | None:
    """The second process never comes to the layer."""
    mesh = join_mesh(ParallelSizes(expert=2), "cpu", timeout_s=1)
    if mesh.rank == 1:
        time.sleep(3)
        return None
    shard = ExpertShard(mesh.wire(EXPERT, "model.layers.7.mlp.experts"), mesh.index(EXPERT), 4)
    start = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        send_to_experts(torch.zeros(2, 4), torch.tensor([[0, 4], [1, 5]]), torch.ones(2, 2), shard)
    assert time.monotonic() - start < 10
    return str(caught.value)


def test_a_stalled_collective_names_rank_and_layer(two: Crew) -> None:
    message, _ = two.run(stall, None)
    for part in ("rank 0", "sizes", "model.layers.7.mlp.experts", "waiting for rank 1", "--resume", "ddp_timeout"):
        assert part in message


def stop_together(_: None) -> tuple[list[bool], str | None]:
    """One process gets a signal before its second step; what each decides after each of three steps."""
    mesh = join_mesh(ParallelSizes(replicate=2), "cpu", timeout_s=10)
    stop = StopTogether(mesh)
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    decided = []
    for step in range(3):
        control = TrainerControl()
        if mesh.rank == 1 and step == 1:
            stop._on_signal(signal.SIGTERM, None)
        stop.on_step_end(args, TrainerState(), control)
        decided.append(control.should_training_stop and control.should_save)
        assert stop.stopped_by == ("SIGTERM" if step >= 1 else None)
    return decided, stop.stopped_by


def test_all_processes_stop_after_the_same_step(two: Crew) -> None:
    assert two.run(stop_together, None) == [([False, True, True], "SIGTERM")] * 2


def launch(config: Path, *arguments: str, nproc: int = 2) -> "subprocess.Popen[str]":
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        [sys.executable, "-m", "expertune", "launch", str(config), "--nproc", str(nproc), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def worker_of(launcher: int, rank: int) -> int:
    """The process id of a rank, from what the system says of the launcher's children."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in f"\0{(status.parent / 'environ').read_text()}":
                return int(status.parent.name)
        except OSError:  # one that has just ended
            continue
    raise LookupError(f"rank {rank} of {launcher} does not run")


def test_a_killed_rank_ends_the_job_the_run_goes_on_and_ctrl_c_saves_once(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        base_model=str(MODEL),
        expert_parallel_size=2,
        micro_batch_size=1,
        max_steps=4000,
        num_epochs=999,
        save_steps=3,
        save_total_limit=2,
        bf16=False,
    )
    run, process = tmp_path / "run", launch(config)
    with ending(process):
        wait_for(lambda: (run / "checkpoint-3").exists(), process)
        os.kill(worker_of(process.pid, 1), signal.SIGKILL)
        start = time.monotonic()
        output, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert process.returncode == 1
    assert "error: rank 1 (process" in output
    assert "was ended by SIGKILL; the other processes were stopped" in output
    assert not (run / "adapter").exists()
    last = max(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))
    (run / "kernels.json").unlink(missing_ok=True)

    process = launch(config, "--resume", "--set", "save_strategy=no", "--set", "save_steps=null")
    with ending(process):
        wait_for(lambda: (run / "kernels.json").exists(), process)  # a few steps are done
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and the processes get it
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"step {last + 1}/4000" in output
    assert f"step {last}/4000" not in output
    saved = [int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")]
    assert output.count("stopped by SIGINT at step") == 1, output
    assert f"stopped by SIGINT at step {max(saved)}; saved " in output
    assert max(saved) > last
    assert f"launch --nproc 2 {config}" in output
    assert "Traceback" not in output


@contextmanager
def ending(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Leave nothing behind of what this test started."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Any, process: "subprocess.Popen[str]", timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.05)
