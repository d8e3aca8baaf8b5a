"""What ran, on record: a callback that writes the kernels of the first steps, their times and the GPU to a file."""

import json
import logging
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expertune.files import write_whole
from expertune.layers.backends import AUTO, pick_backend
from expertune.ops.records import KernelRecord, KernelRecorder, gpu_facts

KERNELS = "kernels.json"
MAX_KERNELS_LOGGED = 8  # the rest is in the file

logger = logging.getLogger("expertune")


class RecordKernels(TrainerCallback):
    """Write `kernels.json` into the run folder once the first steps are through, and log a summary.

    The file has: experts_backend, steps (the numbers of the recorded steps), gpu (`GpuFacts`, null without one),
    versions, kernels (a `KernelRecord` each, most time first; empty where no Triton kernel of expertune ran), problem.
    Works in any script: `Trainer(..., callbacks=[RecordKernels()])`. Only process zero records and writes.
    A run that ends before last_step writes what it has; a resumed run counts its own steps and writes the file anew.
    The summary goes to the Python logger "expertune" (INFO). Nothing goes over the network.

    experts_backend: what to write there; None: read from the model's configuration, None again if it has no experts.
    first_step, last_step: what to record, counted from 1 in this process; the first step compiles. The hooks are in
    only within these steps, and evaluations are not recorded.
    recorder: what sees the launches.
    """

    def __init__(
        self,
        *,
        experts_backend: str | None = None,
        first_step: int = 2,
        last_step: int = 4,
        recorder: KernelRecorder | None = None,
    ) -> None:
        if not 1 <= first_step <= last_step:
            raise ValueError(f"first_step, last_step: got {first_step} and {last_step}, need 1 <= first <= last")
        self._experts_backend = experts_backend
        self._window = range(first_step, last_step + 1)
        self._recorder = KernelRecorder() if recorder is None else recorder
        self._trainer: transformers.Trainer | None = None
        self._steps_before: int | None = None  # steps of an earlier run, which this one continues
        self._steps: list[int] = []
        self._finished = False
        weakref.finalize(self, self._recorder.stop)  # where a step raised, no event tells

    def also_log_to(self, trainer: transformers.Trainer) -> None:
        """Give the summary to the trainer's reporters too, as `kernels/NAME_ms_per_step` (calls x median).

        These are whom the user's `report_to` names; some of them, such as wandb, do use the network.
        """
        self._trainer = trainer

    def close(self) -> None:
        """Take the hooks out; needed only where training ended by an exception."""
        self._recorder.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps_before is None:
            self._steps_before = state.global_step
        step = state.global_step + 1
        if step - self._steps_before in self._window and state.is_world_process_zero:
            self._steps.append(step)
            self._recorder.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._recorder.stop()
        if self._steps_before is not None and state.global_step - self._steps_before >= self._window[-1]:
            self._finish(args, state, kwargs.get("model"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recorder.stop()
        self._finish(args, state, kwargs.get("model"))

    def _forget(self) -> None:
        self._recorder.stop()
        self._recorder.reset()
        self._steps_before = None
        self._steps = []
        self._finished = False

    def _finish(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module | None) -> None:
        if self._finished or not state.is_world_process_zero:
            return
        self._finished = True
        kernels = self._recorder.summarise()
        gpu = gpu_facts(args.device)
        record = {
            "experts_backend": self._experts_backend or _backend_of(model, args.device.type),
            "steps": self._steps,
            "gpu": asdict(gpu) if gpu is not None else None,
            "versions": {package: _version(package) for package in ("torch", "triton", "transformers", "expertune")},
            "kernels": [asdict(kernel) for kernel in kernels],
            "problem": self._recorder.problem,
        }
        try:
            write_whole(Path(args.output_dir) / KERNELS, json.dumps(record, indent=2) + "\n")
        except OSError as error:  # the training is worth more than its record
            logger.warning("%s could not be written: %s", Path(args.output_dir) / KERNELS, error)
        if self._recorder.problem is not None:
            logger.warning("kernels are not all on record: %s", self._recorder.problem)
        self._log(kernels, gpu.name if gpu is not None else "the CPU", args, state)
        self._recorder.reset()  # the events

    def _log(self, kernels: Sequence[KernelRecord], where: str, args: TrainingArguments, state: TrainerState) -> None:
        if not kernels:
            logger.info("no Triton kernel of expertune ran in steps %s on %s", self._steps, where)
            return
        lines = [_in_words(kernel) for kernel in kernels[:MAX_KERNELS_LOGGED]]
        if len(kernels) > MAX_KERNELS_LOGGED:
            lines.append(f"{len(kernels) - MAX_KERNELS_LOGGED} more in {KERNELS}")
        logger.info("kernels of steps %s on %s:\n  %s", self._steps, where, "\n  ".join(lines))
        if self._trainer is None:
            return
        numbers: dict[str, float] = {}
        for kernel in kernels:
            if kernel.median_ms is not None:
                key = f"kernels/{kernel.name}_ms_per_step"
                numbers[key] = numbers.get(key, 0.0) + kernel.calls * kernel.median_ms / len(self._steps)
        # Not Trainer.log: SFTTrainer's ends the averages of the step's own log there. A control of its own, because
        # on_log clears should_log, and the step's own log is still to come.
        self._trainer.callback_handler.on_log(args, state, TrainerControl(), numbers)


def _in_words(kernel: KernelRecord) -> str:
    time = f"{kernel.median_ms:.3f} ms" if kernel.median_ms is not None else "not timed"
    return (
        f"{kernel.name} {kernel.shape}: tile {kernel.tile}, {kernel.num_warps} warps, {kernel.num_stages} stages, "
        f"{time} x {kernel.calls}"
    )


def _backend_of(model: torch.nn.Module | None, device_type: str) -> str | None:
    """The experts implementation of the model's configuration; of "expertune", the backend that it picks."""
    name = getattr(getattr(model, "config", None), "_experts_implementation", None)
    return pick_backend(device_type) if name == AUTO else name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
