"""A model spread over processes: shapes first, then the adapter as one process would start it, then each one's share.

1. `build_skeleton`: the whole model without its weights. Every weight is one zero, expanded to the weight's shape: it
   takes no memory, and PEFT can wrap it.
2. The caller adds the adapter to it. PEFT draws the same random numbers, in the same order, as in one process.
3. `spread_model`: every experts module keeps its own experts' adapters; the base weights are read from the checkpoint,
   layer by layer; FSDP2 cuts each layer as soon as it is there.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from expertune.distributed.deep_ep import open_deep_ep
from expertune.distributed.dispatch import AllToAll, ExpertShard, Transport
from expertune.distributed.mesh import EXPERT, SHARD, ParallelMesh
from expertune.distributed.parameters import Cut, ShardedParameter, cut_experts
from expertune.distributed.sizes import local_experts
from expertune.errors import ConfigError
from expertune.integrations import experts as experts_integration
from expertune.integrations.checkpoint_slices import fill_in_parts
from expertune.integrations.saved_adapter import PREFIX
from expertune.layers.backends import IMPLEMENTATIONS
from expertune.layers.layout import is_experts_module, projection_names, read_projection

Fill = Callable[[nn.Module, str, torch.dtype, torch.device, range, int], Iterator[set[str]]]
"""As `fill_in_parts`."""


def build_skeleton(base_model: str, dtype: torch.dtype, **options: Any) -> Any:
    """The model of a checkpoint with zeros for weights that take no memory. Buffers are real.

    options: of `AutoModelForCausalLM.from_config`, such as experts_implementation.
    Raises ConfigError for a quantised checkpoint.
    """
    model = _empty_model(base_model, dtype, options)
    model.tie_weights()
    zeros_of: dict[int, nn.Parameter] = {}  # shared weights stay shared
    for name, parameter in list(_each_parameter(model)):
        if id(parameter) not in zeros_of:
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            zeros_of[id(parameter)] = nn.Parameter(zeros, requires_grad=parameter.is_floating_point())
            setattr(zeros_of[id(parameter)], _PLACEHOLDER, True)
        _put(model, name, zeros_of[id(parameter)])
    return model


def spread_model(
    peft_model: Any,
    base_model: str,
    dtype: torch.dtype,
    mesh: ParallelMesh,
    device: torch.device,
    *,
    fill: Fill = fill_in_parts,
    deep_ep: bool = False,
    **options: Any,
) -> list[ShardedParameter]:
    """Leave each process with its share of a skeleton with an adapter, on `device`; returns what trains, in order.

    fill: what gives the weights their values, part by part. deep_ep: carry tokens by DeepEP.
    options: as given to `build_skeleton`.
    Every process must call it. Raises ConfigError if experts do not divide, if the checkpoint lacks a weight, or if
    DeepEP cannot be used.
    """
    num_experts = deal_out_experts(peft_model, mesh, deep_ep=deep_ep)
    source = _empty_model(base_model, dtype, options)
    cut_experts_modules(source, mesh)
    each = num_experts // mesh.sizes.expert
    own = range(mesh.index(EXPERT) * each, (mesh.index(EXPERT) + 1) * each)
    layers = _layers(peft_model)
    if mesh.sizes.shard > 1 and not layers:
        raise ConfigError(
            f"dp_shard_size: the layers of {type(source).__name__} are not recognised, so its weights cannot be "
            "sharded; need 1"
        )
    for filled in fill(source, base_model, dtype, device, own, num_experts):
        _move_over(source, peft_model, filled)
        for name, layer in list(layers.items()):
            if not _placeholders(layer):
                _settle(layer, mesh, device)
                del layers[name]
    missing = sorted(_plain(name) for name in _placeholders(peft_model))
    if missing:
        raise ConfigError(
            f"base_model: the checkpoint in {base_model} is incomplete: it has no {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    _settle(peft_model, mesh, device)
    if mesh.sizes.shard > 1:
        # generate goes around the forward of this, the outermost model, which gathers what is in no layer.
        register_fsdp_forward_method(peft_model, "generate")
    return trainable_parameters(peft_model, mesh)


def _move_over(source: nn.Module, peft_model: nn.Module, filled: Iterable[str]) -> None:
    """Take the weights and buffers that have their values out of `source`, into their places in the PEFT model."""
    places: dict[str, nn.Parameter] = {_plain(name): p for name, p in _placeholders(peft_model).items()}
    shared: dict[int, list[str]] = {}
    for name, parameter in _placeholders(peft_model).items():
        shared.setdefault(id(parameter), []).append(name)
    plain_names = {_plain(name): name for name, _ in peft_model.named_modules()}
    for name in filled:
        owner_name, _, own = name.rpartition(".")
        owner = source.get_submodule(owner_name)
        if own in owner._buffers:
            peft_model.get_submodule(plain_names[owner_name])._buffers[own] = owner._buffers[own]
        elif name in places and (value := owner._parameters[own]) is not None and not value.is_meta:
            for place in shared[id(places[name])]:
                _put(peft_model, place, nn.Parameter(value.detach(), requires_grad=False))
            owner._parameters[own] = nn.Parameter(value.detach().to("meta"), requires_grad=False)


def _settle(module: nn.Module, mesh: ParallelMesh, device: torch.device) -> None:
    """Bring what is not there yet to the device, and let FSDP2 cut all that no module inside was cut for."""
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = buffer.to(device)
        for parameter in each._parameters.values():
            if parameter is not None and parameter.device.type != device.type:
                parameter.data = parameter.data.to(device)
    if mesh.sizes.shard > 1:
        fully_shard(module, mesh=mesh.mesh[SHARD])


def trainable_parameters(peft_model: Any, mesh: ParallelMesh) -> list[ShardedParameter]:
    """What trains, in the model's order, each with how the expert axis cuts it."""
    cuts: dict[str, tuple[Cut, int]] = {}
    if mesh.sizes.expert > 1:
        for name, wrapper in _wrappers_of_experts(peft_model):
            whole = wrapper.num_experts * mesh.sizes.expert
            for adapter in wrapper.lora_A:
                cuts[f"{name}.lora_A.{adapter}.weight"] = (Cut.EXPERT_SLOWEST, whole)
                cuts[f"{name}.lora_B.{adapter}.weight"] = (Cut.EXPERT_FASTEST, whole)
    return [
        ShardedParameter(name, parameter, *cuts.get(name, (Cut.NONE, 0)))
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    ]


