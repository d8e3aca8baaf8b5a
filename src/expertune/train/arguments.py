"""The configuration in the words of TRL's SFTConfig."""

import math
from typing import Any

import torch
from trl import SFTConfig

from expertune.train.config import TrainConfig, training_arguments
from expertune.train.data import LossPlan
from expertune.train.model import compute_dtype


def sft_config(config: TrainConfig, plan: LossPlan, *, output_dir: str | None = None) -> SFTConfig:
    """Translate a settled configuration; steps given per epoch are set later, by `set_intervals`.

    output_dir: instead of the configuration's.
    """
    dtype, on_gpu = compute_dtype(config), torch.cuda.is_available()
    decided: dict[str, Any] = {
        "output_dir": output_dir or config.output_dir,
        "data_seed": config.seed,
        "warmup_steps": config.warmup_steps if config.warmup_steps is not None else config.warmup_ratio,
        "use_cpu": not on_gpu,
        "bf16": dtype == torch.bfloat16,
        "tf32": _tf32(config, on_gpu),
        "dataloader_pin_memory": config.dataloader_pin_memory and on_gpu,
        "gradient_checkpointing_kwargs": dict(config.gradient_checkpointing_kwargs or {"use_reentrant": False}),
        "pad_to_multiple_of": config.sequence_len if config.pad_to_sequence_len else None,
        "prediction_loss_only": True,
        "save_strategy": config.save_strategy,
        "eval_strategy": config.eval_strategy,
        "report_to": list(config.report_to or ()) or "none",
        "logging_first_step": True,
        "disable_tqdm": True,
        **plan.sft_options(),
    }
    return SFTConfig(**(training_arguments(config) | decided))


def set_intervals(args: SFTConfig, config: TrainConfig, *, num_batches: int) -> None:
    """Set the steps between saves and between evaluations, from steps, shares of all steps, or times per epoch.

    num_batches: of one epoch.
    """
    steps_per_epoch = max(1, math.ceil(num_batches / config.gradient_accumulation_steps))
    num_steps = config.max_steps or math.ceil(steps_per_epoch * config.num_epochs)
    if config.save_strategy == "steps":
        args.save_steps = _interval(config.save_steps, config.saves_per_epoch, steps_per_epoch, num_steps)
    if config.eval_strategy == "steps":
        args.eval_steps = _interval(config.eval_steps, config.evals_per_epoch, steps_per_epoch, num_steps)


def _interval(steps: int | float | None, per_epoch: int | None, steps_per_epoch: int, num_steps: int) -> int:
    if steps is not None:
        return max(1, round(steps * num_steps)) if steps < 1 else int(steps)
    return max(1, math.ceil(steps_per_epoch / (per_epoch or 1)))


def _tf32(config: TrainConfig, on_gpu: bool) -> bool | None:
    if not on_gpu:
        return None
    if config.tf32 == "auto":
        return torch.cuda.get_device_capability() >= (8, 0)
    return config.tf32
