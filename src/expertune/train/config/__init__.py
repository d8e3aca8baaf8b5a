"""The configuration of a training run: one typed tree, loaded from YAML and the command line. Imports no torch.

loaded = load_config(Path("my.yaml"), ["learning_rate=1e-4"])
loaded.config.lora_r, loaded.notes
"""

from expertune.train.config.arguments import training_arguments, wandb_environment
from expertune.train.config.describe import KeyInfo, iter_keys, json_schema, render_markdown, resolved_yaml
from expertune.train.config.load import LoadedConfig, load_config
from expertune.train.config.model_keys import DatasetConfig, MessageProperties
from expertune.train.config.schema import SECTIONS, TrainConfig
from expertune.train.config.settle import settle

__all__ = [
    "SECTIONS",
    "DatasetConfig",
    "KeyInfo",
    "LoadedConfig",
    "MessageProperties",
    "TrainConfig",
    "iter_keys",
    "json_schema",
    "load_config",
    "render_markdown",
    "resolved_yaml",
    "settle",
    "training_arguments",
    "wandb_environment",
]
