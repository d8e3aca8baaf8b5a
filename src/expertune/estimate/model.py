"""The model of a configuration without its weights: built on the meta device, adapted by PEFT, counted exactly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from expertune.errors import ConfigError, UnsupportedModelError
from expertune.estimate.ledger import bytes_of
from expertune.layers.backends import AUTO
from expertune.layers.layout import is_experts_module, projection_names
from expertune.train.config import TrainConfig
from expertune.train.model import add_adapter
from expertune.train.sources import naming

EAGER = "eager"


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of one whole model, as torch's allocator counts them; a tied weight counts once.

    experts, others: frozen weights and buffers. expert_adapters, other_adapters: what trains. largest_layer_experts,
    largest_layer_others: of the layer that has most, frozen and trained. outside_layers: embeddings, head, last norm.
    num_parameters: of the base model. num_trainable: of the adapters. num_experts: of one layer; 1 without experts.
    """

    experts: int
    others: int
    expert_adapters: int
    other_adapters: int
    largest_layer_experts: int
    largest_layer_others: int
    outside_layers: int
    num_parameters: int
    num_trainable: int
    num_trainable_experts: int
    num_experts: int


def compute_dtype_on_gpu(config: TrainConfig) -> torch.dtype:
    """The dtype of base weights and products on a GPU that has bfloat16, which `bf16: auto` then takes."""
    if config.fp16:
        return torch.float16
    return torch.bfloat16 if config.bf16 in ("auto", True) else torch.float32


def build_on_meta(config: TrainConfig) -> PeftModel:
    """The base model of the configuration with its adapter, on the meta device: only config.json is read.

    Raises ConfigError if there is no configuration that Transformers knows, or where the adapter is refused.
    """
    folder = Path(config.base_model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"base_model: {folder} is no model's folder (no config.json)")
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    with naming("base_model", config.base_model):
        model_config = AutoConfig.from_pretrained(config.base_model, **options)
    return adapt_on_meta(model_config, config)


def adapt_on_meta(model_config: Any, config: TrainConfig) -> PeftModel:
    """The same from a configuration of Transformers that is already read; `config` says the rest."""
    if config.lora_model_dir is not None:
        raise ConfigError(
            "lora_model_dir: an adapter to go on from is not read here; say its lora_r and targets instead"
        )
    model = _bare_model(model_config, config)
    return add_adapter(model, config)


def _bare_model(model_config: Any, config: TrainConfig) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": compute_dtype_on_gpu(config), "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation == EAGER:
        options["attn_implementation"] = EAGER
    with naming("base_model", config.base_model), torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(model_config, experts_implementation=AUTO, **options)
        except UnsupportedModelError as error:
            if config.lora_target_parameters != []:
                raise ConfigError(
                    f"base_model: {error.problem}; lora_target_parameters: [] adapts attention only"
                ) from error
            model = AutoModelForCausalLM.from_config(model_config, **options)
    if config.attn_implementation not in (None, EAGER):  # its kernel may not be installed here
        model.config.get_text_config()._attn_implementation = "sdpa"
    return model


def count(model: PeftModel) -> ModelBytes:
    """Count weights and adapters, on whatever device."""
    expert_names = expert_prefixes(model)
    named = list(model.named_parameters())
    frozen = [(name, p) for name, p in named if not p.requires_grad]
    trained = [(name, p) for name, p in named if p.requires_grad]
    layers = layers_of(model)
    per_layer = [_split(layer.named_parameters(prefix=prefix), expert_names) for prefix, layer in layers]
    inside = {id(p) for _, layer in layers for p in layer.parameters()}
    experts, others = _split(frozen, expert_names)
    expert_adapters, other_adapters = _split(trained, expert_names)
    return ModelBytes(
        experts=bytes_of(experts),
        others=bytes_of(others) + bytes_of(model.buffers()),
        expert_adapters=bytes_of(expert_adapters),
        other_adapters=bytes_of(other_adapters),
        largest_layer_experts=max((bytes_of(experts) for experts, _ in per_layer), default=0),
        largest_layer_others=max((bytes_of(others) for _, others in per_layer), default=0),
        outside_layers=bytes_of(p for _, p in named if id(p) not in inside),
        num_parameters=sum(p.numel() for _, p in frozen),
        num_trainable=sum(p.numel() for _, p in trained),
        num_trainable_experts=sum(p.numel() for p in expert_adapters),
        num_experts=num_experts_of(model),
    )


def is_of_experts(name: str, expert_names: tuple[str, ...]) -> bool:
    """Whether a parameter's name is that of an expert weight or of its adapter, as `expert_prefixes` lists them."""
    return name.startswith(expert_names)


def put_on_paper(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the parameters and buffers of a model on meta by fake ones that say they are on the CPU, in place."""
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    empty = torch.empty_strided(
                        parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu"
                    )
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")


def expert_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of all parameters of experts begin with.

    PEFT wraps experts in place: what lies at or below the outermost wrapper's name belongs to them.
    """
    names = [name for name, module in model.named_modules() if is_experts_module(module)]
    return tuple(f"{name.split('.base_layer')[0]}." for name in names)


def _split(named: Any, expert_names: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    experts: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in named:
        (experts if is_of_experts(name, expert_names) else others).append(parameter)
    return experts, others


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers by name: the members of the module lists that lie in no other."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found += [(f"{name}.{index}", layer) for index, layer in enumerate(module)]
    return found


def num_experts_of(model: nn.Module) -> int:
    """The experts of one layer, of the layer with most; 1 without experts."""
    experts = (module for module in model.modules() if is_experts_module(module))
    return max((int(getattr(each, projection_names(each)[0]).shape[0]) for each in experts), default=1)
