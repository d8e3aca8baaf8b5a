"""TRL's SFTTrainer with three things changed: checkpoints appear whole, the log has speed and memory, and the held-out
loss is exact.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from expertune.files import write_whole
from expertune.train.memory import peak_memory_bytes
from expertune.train.saving import CHECKPOINT_PREFIX, whole_folder

BATCH = "batch.json"
"""A checkpoint's file with `Trainer.batch`."""


class Trainer(SFTTrainer):
    """SFTTrainer that writes every checkpoint under a temporary name and renames it, and logs tokens/s and memory.

    Log keys added to each training log: `tokens_per_second` (tokens of the batch, padding left out, since the last log)
    and `peak_memory_gib` (of the GPU, or of the process on a CPU).
    `eval_loss` is the mean over all trained tokens of the held-out rows, in nats, without the router's balance loss:
    the same for every batch size and packing. (Trainer averages the means of batches, weighted by rows.)
    """

    aux_loss_enabled: bool  # SFTTrainer's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self._writing_to: Path | None = None
        self._last_log: tuple[float, float] | None = None
        self._eval_sums: tuple[float, int] = (0.0, 0)  # nats and tokens of the evaluation under way

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to) if self._writing_to else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self.args.output_dir)
        name = f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        with whole_folder(run_dir / name) as partial:
            # Trainer makes run_dir/checkpoint-N and then rotates run_dir: give it an empty run_dir of its own
            self._writing_to = partial / "run"
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            for path in (partial / "run" / name).iterdir():
                path.rename(partial / path.name)
            (partial / "run" / name).rmdir()
            (partial / "run").rmdir()
            write_whole(partial / BATCH, json.dumps(self.batch()) + "\n")
        rotate_checkpoints(output_dir=str(run_dir), save_total_limit=self.args.save_total_limit, use_mtime=False)

    def write_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT does."""
        self.model.save_pretrained(str(folder))

    def batch(self) -> dict[str, int]:
        """How many rows a step has, and in how many processes: a run goes on in others with as many rows."""
        args = self.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {"rows_per_step": rows, "processes": args.world_size}

    def save_now(self) -> None:
        """Save a checkpoint of the last finished step, unless there is none or it is saved already."""
        name = f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        if self.state.global_step > 0 and not (Path(self.args.output_dir) / name).exists():
            self._save_checkpoint(self.model, trial=None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card of TRL's into the run folder: the report and the resolved configuration say more."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._last_log = None
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._last_log is None:
            self._last_log = (time.perf_counter(), self._total_train_tokens)
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._eval_sums = (0.0, 0)
        with_balance_loss, self.aux_loss_enabled = self.aux_loss_enabled, False
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.aux_loss_enabled = with_balance_loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        num_trained = int((inputs["labels"][:, 1:] != -100).sum())
        nats, tokens = self._eval_sums
        self._eval_sums = (nats + loss.item() * num_trained, tokens + num_trained)
        return loss, logits, labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._last_log is not None:
            now, (then, tokens_then) = time.perf_counter(), self._last_log
            logs["tokens_per_second"] = round((self._total_train_tokens - tokens_then) / max(now - then, 1e-9), 1)
            logs["peak_memory_gib"] = round(peak_memory_bytes() / 2**30, 3)
            self._last_log = None
        if "eval_loss" in logs:
            nats, tokens = self._eval_sums
            logs["eval_loss"] = nats / tokens if tokens else math.nan
        super().log(logs, start_time)
