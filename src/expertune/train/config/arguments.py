"""What of a configuration goes on unchanged: to TRL's SFTConfig, and to Weights & Biases through the environment."""

from __future__ import annotations

from typing import Any

from expertune.train.config.fields import argument_of
from expertune.train.config.schema import TrainConfig


def training_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of trl.SFTConfig that are a key's value as it is; keys that are None are left to TRL's default.

    Not among them, because they take a decision: bf16, tf32, warm-up, when to evaluate and save, report_to, padding,
    the loss's masks, resuming.
    """
    return {
        argument: value
        for name, field in TrainConfig.model_fields.items()
        if (argument := argument_of(field)) is not None and (value := getattr(config, name)) is not None
    }


def wandb_environment(config: TrainConfig) -> dict[str, str]:
    """The variables that Transformers' callback for Weights & Biases reads."""
    values = {
        "WANDB_PROJECT": config.wandb_project,
        "WANDB_ENTITY": config.wandb_entity,
        "WANDB_NAME": config.wandb_name,
        "WANDB_RUN_ID": config.wandb_run_id,
        "WANDB_MODE": config.wandb_mode,
        "WANDB_WATCH": config.wandb_watch,
        "WANDB_LOG_MODEL": config.wandb_log_model,
    }
    resume = {"WANDB_RESUME": "allow"} if config.wandb_run_id else {}
    return {name: value for name, value in values.items() if value is not None} | resume
