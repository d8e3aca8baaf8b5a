"""An adapter written for an inference server: per-expert LoRA for vLLM or SGLang."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig

from expertune.errors import ConfigError
from expertune.integrations.audit import audit
from expertune.integrations.export import SERVERS, convert
from expertune.integrations.saved_adapter import SavedAdapter, open_adapter
from expertune.train.config import TrainConfig
from expertune.train.saving import check_new_folder, check_room, whole_folder
from expertune.train.sources import ADAPTER_CONFIG, naming

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportReport:
    """What was written. read: the server's version whose loader the format follows. start: how to serve it."""

    folder: Path
    read: str
    num_tensors: int
    rank: int
    notes: list[str]
    start: str


def export(config: TrainConfig, adapter: Path, output: Path, server: str) -> ExportReport:
    """Write the adapter into a new folder as `server` ("vllm" or "sglang") loads it. The base weights are not needed.

    Raises ConfigError, before anything is written, if `output` exists or cannot be written, if the adapter is not
    whole or is of another model, or if the server cannot serve it.
    """
    check_new_folder("--output", output)
    saved = open_saved(config, adapter)
    problems = audit(saved).problems
    if problems:
        lines = "\n".join(f"  {line}" for line in problems[:10])
        raise ConfigError(f"the adapter in {adapter} is not whole, or does not fit the base model:\n{lines}")
    exported = convert(saved, server)
    check_room("--output", output, sum(tensor.nbytes for tensor in exported.tensors.values()), "exported adapter")
    with whole_folder(output) as folder:
        save_file(exported.tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(exported.config, indent=2) + "\n", encoding="utf-8")
    return ExportReport(
        folder=output,
        read=SERVERS[server].read,
        num_tensors=len(exported.tensors),
        rank=exported.rank,
        notes=exported.notes,
        start=exported.start.replace("{folder}", str(output)),
    )


def open_saved(config: TrainConfig, adapter: Path) -> SavedAdapter:
    """Read an adapter against the configuration's base model, of which only config.json is read."""
    with naming("base_model", config.base_model):
        AutoConfig.from_pretrained(config.base_model, trust_remote_code=config.trust_remote_code)
    try:
        return open_adapter(adapter, config.base_model, trust_remote_code=config.trust_remote_code)
    except SafetensorError as error:
        raise ConfigError(f"the weights of the adapter in {adapter} are damaged ({error})") from error
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"the adapter in {adapter} does not fit the base model: {first_line}") from error
