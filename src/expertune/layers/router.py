"""A Transformers-style MoE block's router, read as a `RoutingRule` and a few tensors.

Routers differ in how they choose and weigh, and keep their numbers in different places. Most of it is in attributes,
which are read by name from the gate, the block or a configuration. A gate with `top_k` chooses by itself: then no
configuration is asked, and a scaling that only the block has is one of the experts' output. What no attribute says is
in `_HABITS`, by the beginning of a class's name. What cannot be read raises ValueError. Where neither attribute nor
habit says otherwise,

- scores are softmax, or sigmoid where a correction bias is found;
- the weights are normalised, with an epsilon of 1e-20 after a sigmoid or groups;
- there is one group, and the scaling is 1.

Adapters that PEFT put around a gate are seen through: they are returned beside the weight, never in it.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expertune.layers.layout import lora_from_peft
from expertune.ops.experts.types import ExpertLora
from expertune.ops.routing.router import router_logits
from expertune.ops.routing.types import RoutingRule, Score

TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
NUM_GROUPS = ("num_group", "n_group")
TOP_GROUPS = ("topk_group",)
NORMALIZE = ("norm_topk_prob",)
EPSILON = ("norm_topk_prob_eps",)
SCALING = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
OUTPUT_SCALING = ("routed_scaling_factor", "moe_routed_scaling_factor")
LOGITS_SCALING = ("output_multiplier",)
SOFTCAP = ("router_logit_softcapping",)
CORRECTION = ("e_score_correction_bias", "moe_statics.e_score_correction_bias", "expert_bias")
"""The names of each number: the first that is found counts."""

GATES = ("gate", "router")
LINEARS = ("", "gate", "wg", "layer")
"""Where a gate keeps its weight: itself, or a Linear in it."""


@dataclass(frozen=True)
class Router:
    """What a router computes with.

    weight_EH: [E, H], without adapters. bias_E: [E] or None, of the logits. correction_E: [E] or None, added for the
    choice alone. loras: a [1, R, H] and b [1, E, R] each. rule: how it chooses and weighs. logits_scaling: the factor
    of the logits. softcap: c in `c tanh(logits / c)`, 0 for none. output_scaling: what the block multiplies the
    experts' output by, beside the weights.
    """

    weight_EH: Tensor
    rule: RoutingRule
    bias_E: Tensor | None = None
    correction_E: Tensor | None = None
    loras: tuple[ExpertLora, ...] = ()
    logits_scaling: float = 1.0
    softcap: float = 0.0
    output_scaling: float = 1.0

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, E], in fp32 (fp64 where the hidden states or the weight are fp64)."""
        logits_TE = router_logits(hidden_TH, self.weight_EH, self.bias_E, loras=self.loras)
        if self.logits_scaling != 1.0:
            logits_TE = logits_TE * self.logits_scaling
        if self.softcap > 0:
            logits_TE = torch.tanh(logits_TE / self.softcap) * self.softcap
        return logits_TE


@dataclass(frozen=True)
class _Habit:
    """What a family of routers does that no attribute says. classes: how the name of the gate or the block begins."""

    classes: str
    score: Score | None = None
    normalize: bool | None = None
    epsilon: float | None = None
    other_groups: float | None = None
    divides_by_top_k: bool = False


_HABITS = (
    _Habit("Aria|GraniteMoe|GptOss", score="softmax_of_chosen"),
    _Habit("OpenAIPrivacyFilter", score="softmax_of_chosen", divides_by_top_k=True),  # which the block takes back
    _Habit("Kolibri1", score="sigmoid_of_chosen", epsilon=0.0),
    _Habit("Ernie4_5", score="softmax", epsilon=0.0),  # its clamp of the sum, at 1e-12, is no epsilon
    _Habit("Jamba", normalize=False),
    _Habit("Flint", score="sigmoid", epsilon=0.0),
    _Habit("Lfm2", score="sigmoid", epsilon=1e-6),
    _Habit("MiniMaxM2|MiniMaxM3|Laguna", epsilon=0.0),
    _Habit("AXK2", other_groups=0.0),
)

