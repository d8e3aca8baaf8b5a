"""What happens around the steps: stopping on a signal with everything saved, and the progress bar."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expertune.distributed.mesh import ParallelMesh


class Stopped(Exception):
    """A signal arrived where no step was under way, so there is nothing newer to save."""


class StopOnSignal(TrainerCallback):
    """SIGINT or SIGTERM: finish the step, save a checkpoint, stop. A second signal stops at once.

    received: the name of the signal, None while none has come. stopped_by: the same, once training stops for it.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    @property
    def stopped_by(self) -> str | None:
        return self.received

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the signals inside the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.received is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received is not None:
            raise Stopped


class StopTogether(StopOnSignal):
    """The same in a process among several: all stop after the same step, whoever got the signal, and whenever.

    A terminal and torchrun both pass a signal on, so a second one means nothing; torchrun kills what has not ended
    half a minute after the first.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self._stopped_by: str | None = None

    @property
    def stopped_by(self) -> str | None:
        return self._stopped_by

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        number = signal.Signals[self.received].value if self.received is not None else 0
        numbers = torch.tensor([number], device=args.device)
        number = int(self.mesh.wire(None, "the trainer").maximum(numbers, "the end of a step"))
        if number:
            self.received = self._stopped_by = signal.Signals(number).name
        return super().on_step_end(args, state, control, **kwargs) if number else control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation is finished: others wait in it."""


class ShowProgress(TrainerCallback):
    """A progress bar with loss, tokens/s and memory; plain lines where the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            where = f"step {state.global_step}/{state.max_steps}" if state.global_step else "before training"
            self.console.print(f"{where}  held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        numbers = (
            f"loss {logs['loss']:.4f}  {logs.get('tokens_per_second', 0):,.0f} tokens/s  "
            f"{logs.get('peak_memory_gib', 0):.2f} GiB"
        )
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, numbers=numbers)
        else:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {numbers}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down; also where training ended by an exception."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
