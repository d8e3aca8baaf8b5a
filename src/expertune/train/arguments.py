"""The configuration in the words of TRL's SFTConfig."""

import math
from typing import Any

import torch
from trl import SFTConfig

from expertune.train.config import TrainConfig
from expertune.train.data import LossPlan
from expertune.train.model import compute_dtype


def sft_config(config: TrainConfig, plan: LossPlan, *, has_heldout: bool) -> SFTConfig:
    """Translate the configuration; steps between saves and evaluations are set later, by `set_intervals`."""
    dtype, on_gpu = compute_dtype(config), torch.cuda.is_available()
    warmup = config.warmup_steps if config.warmup_steps is not None else config.warmup_ratio
    options: dict[str, Any] = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "data_seed": config.seed,
        # batches and steps
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.eval_batch_size or config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_epochs,
        "max_steps": config.max_steps if config.max_steps is not None else -1,
        # optimizer
        "optim": config.optimizer,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": warmup if warmup is not None else 0,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        # precision and memory
        "use_cpu": not on_gpu,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tf32": config.tf32 if on_gpu and isinstance(config.tf32, bool) else None,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": dict(config.gradient_checkpointing_kwargs or {"use_reentrant": False}),
        "activation_offloading": config.activation_offloading,
        "torch_compile": config.torch_compile,
        "dataloader_num_workers": config.dataloader_num_workers,
        "dataloader_pin_memory": on_gpu,
        # data
        "max_length": config.sequence_len,
        "packing": config.sample_packing,
        "eval_packing": config.eval_sample_packing,
        **plan.sft_options(),
        # losses
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "prediction_loss_only": True,
        # saving and logging; "steps" with the numbers that set_intervals puts in
        "save_strategy": "steps",
        "eval_strategy": "steps" if has_heldout and _evaluates(config) else "no",
        "save_total_limit": config.save_total_limit,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "report_to": list(config.report_to) or "none",
        "disable_tqdm": True,
        "project": config.wandb_project or "expertune",
        "run_name": config.wandb_name,
    }
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    return SFTConfig(**options)


def set_intervals(args: SFTConfig, config: TrainConfig, steps_per_epoch: int) -> None:
    """Set the steps between saves and evaluations, which the configuration may give per epoch.

    steps_per_epoch: optimizer steps, at least 1. Without any setting a checkpoint is saved once per epoch.
    """
    args.save_steps = _interval(config.save_steps, config.saves_per_epoch or 1, steps_per_epoch)
    if args.eval_strategy != "no":
        args.eval_steps = _interval(config.eval_steps, config.evals_per_epoch, steps_per_epoch)


def _evaluates(config: TrainConfig) -> bool:
    return config.eval_steps is not None or config.evals_per_epoch is not None


def _interval(steps: int | float | None, per_epoch: int | None, steps_per_epoch: int) -> int:
    if steps is not None:
        return max(1, round(steps * steps_per_epoch)) if 0 < steps < 1 else int(steps)
    return max(1, math.ceil(steps_per_epoch / (per_epoch or 1)))