_REFUSED = {
    "(?i:phi-?moe)": "it chooses by sparsemixer, one expert after another",
    "Inkling(Topk|MoE|Moe)": "its weights are divided by a sum that has the shared experts in it",
    "Gemma4|DiffusionGemma": "it is a network of its own: a norm and scales around its linear, and a scale per expert",
    "Zaya": "it is a network of its own, which passes a state from layer to layer",
    "DeepseekV4Hash": "it chooses by token id (tid2eid), not by hidden states",
}
"""Routers that are no rule over logits, with the reason."""


def read_router(block: Any) -> Router:
    """Read the router of a Transformers-style MoE block: cheap, without a copy or a host synchronisation.

    block: has `gate` or `router`; adapters of PEFT around it are seen through.
    Raises ValueError, naming the attribute, if something is missing, and with the reason for a router that is no rule
    over logits: Phi-MoE, Inkling, Gemma 4, Zaya, DeepSeek-V4's hash layers.
    """
    wrapped = _find((block,), GATES)
    if wrapped is None:
        raise ValueError(f"{type(block).__name__}: neither gate nor router, need one")
    gate, loras = see_through(wrapped)
    names = (type(gate).__name__, type(block).__name__)
    for pattern, reason in _REFUSED.items():
        if any(re.match(pattern, name) for name in names):
            raise ValueError(f"{names[0]} cannot be routed: {reason}")
    linear, more = _linear(gate)
    weight_EH: Tensor = linear.weight
    num_experts = weight_EH.shape[0]

    said = _find((gate, block), NUM_EXPERTS)
    if isinstance(said, int) and said != num_experts:
        raise ValueError(f"{names[0]}: weight has {num_experts} rows, but num_experts is {said}")

    chooses_itself = _find((gate,), TOP_K) is not None
    asked = (gate, block) if chooses_itself else (gate, block, *_configs(gate, block))
    correction = None if getattr(gate, "use_expert_bias", True) is False else _find((gate, block), CORRECTION)
    habit = next((each for each in _HABITS if any(re.match(each.classes, name) for name in names)), _Habit(""))
    rule = _read_rule(names[0], asked, habit, correction is not None)
    scaling = _or(_find((gate,) if chooses_itself else asked, SCALING), 1.0)
    output_scaling = _or(_find((block,), OUTPUT_SCALING) if chooses_itself else None, 1.0)
    if habit.divides_by_top_k:
        scaling, output_scaling = scaling / rule.top_k, output_scaling * rule.top_k
    rule = replace(rule, scaling=float(scaling))
    rule.check(num_experts)
    return Router(
        weight_EH=weight_EH,
        rule=rule,
        bias_E=getattr(linear, "bias", None),
        correction_E=None if correction is None else correction.reshape(-1),
        loras=(*loras, *more),
        logits_scaling=float(_or(_find((gate,), LOGITS_SCALING), 1.0)),
        softcap=float(_or(_find((gate,), SOFTCAP), 0.0)),
        output_scaling=float(output_scaling),
    )


def see_through(module: Any) -> tuple[Any, tuple[ExpertLora, ...]]:
    """The module inside of PEFT's wrappers, and the adapters of its weight that are active and not merged.

    Raises ValueError for what is no second linear: DoRA and its like, a bias of the adapter, dropout in training, and
    an adapter of another parameter than `weight`.
    """
    loras: list[ExpertLora] = []
    while True:
        if hasattr(module, "modules_to_save"):  # trained in full: a copy for each adapter, which stands in
            names = () if module.disable_adapters else module.active_adapters[:1]
            copies = [module.modules_to_save[name] for name in names if name in module.modules_to_save]
            module = copies[0] if copies else module.original_module
        elif hasattr(module, "base_layer"):
            loras += _active_loras(module)
            module = module.base_layer
        else:
            return module, tuple(loras)


