"""Tokenizer, base model and adapter, as the configuration asks for them."""

import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import expertune
from expertune.errors import ConfigError, UnsupportedModelError
from expertune.integrations.sharded_model import build_skeleton
from expertune.integrations.targets import doubled_ranks
from expertune.layers.backends import SONICMOE_ADAPTERS
from expertune.train.config import TrainConfig
from expertune.train.config.problems import nearest
from expertune.train.data import CHATML, CHATML_TOKENS
from expertune.train.sources import adapter_folder, naming


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
    with naming("tokenizer_config" if config.tokenizer_config else "base_model", source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    special = {} if config.special_tokens is None else dict(config.special_tokens)
    asked = [("special_tokens", token) for token in special.values()]
    asked += [("eot_tokens", token) for token in config.eot_tokens or ()]
    if config.chat_template == "chatml":
        asked += [("chat_template: chatml", token) for token in CHATML_TOKENS]
        tokenizer.chat_template = CHATML
    elif config.chat_template == "jinja":
        tokenizer.chat_template = config.chat_template_jinja
        _check_template(tokenizer)
    vocabulary = tokenizer.get_vocab()
    for key, token in asked:
        if token not in vocabulary:
            raise ConfigError(
                f"{key}: the tokenizer of {source} has no token {token!r}. New tokens would need new embeddings, "
                "which this version does not train; use tokens of its vocabulary."
            )
    if special:
        tokenizer.add_special_tokens(special)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: TrainConfig, *, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """Load the base model, on the GPU if there is one, with the experts on our backend.

    dtype: "auto" is that of the checkpoint; None: that of `compute_dtype`.
    """
    kwargs: dict[str, Any] = {
        "dtype": compute_dtype(config) if dtype is None else dtype,
        "trust_remote_code": config.trust_remote_code,
        "output_loading_info": True,
    }
    if config.attn_implementation:
        kwargs["attn_implementation"] = config.attn_implementation
    load = partial(AutoModelForCausalLM.from_pretrained, config.base_model, **kwargs)
    with naming("base_model", config.base_model):
        try:
            model, loading = load(experts_implementation=_experts_name(config))
        except UnsupportedModelError as error:
            if config.lora_target_parameters != []:
                raise ConfigError(
                    f"base_model: {error.problem}; lora_target_parameters: [] adapts attention only"
                ) from error
            model, loading = load()
    missing = sorted(loading["missing_keys"])
    if missing:  # Transformers fills them with random numbers
        raise ConfigError(
            f"base_model: the checkpoint in {config.base_model} is incomplete: it has no {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def model_options(config: TrainConfig) -> dict[str, Any]:
    """How a model is built from its configuration, beside its dtype."""
    options: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "experts_implementation": _experts_name(config),
    }
    return options | ({"attn_implementation": config.attn_implementation} if config.attn_implementation else {})


def load_skeleton(config: TrainConfig) -> PreTrainedModel:
    """The base model without its weights, to be spread over processes once it has an adapter."""
    with naming("base_model", config.base_model):
        try:
            model = build_skeleton(config.base_model, compute_dtype(config), **model_options(config))
        except UnsupportedModelError as error:
            raise ConfigError(f"base_model: {error.problem}; in several processes it cannot be trained") from error
        with suppress(OSError):  # a checkpoint need not have one
            model.generation_config = GenerationConfig.from_pretrained(config.base_model)
    return model


def _experts_name(config: TrainConfig) -> str:
    """What the experts are called in Transformers' interface: sonicmoe has a name for each way of its own."""
    ways = (name for name, way in SONICMOE_ADAPTERS.items() if way == config.sonicmoe_lora)
    return next(ways, config.experts_implementation)  # sonicmoe_lora is None unless they run on sonicmoe


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Wrap the model with a fresh adapter, or with the one of `lora_model_dir`, trainable.

    Raises ConfigError if nothing matches the targets, or if an expert layer was asked for and has no adapter.
    """
    if config.lora_model_dir is not None:
        peft_model = load_adapter(model, adapter_folder("lora_model_dir", Path(config.lora_model_dir)), trainable=True)
        parameters = None
    else:
        parameters = _target_parameters(model, config)
        modules = config.lora_target_modules
        _check_names(model, config)
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
    if config.lora_model_dir is not None:  # one from Transformers 4 needs the ranks that PEFT doubles for it
        problems = [line for line in problems if line not in doubled_ranks(peft_model)]
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        way_out = ""
        if config.lora_target_modules is not None:
            way_out = "\nWithout lora_target_modules attention is adapted, and the experts by lora_target_parameters"
        raise ConfigError(f"the adapter is not what was asked for:\n{lines}{way_out}")
    return peft_model


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the model."""
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except SafetensorError as error:
        raise ConfigError(f"the weights of the adapter in {folder} are damaged ({error})") from error
    except (ValueError, RuntimeError, OSError) as error:
        lines = str(error).splitlines()
        more = f"\n\t… {len(lines) - 3} more" if len(lines) > 3 else ""
        text = "\n".join(lines[:3]) + more
        raise ConfigError(f"the adapter in {folder} does not fit the base model: {text}") from error


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat_template_jinja: line {error.lineno}: {error.message}") from error
    except Exception:  # it may refuse this chat; the data are rendered row by row later
        return


def _check_names(model: PreTrainedModel, config: TrainConfig) -> None:
    """Refuse names that match nothing: PEFT does so only where nothing matches at all."""
    modules = [name for name, _ in model.named_modules()]
    linear = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    targets = config.lora_target_modules
    if (
        isinstance(targets, str)
        and targets != "all-linear"
        and not any(re.fullmatch(targets, name) for name in modules)
    ):
        raise ConfigError(
            f"lora_target_modules: the pattern {targets} matches no module; it must match the whole name, "
            f"as in .*\\.({'|'.join(linear)})"
        )
    named = [] if targets is None or isinstance(targets, str) else targets
    _check_each("lora_target_modules", "module", named, modules, linear)
    others = sorted({name.rpartition(".")[2] for name in modules if name and not name[-1].isdigit()})
    _check_each("lora_modules_to_save", "module", config.lora_modules_to_save or [], modules, others)
    parameters = [name for name, _ in model.named_parameters()]
    wanted = config.lora_target_parameters or []
    if not all(_is_in(name, parameters) for name in wanted):
        offered = _target_parameters(model, config.model_copy(update={"lora_target_parameters": None}))
        _check_each("lora_target_parameters", "parameter", wanted, parameters, offered)


def _check_each(key: str, what: str, wanted: list[str], present: list[str], offered: list[str]) -> None:
    for name in wanted:
        if not _is_in(name, present):
            near = nearest(name, offered)
            raise ConfigError(
                f"{key}: the model has no {what} called {name}; there are {', '.join(offered)}"
                + (f"; the nearest is {near}" if near else "")
            )


def _is_in(name: str, present: list[str]) -> bool:
    return any(each == name or each.endswith(f".{name}") for each in present)


def _target_parameters(model: nn.Module, config: TrainConfig) -> list[str]:
    given = config.lora_target_parameters
    if given is not None and not config.lora_router:
        return list(given)
    try:
        wanted = expertune.get_target_parameters(model, router=config.lora_router)
        if given is None:
            return wanted
        return [*given, *set(wanted).difference(expertune.get_target_parameters(model))]  # the routers'
    except ValueError as error:
        raise ConfigError(f"base_model: {error}; lora_target_parameters: [] adapts attention only") from error
