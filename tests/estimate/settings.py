"""Configurations of tiny models without weights, for estimates."""

from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from expertune.estimate.run import Settings, load_settings
from expertune.train.config import TrainConfig


def write_config(folder: Path, model: PretrainedConfig, **changes: Any) -> Path:
    """A model's config.json and a YAML file that names it; `changes` add or replace keys."""
    model.save_pretrained(folder / "model")
    keys: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": "some/rows"}],
        "sequence_len": 64,
        "micro_batch_size": 2,
        "bf16": True,
        "lora_r": 4,
        "output_dir": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(keys | changes), encoding="utf-8")
    return path


def settings_of(folder: Path, model: PretrainedConfig, **changes: Any) -> Settings:
    return load_settings(write_config(folder, model, **changes))


def config_of(folder: Path, model: PretrainedConfig, **changes: Any) -> TrainConfig:
    return settings_of(folder, model, **changes).config