def _active_loras(wrapper: Any) -> list[ExpertLora]:
    if wrapper.disable_adapters or wrapper.merged:
        return []
    kind = type(wrapper).__name__
    if not hasattr(wrapper, "lora_A"):
        raise ValueError(f"{kind} of a router is no LoRA")
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if names and getattr(wrapper, "parameter_name", "weight") != "weight":
        raise ValueError(f"{kind} of a router adapts {wrapper.parameter_name}, need weight")
    for name in names:
        if name in wrapper.lora_variant:
            variant = type(wrapper.lora_variant[name]).__name__
            raise ValueError(f"the adapter {name!r} of a router is a {variant}, need plain LoRA")
        if wrapper.lora_B[name].bias is not None:
            raise ValueError(f"the adapter {name!r} of a router has a bias (lora_bias), need none")
        if wrapper.training and getattr(wrapper.lora_dropout[name], "p", 0.0) > 0:
            raise ValueError(f"the adapter {name!r} of a router has lora_dropout, need 0")
    return [
        lora_from_peft(wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, 1, float(wrapper.scaling[name]))
        for name in names
    ]


def _linear(gate: Any) -> tuple[Any, tuple[ExpertLora, ...]]:
    """The module that holds the weight [E, H], and the adapters around it."""
    for name in LINEARS:
        child = getattr(gate, name, None) if name else gate
        linear, loras = see_through(child)
        weight = getattr(linear, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            return linear, loras
    raise ValueError(f"{type(gate).__name__}: no weight [experts, hidden]")


def _read_rule(name: str, asked: tuple[Any, ...], habit: _Habit, has_correction: bool) -> RoutingRule:
    top_k = _find(asked, TOP_K)
    if not isinstance(top_k, int):
        got = "is missing" if top_k is None else f"is {top_k!r}, need an integer"
        raise ValueError(f"{name}: top_k {got} (looked for {', '.join(TOP_K)})")
    score = habit.score or _read_score(name, asked, has_correction)
    num_groups, top_groups = _find(asked, NUM_GROUPS), _find(asked, TOP_GROUPS)
    normalize, group_experts = _find(asked, NORMALIZE), 2
    method = _find(asked, ("topk_method",))
    if method == "greedy":  # DeepSeek-V2
        num_groups, normalize = None, False
    elif method == "group_limited_greedy":
        group_experts, normalize = 1, False
    elif method not in (None, "noaux_tc"):
        raise ValueError(f"{name}: topk_method is {method!r}, need greedy, group_limited_greedy or noaux_tc")
    if num_groups is None:  # a number of top groups alone says nothing
        num_groups = top_groups = 1
    elif top_groups is None:
        raise ValueError(f"{name}: {NUM_GROUPS[1]} is {num_groups}, but topk_group is missing")
    epsilon = _find(asked, EPSILON)
    if epsilon is None:
        epsilon = 1e-20 if "softmax" not in score or num_groups > 1 else 0.0
    is_softmax_of_chosen = score == "softmax_of_chosen"  # sums to 1 as it is
    return RoutingRule(
        top_k=top_k,
        score=score,
        normalize=not is_softmax_of_chosen and bool(_or(habit.normalize, _or(normalize, True))),
        epsilon=_or(habit.epsilon, epsilon),
        num_groups=num_groups,
        top_groups=top_groups,
        group_experts=group_experts,
        other_groups=_or(habit.other_groups, float("-inf")),
    )


def _read_score(name: str, asked: tuple[Any, ...], has_correction: bool) -> Score:
    selection = _find(asked, ("expert_selection_fn",))  # Cohere: of the chosen logits
    function = _find(asked, ("score_fn", "scoring_func", "score_function"))
    if selection is None and function is None:
        return "sigmoid" if has_correction else "softmax"
    known: dict[str, Score] = (
        {"softmax": "softmax_of_chosen", "sigmoid": "sigmoid_of_chosen"}
        if selection is not None
        else {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}
    )
    said = selection if selection is not None else function
    word = said if isinstance(said, str) else type(said).__name__.lower().removesuffix("activation")
    if word not in known:
        raise ValueError(f"{name}: the scoring function is {word!r}, need one of {', '.join(known)}")
    return known[word]


def _configs(gate: Any, block: Any) -> list[Any]:
    """The configurations at hand; experts of Transformers' interface always have theirs."""
    experts: Any = getattr(block, "experts", None)
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    owners = (gate, block, experts)
    return [config for owner in owners if (config := getattr(owner, "config", None)) is not None]


def _find(owners: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    """The first attribute of these names that an owner has and that is not None; a name may have dots."""
    for owner in owners:
        for name in names:
            found = owner
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is not None:
                return found
    return None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
