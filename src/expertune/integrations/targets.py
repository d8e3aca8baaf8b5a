"""What to adapt in a Mixture-of-Experts model, and a check that it was adapted.

`target_modules="all-linear"` cannot see experts (they are 3-D parameters, not Linear modules) and on some models it
hits the router instead. These functions read the model, not its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expertune.layers.layout import is_experts_module, projection_names


def get_target_parameters(model: nn.Module, *, router: bool = False) -> list[str]:
    """Name the parameters to pass to PEFT as `target_parameters`, so that every expert is adapted.

    router: also adapt the routers' weights. Returns suffixes such as "mlp.experts.gate_up_proj", sorted.
    Raises ValueError if the model has no experts, or only such that are not in the form of Transformers' interface, and
    if the router was asked for and none is recognised.
    """
    experts = [(name, module) for name, module in _plain_modules(model) if is_experts_module(module)]
    strangers = [] if experts else [name for name, _ in _undecorated_experts(model)]  # beside them, shared experts
    if strangers:
        raise ValueError(
            f"{type(model).__name__}: {strangers[0]} ({len(strangers)} such) stores experts outside of Transformers' "
            "experts interface, so no expert backend applies to it; adapt attention only (target_parameters=[])"
        )
    if not experts:
        raise ValueError(f"{type(model).__name__} has no experts: it is not a Mixture-of-Experts model")
    targets = {f"{_suffix(name)}.{parameter}" for name, module in experts for parameter in projection_names(module)}
    if router:
        found = {f"{_suffix(name)}.weight" for name, _, _ in routers(model)}
        if not found:
            raise ValueError(f"{type(model).__name__}: its router is none that is recognised; name its weight yourself")
        targets |= found
    return sorted(targets)


def get_attention_modules(model: nn.Module) -> list[str]:
    """Name the Linear modules of the attention blocks, for PEFT's `target_modules`: ["k_proj", "o_proj", ...]."""
    names = set()
    for _, module in _plain_modules(model):
        if "attention" in type(module).__name__.lower():
            names |= {name.split(".")[-1] for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    return sorted(names)


OTHER = "other"
PARTS = ("experts", "attention", "router", "shared experts", "dense mlp", "embeddings and head", OTHER)
"""The parts of a model, in the order of the table."""


@dataclass(frozen=True)
class TrainableRow:
    """One line of the table of what trains: a part of the model, its layers and its parameter counts."""

    part: str
    num_modules: int
    num_adapted: int
    num_parameters: int
    num_trainable: int


def summarise_trainable(model: nn.Module) -> list[TrainableRow]:
    """Count, for each part of the model (experts, attention, routers, ...), what there is and what trains."""
    owners = _parts_by_module(model)
    parts: dict[str, dict[str, list[int]]] = {}
    for name, parameter in model.named_parameters():
        module = _plain_name(name).split(".lora_")[0]
        owner = next((prefix for prefix in _prefixes(module) if prefix in owners), module)
        counts = parts.setdefault(owners.get(owner, OTHER), {}).setdefault(owner, [0, 0])
        is_adapter = ".lora_" in name or ".modules_to_save." in name
        counts[0] += 0 if is_adapter else parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    return [
        TrainableRow(
            part=part,
            num_modules=len(modules),
            num_adapted=sum(trainable > 0 for _, trainable in modules.values()),
            num_parameters=sum(total for total, _ in modules.values()),
            num_trainable=sum(trainable for _, trainable in modules.values()),
        )
        for part in PARTS
        if (modules := parts.get(part))
    ]


def check_peft_model(model: nn.Module, target_parameters: list[str] | None = None) -> list[str]:
    """List what is wrong with a PEFT model's adapters on experts; an empty list is good.

    target_parameters: the suffixes that were asked for; None: both projections of every expert.
    Finds: an expert projection without a trainable adapter; experts outside of Transformers' experts interface, to
    which no backend applies; a rank that PEFT doubled (`doubled_ranks`); a router's base weight that trains, and a
    router whose adapter nobody named: PEFT adds one where `target_modules` is "all-linear", or is a list with the name
    that the router had in Transformers 4.
    """
    strangers = [] if any(_experts_with_wrappers(model)) else [name for name, _ in _undecorated_experts(model)]
    if target_parameters is not None:
        wanted = tuple(target_parameters)
    else:
        wanted = () if strangers else tuple(get_target_parameters(model))
    problems = []
    if strangers and (target_parameters is None or target_parameters):
        problems += [f"{name} is outside of Transformers' experts interface: no expert backend applies to it"
                     for name in strangers]  # fmt: skip
    for name, experts, wrappers in _experts_with_wrappers(model):
        for parameter in projection_names(experts):
            if not f"{name}.{parameter}".endswith(tuple(f".{target}" for target in wanted)):
                continue
            wrapper = wrappers.get(parameter)
            if wrapper is None:
                problems.append(f"{name}.{parameter} was asked for and has no adapter")
            elif not all(weight.requires_grad for weight in _adapter_weights(wrapper)):
                problems.append(f"{name}.{parameter} has an adapter that is frozen")
    problems += doubled_ranks(model)
    for name, router, _ in routers(model):
        problems += [
            f"{name}.{own}: the router's own weight is trainable"
            for own, weight in router.named_parameters(recurse=False)
            if weight.requires_grad
        ]
        if _is_adapted(model, name) and not _router_was_named(model, name, wanted):
            problems.append(
                f"{name}: the router has an adapter that nobody named. PEFT adds it for target_modules that are "
                f'"all-linear" or have its old name; if you want it, ask for {_suffix(name)}.weight'
            )
    return problems


def doubled_ranks(model: nn.Module) -> list[str]:
    """List the expert projections whose adapters do not have the rank of their configuration.

    PEFT (0.21) turns `target_modules` with the experts' old names (gate_proj and up_proj, or w1 and w3; "all-linear" is
    taken to contain them) into the stacked parameter, doubles its rank and alpha, and writes both into the
    configuration's patterns. That is right for an adapter from Transformers 4, and is not what a new one was asked for.
    """
    from peft.utils.other import get_pattern_key

    problems = []
    for name, _, wrappers in _experts_with_wrappers(model):
        for parameter, wrapper in wrappers.items():
            for adapter, rank in wrapper.r.items():
                config: Any = getattr(model, "peft_config", {}).get(adapter)
                if config is None:
                    continue
                patterns = config.rank_pattern
                key = get_pattern_key(patterns.keys(), f"{name}.{parameter}")
                is_pefts_own = key == rf".*\.{parameter}" and patterns.get(key) in (2 * config.r, 3 * config.r)
                asked = config.r if is_pefts_own else patterns.get(key, config.r)
                if rank != asked:
                    problems.append(
                        f"{name}.{parameter} has rank {rank} where {asked} was asked for"
                        + (
                            ": PEFT multiplied it, as target_modules name the stacked projections"
                            if is_pefts_own
                            else ""
                        )
                    )
    return problems


def _is_adapted(model: nn.Module, name: str) -> bool:
    """Whether PEFT has put an adapter around or into the module with this plain name."""
    return any(plain == f"{name}.lora_A" for plain, _ in _plain_modules(model))


def _router_was_named(model: nn.Module, name: str, wanted: tuple[str, ...]) -> bool:
    configs = list(getattr(model, "peft_config", {}).values())
    parameters = {each for config in configs for each in getattr(config, "target_parameters", None) or ()}
    parameters -= {"gate.weight"}  # PEFT's own word for it, where it turned target_modules into parameters
    modules = {
        each
        for config in configs
        if isinstance(targets := getattr(config, "target_modules", None), (set, list, tuple))
        for each in targets
    } - {name}  # a whole name is what "all-linear" becomes
    matches = [f"{name}.weight".endswith(f".{each}") for each in {*wanted, *parameters}]
    return any(matches) or any(name.endswith(f".{each}") for each in modules)


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by the names they have without PEFT around them."""
    for name, module in model.named_modules():
        yield _plain_name(name), module


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "").removeprefix("base_model.model.")


def _experts_with_wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Every experts module with the ParamWrappers around it, by parameter name."""
    wrappers: dict[str, dict[str, Any]] = {}
    for name, module in _plain_modules(model):
        if type(module).__name__ == "ParamWrapper":
            wrappers.setdefault(name, {})[str(module.parameter_name)] = module
        elif is_experts_module(module):
            yield name, module, wrappers.get(name, {})


def _adapter_weights(wrapper: Any) -> list[Tensor]:
    return [
        weights[adapter].weight
        for weights in (wrapper.lora_A, wrapper.lora_B)
        for adapter in wrapper.active_adapters
        if adapter in weights
    ]


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """The routers: siblings of an experts module that hold a 2-D weight [experts, hidden]; each with its experts."""
    modules = dict(_plain_modules(model))
    seen = set()
    for name, module in list(modules.items()):
        if not is_experts_module(module):
            continue
        block = name.rpartition(".")[0]
        num_experts = getattr(module, projection_names(module)[0]).shape[0]
        for sibling in ("gate", "router", "router.layer", "router.gate", "router.proj", "gate.wg"):
            router = modules.get(f"{block}.{sibling}")
            weight = getattr(router, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == num_experts:
                if id(router) not in seen and isinstance(router, nn.Module):
                    seen.add(id(router))
                    yield f"{block}.{sibling}", router, module
                break


def _undecorated_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold 3-D expert weights without the flags of the experts interface (llama4, dbrx, ...)."""
    for name, module in _plain_modules(model):
        if is_experts_module(module) or type(module).__name__ == "ParamWrapper":
            continue
        names = {key for key, value in module.named_parameters(recurse=False) if value.dim() == 3}
        if "expert" in type(module).__name__.lower() and names:
            yield name, module


def _suffix(name: str) -> str:
    """The part of a module's name after its layer number: "model.layers.3.mlp.experts" gives "mlp.experts"."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _parts_by_module(model: nn.Module) -> dict[str, str]:
    """The modules that are a part of the model by themselves, by plain name; what lies inside belongs to them."""
    parts = {}
    for name, module in _plain_modules(model):
        words = name.lower().split(".")
        if is_experts_module(module):
            parts[name] = "experts"
        elif words[-1] in ("shared_expert", "shared_experts", "shared_mlp", "shared_expert_gate"):
            parts[name] = "shared experts"
        elif "attention" in type(module).__name__.lower():
            parts[name] = "attention"
        elif isinstance(module, nn.Embedding) or words[-1] == "lm_head":
            parts[name] = "embeddings and head"
        elif words[-1] in ("mlp", "feed_forward"):
            parts[name] = "dense mlp"
    return parts | {name: "router" for name, _, _ in routers(model)}


def _prefixes(name: str) -> Iterator[str]:
    """The name and the names of the modules around it, innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]
