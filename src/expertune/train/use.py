"""A finished run put to use: find its configuration and adapter, load both."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from expertune.errors import ConfigError
from expertune.train.config import TrainConfig, load_config
from expertune.train.model import load_adapter, load_model, load_tokenizer
from expertune.train.run import ADAPTER, RESOLVED_CONFIG
from expertune.train.saving import checkpoints
from expertune.train.sources import ADAPTER_CONFIG, adapter_folder


@dataclass(frozen=True)
class Loaded:
    """A model ready to be used. adapter: where its adapter came from, None for the plain base model."""

    model: object
    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None


# What only training needs. The machine that uses a run may lack its logger, its optimizer or the adapter it began from.
_NOT_FOR_USE = ("report_to=none", "optimizer=adamw_torch_fused", "lora_model_dir=", "lora_dropout=0")


def config_of(path: Path, overrides: list[str]) -> TrainConfig:
    """Read a configuration file, or the resolved configuration of a run folder, wherever that is by now."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; need a run's output_dir or a YAML file")
    if not path.is_dir():
        return load_config(path, overrides).config
    if not (path / RESOLVED_CONFIG).is_file():
        if (path / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"{path} is an adapter's folder; pass the run's output_dir or its YAML file, with --adapter {path}"
            )
        raise ConfigError(f"{path} is no run folder (no {RESOLVED_CONFIG}); pass a run's output_dir or a YAML file")
    config = load_config(path / RESOLVED_CONFIG, [*_NOT_FOR_USE, *overrides]).config
    return config.model_copy(update={"output_dir": str(path.absolute())})


def find_adapter(config: TrainConfig, given: Path | None) -> Path:
    """The adapter to use: the one given, else the run's final one, else that of its newest checkpoint.

    given: an adapter's folder, or a run's.
    """
    if given is not None:
        return adapter_folder("--adapter", given)
    run = Path(config.output_dir)
    if (run / ADAPTER).is_dir():
        return adapter_folder("output_dir", run / ADAPTER)
    found = checkpoints(run) if run.is_dir() else []
    if not found:
        raise ConfigError(f"{run} holds no adapter and no checkpoint: train first, or pass --adapter")
    return found[-1]


def load_for_use(config: TrainConfig, *, adapter: Path | None) -> Loaded:
    """Load the base model and, if one is given, the adapter on it, for inference."""
    tokenizer = load_tokenizer(config)
    model = load_model(config)
    return Loaded(model if adapter is None else load_adapter(model, adapter), tokenizer, adapter)
