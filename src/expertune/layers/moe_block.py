"""A whole MoE block for models of one's own: router, routed experts on any backend, shared experts, adapters.

    p, e = select(R x)        y = sum over K of p_k expert(e_k, x) + shared(x)        expert(e, x) = W2[e] act(W1[e] x)

Built from a plain configuration; nothing of Transformers is imported. `layers.convert` carries weights from and to the
blocks of Transformers. Worked example: docs/moe_block.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, overload

import torch
from torch import Tensor, nn

from expertune.layers.activations import ActivationName, activation_named, check_activation, is_gated
from expertune.layers.backends import AUTO, IMPLEMENTATIONS
from expertune.layers.lora import LoraPlaces, StackedLinear, WithAdapter
from expertune.layers.running import backend_for, run_build_plan, run_expert_mlp, run_select_experts
from expertune.layers.shared import SharedExperts
from expertune.ops.experts.types import Activation
from expertune.ops.routing.router import router_logits
from expertune.ops.routing.types import Routing, RoutingRule


@dataclass(frozen=True)
class MoEConfig:
    """What a MoEBlock is built from.

    hidden: H. intermediate: I, the width of one expert. num_experts: E. rule: how experts are chosen, with K = `top_k`.
    activation: between the projections, a name or any function without parameters, [S, J] to [S, I]; in a gated one
        J = 2I, gate then up. gated: only for a function, which is taken to be gated unless False is said.
    expert_bias: biases in both projections of the experts. router_bias: added to the logits. correction_bias: a buffer
        [E] in fp32, added to the scores for the choice alone (DeepSeek-V3's balancing without a loss), not trained.
    num_shared, shared_intermediate: shared experts, and the width of one (None: I). shared_gate: whether a sigmoid gate
        weighs them.
    backend: "expertune" is the best that can run, or a name ("torch_grouped", "scattermoe", "sonicmoe",
        "sonicmoe_materialize").
    lora: the adapters to begin with; `MoEBlock.add_lora` adds them later.
    Raises ValueError, naming the field, where fields contradict each other.
    """

    hidden: int
    intermediate: int
    num_experts: int
    rule: RoutingRule
    activation: ActivationName | Activation = "swiglu"
    gated: bool | None = None
    expert_bias: bool = False
    router_bias: bool = False
    correction_bias: bool = False
    num_shared: int = 0
    shared_intermediate: int | None = None
    shared_gate: bool = False
    backend: str = AUTO
    lora: LoraPlaces = field(default_factory=LoraPlaces)

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "num_experts"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        self.rule.check(self.num_experts)
        check_activation(self.activation, is_gated(self.activation, self.gated), self.intermediate)
        _need(self.num_shared >= 0, "num_shared", self.num_shared, "0 or more")
        if self.shared_intermediate is not None:
            _need(self.shared_intermediate >= 1, "shared_intermediate", self.shared_intermediate, "at least 1, or None")
            _need(self.num_shared > 0, "shared_intermediate", self.shared_intermediate, "None where num_shared is 0")
        _need(self.num_shared > 0 or not self.shared_gate, "shared_gate", True, "False where num_shared is 0")
        _need(self.backend in IMPLEMENTATIONS, "backend", repr(self.backend), f"one of {', '.join(IMPLEMENTATIONS)}")
        self._check_lora()

    @property
    def num_up(self) -> int:
        """J, the outputs of an expert's up projection."""
        return self.intermediate * self._up_per_width

    @property
    def shared_width(self) -> int:
        """The width of all shared experts together."""
        return self.num_shared * (self.shared_intermediate or self.intermediate)

    @property
    def num_shared_up(self) -> int:
        """The outputs of the shared experts' up projection."""
        return self.shared_width * self._up_per_width

    @property
    def _up_per_width(self) -> int:
        return 2 if is_gated(self.activation, self.gated) else 1

    def _check_lora(self) -> None:
        for place, spec in self.lora.given().items():
            if place.startswith("shared"):
                _need(self.num_shared > 0, f"lora.{place}", spec, "None where num_shared is 0")
        if self.lora.shared_gate is not None:
            _need(self.shared_gate, "lora.shared_gate", self.lora.shared_gate, "None where shared_gate is False")


class BlockRouter(WithAdapter):
    """The linear that gives each token a logit for each expert. weight: [E, H]. bias: [E] or None.

    correction_bias: [E] in fp32, or None.
    """

    keeps_fp32 = (*WithAdapter.keeps_fp32, "correction_bias")
    correction_bias: Tensor | None

    def __init__(self, config: MoEConfig) -> None:
        super().__init__((config.num_experts, config.hidden), config.router_bias)
        self.rule = config.rule
        self.backend = config.backend
        self.register_buffer("correction_bias", torch.zeros(config.num_experts) if config.correction_bias else None)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        correction = getattr(self, "correction_bias", None)  # not there yet while the weight is made
        if correction is not None:
            nn.init.zeros_(correction)

    def forward(self, x_TH: Tensor) -> Routing:
        """Choose K experts for each token; logits and weights in fp32 (fp64 for fp64 weights)."""
        loras = () if self.lora is None else (self.lora,)
        logits_TE = router_logits(x_TH, self.weight, self.bias, loras=loras)
        backend = backend_for(self.backend, x_TH.device.type, self.weight.dtype, "backend")
        return run_select_experts(
            backend, logits_TE, self.rule, bias_E=self.correction_bias, weights_dtype=logits_TE.dtype
        )


class Experts(nn.Module):
    """The routed experts. up: [E, J, H]. down: [E, H, I]."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        num_experts, hidden = config.num_experts, config.hidden
        self.up = StackedLinear(num_experts, hidden, config.num_up, bias=config.expert_bias)
        self.down = StackedLinear(num_experts, config.intermediate, hidden, bias=config.expert_bias)
        self.activation = activation_named(config.activation)
        self.backend = config.backend

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """[T, H] to [T, H] in the dtype of the input; computed in the dtype of the weights."""
        up, down = self.up.projection(), self.down.projection()
        backend = backend_for(self.backend, x_TH.device.type, up.weight_EYX.dtype, "backend")
        plan = run_build_plan(backend, routing.expert_ids_TK, up)
        return run_expert_mlp(backend, x_TH, routing.weights_TK, plan, up, down, self.activation)


class MoEBlock(nn.Module):
    """Router, routed experts and shared experts, each with adapters where `config.lora` says so.

    config: see MoEConfig. router, experts, shared (None without): the parts, which also run alone.

    The router is computed in fp32, everything else in the dtype of the weights; autocast does not reach into the block.
    The output has the dtype of the input. Adapters and the correction bias stay in fp32 under `.to(torch.bfloat16)`.
    No weight that does not require a gradient gets one computed.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = replace(config, lora=LoraPlaces())
        self.router = BlockRouter(config)
        self.experts = Experts(config)
        self.shared = None
        if config.num_shared:
            activation = activation_named(config.activation)
            self.shared = SharedExperts(
                config.hidden, config.num_shared_up, config.shared_width, activation, gate=config.shared_gate
            )
        self.add_lora(config.lora)

    @overload
    def forward(self, hidden: Tensor, *, shared: bool = True, return_routing: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, hidden: Tensor, *, shared: bool = True, return_routing: Literal[True]
    ) -> tuple[Tensor, Routing]: ...
    def forward(
        self, hidden: Tensor, *, shared: bool = True, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Compute the block for hidden states [..., H]: [..., H], with the residual left to the caller.

        shared: False leaves the shared experts out (`block.shared(hidden)` is them alone).
        return_routing: also return the Routing of the T tokens, in their flat order, for auxiliary losses and metrics.
        Raises ValueError if the last dimension is not H, BackendError if a backend that was asked for cannot run.
        """
        x_TH = self._flat(hidden)
        routing = self.route(x_TH)
        y_TH = self.experts(x_TH, routing)
        if shared and self.shared is not None:
            y_TH = y_TH + self.shared(x_TH)
        output = y_TH.reshape(hidden.shape)
        return (output, routing) if return_routing else output

    def route(self, hidden: Tensor) -> Routing:
        """The routing of the T tokens of hidden states [..., H], without running an expert."""
        routing: Routing = self.router(self._flat(hidden))
        return routing

    def add_lora(self, places: LoraPlaces) -> "MoEBlock":
        """Add adapters, which change nothing until they are trained. The base goes on training: see `freeze_base`.

        Raises ValueError for a part that the block lacks or that has an adapter.
        """
        lora = replace(self.config.lora, **places.given())
        config = replace(self.config, lora=lora)
        taken = places.given().keys() & self.config.lora.given().keys()
        if taken:
            raise ValueError(f"lora.{min(taken)}: there is an adapter already; merge_lora() folds it into the weight")
        for place, spec in places.given().items():
            self._linear(place).add_lora(spec)
        self.config = config
        return self

    def merge_lora(self) -> "MoEBlock":
        """Fold every adapter into its weight, rounded once, and drop it."""
        for place in self.config.lora.given():
            self._linear(place).merge_lora()
        self.config = replace(self.config, lora=LoraPlaces())
        return self

    def freeze_base(self) -> "MoEBlock":
        """Let the adapters be all that trains: for the others no gradient is computed."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(_is_adapter(name))
        return self

    def lora_parameters(self) -> Iterator[nn.Parameter]:
        """The adapters: what an optimizer gets after `freeze_base`. In a state dict their names hold "lora_"."""
        return (parameter for name, parameter in self.named_parameters() if _is_adapter(name))

    def _linear(self, place: str) -> WithAdapter:
        linear = self.get_submodule(place.replace("_", "."))
        assert isinstance(linear, WithAdapter)
        return linear

    def _flat(self, hidden: Tensor) -> Tensor:
        if hidden.dim() < 1 or hidden.shape[-1] != self.config.hidden:
            raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, need [..., {self.config.hidden}]")
        return hidden.reshape(-1, self.config.hidden)


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


def _need(condition: bool, name: str, got: object, need: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {got}, need {need}")
