"""Tokenizer, base model and adapter, as the configuration asks for them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import expertune
from expertune.errors import ConfigError
from expertune.train.config import TrainConfig
from expertune.train.data import CHATML, CHATML_TOKENS


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the base weights: bf16 where asked for, or where `auto` finds a GPU that has it; fp16; else fp32."""
    if config.fp16:
        return torch.float16
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    use_bf16 = has_bf16 if config.bf16 == "auto" else config.bf16
    return torch.bfloat16 if use_bf16 else torch.float32


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the configuration's chat template and special tokens; it always has a pad token."""
    source = config.tokenizer_config or config.base_model
    with _naming("tokenizer_config" if config.tokenizer_config else "base_model", source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    special = {} if config.special_tokens is None else dict(config.special_tokens)
    unknown = [token for token in special.values() if token not in tokenizer.get_vocab()]
    unknown += [token for token in config.eot_tokens or () if token not in tokenizer.get_vocab()]
    if config.chat_template == "chatml":
        unknown += [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
        tokenizer.chat_template = CHATML
    elif config.chat_template == "jinja":
        tokenizer.chat_template = config.chat_template_jinja
    if unknown:
        raise ConfigError(
            f"special_tokens, eot_tokens, chat_template: the tokenizer of {source} has no token {unknown[0]!r}. "
            "New tokens would need new embeddings, which this version does not train; use tokens of its vocabulary."
        )
    if special:
        tokenizer.add_special_tokens(special)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: TrainConfig) -> PreTrainedModel:
    """Load the base model in its dtype, on the GPU if there is one, with the experts on our backend."""
    kwargs: dict[str, Any] = {"experts_implementation": config.experts_implementation}
    if config.attn_implementation:
        kwargs["attn_implementation"] = config.attn_implementation
    with _naming("base_model", config.base_model):
        model = AutoModelForCausalLM.from_pretrained(
            config.base_model,
            dtype=compute_dtype(config),
            trust_remote_code=config.trust_remote_code,
            **kwargs,
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Wrap the model with a fresh adapter, or with the one of `lora_model_dir`, trainable.

    Raises ConfigError if nothing matches the targets, or if an expert layer was asked for and has no adapter.
    """
    if config.lora_model_dir is not None:
        peft_model = load_adapter(model, Path(config.lora_model_dir), trainable=True)
        parameters = None
    else:
        parameters = _target_parameters(model, config)
        modules = config.lora_target_modules
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.peft_use_rslora,
            target_modules=expertune.get_attention_modules(model) if modules is None else modules,
            target_parameters=parameters or None,
            modules_to_save=config.lora_modules_to_save or None,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(config.seed)  # the same adapter at the start of every run of this configuration
        try:
            peft_model = get_peft_model(model, lora)
        except ValueError as error:
            raise ConfigError(f"lora_target_modules, lora_target_parameters: {error}") from error
    wanted = parameters if parameters is not None else list(peft_model.active_peft_config.target_parameters or ())
    problems = expertune.check_peft_model(peft_model, wanted)
    if problems:
        raise ConfigError("the adapter is not what was asked for:\n" + "\n".join(f"  {line}" for line in problems))
    return peft_model


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the model. folder: an adapter's, or a run's (then its `adapter` folder)."""
    folder = folder / "adapter" if (folder / "adapter" / "adapter_config.json").is_file() else folder
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} holds no adapter (no adapter_config.json)")
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"the adapter in {folder} does not fit the base model: {error}") from error


def _target_parameters(model: nn.Module, config: TrainConfig) -> list[str]:
    if config.lora_target_parameters is not None:
        return list(config.lora_target_parameters)
    try:
        return expertune.get_target_parameters(model, router=config.lora_router)
    except ValueError as error:
        raise ConfigError(f"base_model: {error}") from error


class _naming:
    """Turns what Transformers raises for a model that cannot be loaded into an error that names the key."""

    def __init__(self, key: str, source: str) -> None:
        self.key, self.source = key, source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, (OSError, ValueError, KeyError, ImportError)):
            first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(f"{self.key}: {self.source} cannot be loaded: {first_line}") from error