def deal_out_experts(peft_model: Any, mesh: ParallelMesh, *, deep_ep: bool = False) -> int:
    """Give every experts module its `ExpertShard`, and cut the adapters on it; returns the experts of a layer, or 0."""
    sizes = mesh.sizes
    found = [(_plain(name), module) for name, module in peft_model.named_modules() if is_experts_module(module)]
    counts = {getattr(module, projection_names(module)[0]).shape[0] for _, module in found}
    if sizes.expert == 1:
        return max(counts, default=0)
    if not found:
        raise ConfigError("expert_parallel_size: the model has no experts in Transformers' experts interface; need 1")
    if len(counts) > 1:
        raise ConfigError(
            f"expert_parallel_size: layers have different numbers of experts ({', '.join(map(str, sorted(counts)))}); "
            "need 1"
        )
    for _, module in found:
        implementation = getattr(module.config, "_experts_implementation", None)
        if implementation not in IMPLEMENTATIONS:
            raise ConfigError(
                f"experts_implementation: got {implementation}, which cannot share experts among processes; need one "
                f"of {', '.join(IMPLEMENTATIONS)}, or expert_parallel_size: 1"
            )
    num_experts = max(counts)
    num_local = local_experts(num_experts, sizes, found[0][0])
    transport = _open_deep_ep([module for _, module in found], mesh, num_local) if deep_ep else AllToAll()
    for name, module in found:
        shard = ExpertShard(mesh.wire(EXPERT, name), mesh.index(EXPERT), num_local, transport)
        setattr(module, experts_integration.SHARD, shard)
    for _, wrapper in _wrappers_of_experts(peft_model):
        whole = wrapper.num_experts
        for adapter in wrapper.lora_A:
            for linear, cut in (
                (wrapper.lora_A[adapter], Cut.EXPERT_SLOWEST),
                (wrapper.lora_B[adapter], Cut.EXPERT_FASTEST),
            ):
                weight = linear.weight
                part = cut_experts(weight.detach(), cut, whole, mesh.index(EXPERT), sizes.expert).clone()
                linear.weight = nn.Parameter(part, requires_grad=weight.requires_grad)
                linear.out_features, linear.in_features = part.shape
        wrapper.num_experts = whole // sizes.expert
    return num_experts


def _open_deep_ep(modules: list[nn.Module], mesh: ParallelMesh, num_local: int) -> Transport:
    widths = set()
    for module in modules:
        up, down = (read_projection(module, name, None).weight_EYX for name in projection_names(module))
        widths |= {up.shape[2], down.shape[1]}  # of the tokens that go out, of the results that come back
    return open_deep_ep(mesh.wire(EXPERT, "the model"), num_local=num_local, widths=widths, dtype=up.dtype)


def cut_experts_modules(model: nn.Module, mesh: ParallelMesh) -> None:
    """Shrink the experts of a model on the meta device to those that one process owns."""
    if mesh.sizes.expert == 1:
        return
    for module in model.modules():
        if is_experts_module(module):
            stacked = {f"{name}{suffix}" for name in projection_names(module) for suffix in ("", "_bias")}
            for name, parameter in list(module.named_parameters(recurse=False)):
                if name in stacked:
                    shape = (parameter.shape[0] // mesh.sizes.expert, *parameter.shape[1:])
                    setattr(module, name, nn.Parameter(parameter.new_empty(shape), requires_grad=False))


def _empty_model(base_model: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The model with its parameters on the meta device and its buffers on the CPU, as they start."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base_model, trust_remote_code=options.get("trust_remote_code", False))
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"base_model: {base_model} is quantised, which several processes cannot load yet; use one process, or a "
            "checkpoint in bf16"
        )
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


_PLACEHOLDER = "expertune_placeholder"


def _each_parameter(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Also those that several modules share, each time."""
    return model.named_parameters(remove_duplicate=False)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, parameter)


def _plain(name: str) -> str:
    return name.replace(".base_layer", "").removeprefix(PREFIX)


def _placeholders(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that have no values yet, by name."""
    return {name: p for name, p in _each_parameter(module) if getattr(p, _PLACEHOLDER, False)}


def _wrappers_of_experts(peft_model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in peft_model.named_modules():
        if type(module).__name__ == "ParamWrapper" and is_experts_module(module.get_base_layer()):
            yield name, module


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers, none inside another: what FSDP2 gathers at a time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in layers)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            layers[name] = module
    return layers
