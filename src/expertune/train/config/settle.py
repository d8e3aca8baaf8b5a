"""The last step of loading: shorthands go into the keys they stand for, and what was left open is decided."""

from __future__ import annotations

from typing import Any

from expertune.train.config.model_keys import DatasetConfig, MessageProperties
from expertune.train.config.schema import TrainConfig

_WARMUP_RATIO = 0.03


def settle(config: TrainConfig) -> TrainConfig:
    """Return an equal run with nothing left to decide; a settled configuration stays as it is."""
    backend = "scattermoe" if config.use_scattermoe else "sonicmoe" if config.use_sonicmoe else None
    backend = backend or config.experts_implementation
    changes: dict[str, Any] = {
        "flash_attention": None,
        "use_scattermoe": None,
        "use_sonicmoe": None,
        "use_tensorboard": None,
        "use_wandb": None,
        "datasets": [_settle_entry(entry) for entry in config.datasets],
        "test_datasets": [_settle_entry(entry) for entry in config.test_datasets or ()] or None,
        "experts_implementation": backend,
        "sonicmoe_lora": (config.sonicmoe_lora or "low_rank") if backend == "sonicmoe" else None,
        "report_to": _reporters(config),
        "eval_batch_size": config.eval_batch_size or config.micro_batch_size,
        "save_strategy": _strategy(config.save_strategy, config.save_steps, config.saves_per_epoch),
        "eval_strategy": "no",
        "eval_on_start": config.eval_on_start and config.has_heldout,
    }
    if config.flash_attention and config.attn_implementation is None:
        changes["attn_implementation"] = "flash_attention_2"
    if config.chat_template_jinja is not None:
        changes["chat_template"] = "jinja"
    if config.eval_sample_packing is None:
        changes["eval_sample_packing"] = config.sample_packing
    if config.fp16:
        changes["bf16"] = False
    if config.warmup_steps is None and config.warmup_ratio is None:
        changes["warmup_ratio"] = _WARMUP_RATIO
    if config.has_heldout:
        changes["eval_strategy"] = _strategy(config.eval_strategy, config.eval_steps, config.evals_per_epoch)
    return config.model_copy(update=changes)


def _settle_entry(entry: DatasetConfig) -> DatasetConfig:
    mappings = entry.message_property_mappings or MessageProperties()
    role = mappings.role or entry.message_field_role
    content = mappings.content or entry.message_field_content
    both = MessageProperties(role=role, content=content) if role or content else None
    return entry.model_copy(
        update={"message_property_mappings": both, "message_field_role": None, "message_field_content": None}
    )


def _reporters(config: TrainConfig) -> list[str]:
    if config.report_to is not None:
        return list(config.report_to)
    wants_wandb = config.wandb_project is not None and config.wandb_mode != "disabled"
    use_wandb = wants_wandb if config.use_wandb is None else config.use_wandb
    return [name for name, wanted in (("tensorboard", config.use_tensorboard), ("wandb", use_wandb)) if wanted]


def _strategy(chosen: str | None, steps: float | None, per_epoch: int | None) -> str:
    return chosen or ("epoch" if steps is None and per_epoch is None else "steps")
