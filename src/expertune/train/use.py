"""A finished run put to use: find its configuration and adapter, load both."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from expertune.errors import ConfigError
from expertune.train.config import TrainConfig, load_config
from expertune.train.model import load_adapter, load_model, load_tokenizer
from expertune.train.run import ADAPTER, RESOLVED_CONFIG
from expertune.train.saving import checkpoints


@dataclass(frozen=True)
class Loaded:
    """A model ready to be used. adapter: where its adapter came from, None for the plain base model."""

    model: object
    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None


def config_of(path: Path, overrides: list[str]) -> TrainConfig:
    """Read a configuration file, or the resolved configuration of a run folder."""
    if path.is_dir():
        resolved = path / RESOLVED_CONFIG
        if not resolved.is_file():
            raise ConfigError(f"{path} is no run folder (no {RESOLVED_CONFIG}); pass a run's output_dir or a YAML file")
        path = resolved
    return load_config(path, overrides).config


def find_adapter(config: TrainConfig, given: Path | None) -> Path:
    """The adapter to use: the one given, else the run's final one, else that of its newest checkpoint."""
    if given is not None:
        return given
    run = Path(config.output_dir)
    if (run / ADAPTER).is_dir():
        return run / ADAPTER
    found = checkpoints(run) if run.is_dir() else []
    if not found:
        raise ConfigError(f"{run} holds no adapter and no checkpoint: train first, or pass --adapter")
    return found[-1]


def load_for_use(config: TrainConfig, *, adapter: Path | None) -> Loaded:
    """Load the base model and, if one is given, the adapter on it, for inference."""
    tokenizer = load_tokenizer(config)
    model = load_model(config)
    return Loaded(model if adapter is None else load_adapter(model, adapter), tokenizer, adapter)
