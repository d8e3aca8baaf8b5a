"""Folders of models and adapters, checked before anything large is read from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig

from expertune.errors import ConfigError
from expertune.train.config import TrainConfig

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer*", "vocab.*", "*.model", "tekken.json")  # any of them; which one depends on the tokenizer


def check_base_model(config: TrainConfig) -> None:
    """Raise ConfigError unless the base model has a configuration that Transformers knows, and a tokenizer."""
    folder = Path(config.base_model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = ""
        if (folder / ADAPTER_CONFIG).is_file():
            hint = "; it holds an adapter, which goes into lora_model_dir, with the model it belongs to as base_model"
        raise ConfigError(f"base_model: {folder} is no model's folder (no config.json){hint}")
    with naming("base_model", config.base_model):
        AutoConfig.from_pretrained(config.base_model, trust_remote_code=config.trust_remote_code)
    folder = Path(config.tokenizer_config or config.base_model)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER):
        key = "tokenizer_config" if config.tokenizer_config else "base_model"
        raise ConfigError(f"{key}: {folder} has no tokenizer; say tokenizer_config: FOLDER, or the hub id that has it")


def adapter_folder(key: str, folder: Path) -> Path:
    """The folder with a saved adapter. key: what a message calls it. folder: an adapter's, or a run's."""
    if not (folder / ADAPTER_CONFIG).is_file() and (folder / "adapter" / ADAPTER_CONFIG).is_file():
        folder = folder / "adapter"
    need = "need the folder of an adapter, a checkpoint or a run"
    if not folder.exists():
        raise ConfigError(f"{key}: {folder} does not exist; {need}")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{key}: {folder} holds no adapter (no {ADAPTER_CONFIG}); {need}")
    if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise ConfigError(f"{key}: {folder} holds an adapter without its weights (no {_ADAPTER_WEIGHTS[0]})")
    return folder


@contextmanager
def naming(key: str, source: str) -> Iterator[None]:
    """Turn what Transformers raises for a model that cannot be loaded into an error that names the key."""
    try:
        yield
    except SafetensorError as error:
        raise ConfigError(
            f"{key}: the weights in {source} are damaged ({error}); copy or download them again"
        ) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{key}: {source} cannot be loaded: {first_line}") from error
