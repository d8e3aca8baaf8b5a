"""MoEBlock from and to the MoE blocks of Transformers, without importing it.

Names inside of Transformers' blocks on the left, ours on the right:

    gate.weight [E, H]; gpt-oss: router.weight        router.weight
    router.bias [E] (gpt-oss)                         router.bias
    gate.e_score_correction_bias [E], a buffer        router.correction_bias; MiniMax-M2 has it on the block
    experts.gate_up_proj [E, 2I, H]                   experts.up.weight; gpt-oss: [E, H, 2I], gate and up alternating
    experts.gate_up_proj_bias [E, 2I] (gpt-oss)       experts.up.bias; gate and up alternating
    experts.down_proj [E, H, I]                       experts.down.weight; gpt-oss: [E, I, H]
    experts.down_proj_bias [E, H] (gpt-oss)           experts.down.bias
    shared_experts.{gate,up}_proj.weight [Is, H]      shared.up.weight [2 Is, H]; Qwen2-MoE: shared_expert
    shared_experts.down_proj.weight [H, Is]           shared.down.weight
    shared_expert_gate.weight [1, H] (Qwen2-MoE)      shared.gate.weight

Values are moved, never computed: a round trip is exact, and gradients convert as weights do.
Source: Transformers 5.23, models/*/modeling_*.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune.layers.activations import ActivationName, ClampedGlu, Glu, activation_named
from expertune.layers.moe_block import MoEBlock, MoEConfig
from expertune.layers.router import read_router
from expertune.ops.experts.types import Activation
from expertune.ops.routing.types import Score

ModelType = Literal["qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "glm4_moe", "minimax_m2", "gpt_oss"]
"""The `model_type` of the configurations whose blocks can be converted."""


@dataclass(frozen=True)
class _Form:
    """How an architecture's block is built.

    block: its class. score, normalize: see RoutingRule; normalize None: its configuration says (`norm_topk_prob`).
    router: its name. correction: the name of the correction bias. shared: the name of the shared experts. shared_gate:
    whether they have one. alternating: the layout of gpt-oss's experts, which comes with biases and with its gate.
    """

    block: str
    score: Score = "softmax"
    normalize: bool | None = True
    router: str = "gate"
    correction: str | None = None
    shared: str | None = None
    shared_gate: bool = False
    alternating: bool = False


def _deepseek(block: str) -> _Form:
    correction = "gate.e_score_correction_bias"
    return _Form(block, "sigmoid", None, correction=correction, shared="shared_experts")


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "qwen2_moe": _Form("Qwen2MoeSparseMoeBlock", normalize=None, shared="shared_expert", shared_gate=True),
        "qwen3_moe": _Form("Qwen3MoeSparseMoeBlock", normalize=None),
        "olmoe": _Form("OlmoeSparseMoeBlock", normalize=None),
        "mixtral": _Form("MixtralSparseMoeBlock"),
        "deepseek_v3": _deepseek("DeepseekV3MoE"),
        "glm4_moe": _deepseek("Glm4MoeMoE"),
        "minimax_m2": _Form("MiniMaxM2SparseMoeBlock", "sigmoid", correction="e_score_correction_bias"),
        "gpt_oss": _Form("GptOssMLP", "softmax_of_chosen", normalize=False, router="router", alternating=True),
    }
)


def from_transformers(block: nn.Module, model_type: ModelType | None = None) -> MoEBlock:
    """Build a MoEBlock that computes what a block of Transformers computes, with copies of its weights.

    block: `model.model.layers[i].mlp`, say; it is left as it is and shares nothing with the result. Sizes come from its
        weights; dtype, device, training mode and `requires_grad` are taken over.
    model_type: as in the model's configuration; None: what the name of the block's class says.
    Routing weights stay in fp32, where some of these blocks round them to the dtype of the model. gpt-oss's block
    returns a pair, ours the output alone.
    Raises ValueError for a block of another kind, with adapters (merge them first), or with noise on its input.
    """
    model_type = model_type or _model_type_of(block)
    theirs = {name: tensor.detach() for name, tensor in block.state_dict().items()}
    ours = from_transformers_state_dict(theirs, model_type)
    if getattr(block, "jitter_noise", 0):
        raise ValueError(f"block: router_jitter_noise is {block.jitter_noise}, need 0; a MoEBlock adds no noise")
    with torch.device("meta"):
        result = MoEBlock(_config_of(block, _form(model_type), ours))
    storages = {tensor.untyped_storage().data_ptr() for tensor in theirs.values()}
    shares = {name for name, tensor in ours.items() if tensor.untyped_storage().data_ptr() in storages}
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format) if name in shares else tensor
        for name, tensor in ours.items()
    }
    result.load_state_dict(copies, assign=True)
    trains = {name for name, parameter in block.named_parameters() if parameter.requires_grad}
    parameters = dict(result.named_parameters())
    for link in _links(_form(model_type)):
        if link.ours in parameters:
            parameters[link.ours].requires_grad_(not trains.isdisjoint(link.theirs))
    return result.train(block.training)


def from_transformers_state_dict(state: Mapping[str, Tensor], model_type: ModelType) -> dict[str, Tensor]:
    """Turn the state dict of a block of Transformers into a MoEBlock's, for `load_state_dict`.

    state: by the names inside of the block. A tensor that needs no rearrangement is passed on, or viewed, not copied.
    Raises ValueError that names what is missing and what is left over.
    """
    links = _links(_form(model_type))
    _check_names("state", state.keys(), {name for link in links for name in link.theirs}, model_type)
    return {link.ours: link.read(*(state[name] for name in link.theirs)) for link in links}


def to_transformers_state_dict(block: MoEBlock, model_type: ModelType) -> dict[str, Tensor]:
    """Turn a MoEBlock's weights into the state dict of a block of Transformers, for its `load_state_dict`.

    Tensors are detached and contiguous; one that needs no rearrangement is the block's own or a part of it, not a copy.
    What is not in a state dict is the configuration's to say: K, groups, scaling, `norm_topk_prob`, the activation.
    Raises ValueError for a block that such a block cannot be: other parts, another score or gate, adapters.
    """
    form = _form(model_type)
    if block.config.lora.given():
        places = ", ".join(block.config.lora.given())
        raise ValueError(
            f"block: has adapters ({places}), which such a state dict has no place for; merge_lora() first"
        )
    rule = block.config.rule
    if rule.score != form.score:
        raise ValueError(f"block: rule.score is {rule.score!r}, {model_type} computes {form.score!r}")
    if form.normalize is not None and rule.normalize != form.normalize:
        raise ValueError(f"block: rule.normalize is {rule.normalize}, {model_type} has {form.normalize}")
    if isinstance(activation_named(block.config.activation), ClampedGlu) != form.alternating:
        raise ValueError(f"block: activation {block.config.activation!r} is not {model_type}'s")
    ours = {name: tensor.detach() for name, tensor in block.state_dict().items()}
    links = _links(form)
    _check_names("block", ours.keys(), {link.ours for link in links}, model_type)
    return {
        name: tensor for link in links for name, tensor in zip(link.theirs, link.write(ours[link.ours]), strict=True)
    }


@dataclass(frozen=True)
class _Link:
    """One tensor of ours and its one or two of theirs; read: theirs to ours, write: ours to theirs."""

    ours: str
    theirs: tuple[str, ...]
    read: Callable[..., Tensor] = lambda tensor: tensor
    write: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)


def _links(form: _Form) -> list[_Link]:
    links = [_Link("router.weight", (f"{form.router}.weight",))]
    if form.alternating:
        links += [
            _Link("router.bias", (f"{form.router}.bias",)),
            _Link("experts.up.weight", ("experts.gate_up_proj",), _read_alternating, _write_alternating),
            _Link("experts.up.bias", ("experts.gate_up_proj_bias",), _part, lambda bias: (_alternate(bias),)),
            _Link("experts.down.weight", ("experts.down_proj",), _transpose, lambda w: (_transpose(w).contiguous(),)),
            _Link("experts.down.bias", ("experts.down_proj_bias",)),
        ]
    else:
        links += [
            _Link("experts.up.weight", ("experts.gate_up_proj",)),
            _Link("experts.down.weight", ("experts.down_proj",)),
        ]
    if form.correction is not None:
        links.append(_Link("router.correction_bias", (form.correction,)))
    if form.shared is not None:
        gate_and_up = (f"{form.shared}.gate_proj.weight", f"{form.shared}.up_proj.weight")
        links += [
            _Link("shared.up.weight", gate_and_up, lambda gate, up: torch.cat([gate, up]), lambda up: up.chunk(2)),
            _Link("shared.down.weight", (f"{form.shared}.down_proj.weight",)),
        ]
    if form.shared_gate:
        links.append(_Link("shared.gate.weight", ("shared_expert_gate.weight",)))
    return links


def _transpose(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2)


def _part(alternating: Tensor) -> Tensor:
    """[E, 2I, ...], gate and up alternating, to gate then up."""
    return torch.cat([alternating[:, ::2], alternating[:, 1::2]], dim=1)


def _alternate(parted: Tensor) -> Tensor:
    return torch.stack(parted.chunk(2, dim=1), dim=2).flatten(1, 2)


def _read_alternating(weight_EHJ: Tensor) -> Tensor:
    return _part(_transpose(weight_EHJ))


def _write_alternating(weight_EJH: Tensor) -> tuple[Tensor]:
    return (_transpose(_alternate(weight_EJH)).contiguous(),)


def _form(model_type: str) -> _Form:
    if model_type not in _FORMS:
        raise ValueError(f"model_type: got {model_type!r}, need one of {', '.join(get_args(ModelType))}")
    return _FORMS[model_type]


def _model_type_of(block: nn.Module) -> Any:
    name = type(block).__name__
    found = next((model_type for model_type, form in _FORMS.items() if form.block == name), None)
    if found is None:
        known = ", ".join(form.block for form in _FORMS.values())
        raise ValueError(f"block: got a {name}, need one of {known}; or say which it is like with model_type")
    return found


def _config_of(block: nn.Module, form: _Form, ours: Mapping[str, Tensor]) -> MoEConfig:
    num_experts, hidden, intermediate = ours["experts.down.weight"].shape
    router = read_router(block)
    if (router.logits_scaling, router.softcap, router.output_scaling) != (1.0, 0.0, 1.0):
        raise ValueError("block: scales its logits or its output, which a MoEBlock does not")
    return MoEConfig(
        hidden=hidden,
        intermediate=intermediate,
        num_experts=num_experts,
        rule=router.rule,
        activation=_activation_of(block, form),
        expert_bias="experts.up.bias" in ours,
        router_bias="router.bias" in ours,
        correction_bias="router.correction_bias" in ours,
        num_shared=int(form.shared is not None),
        shared_intermediate=ours["shared.down.weight"].shape[1] if form.shared else None,
        shared_gate=form.shared_gate,
    )


def _activation_of(block: nn.Module, form: _Form) -> ActivationName | Activation:
    experts: Any = block.experts
    if form.alternating:
        return ClampedGlu(experts.alpha, experts.limit)
    is_silu = experts.act_fn is F.silu or type(experts.act_fn).__name__ in ("SiLU", "SiLUActivation")
    return "swiglu" if is_silu else Glu(experts.act_fn)


def _check_names(what: str, got: Any, need: set[str], model_type: str) -> None:
    missing, extra = sorted(need - set(got)), sorted(set(got) - need)
    if missing:
        raise ValueError(f"{what}: lacks {', '.join(missing)}, which a block of {model_type} has")
    if extra:
        raise ValueError(f"{what}: has {', '.join(extra)}, which a block of {model_type} has no place for")
