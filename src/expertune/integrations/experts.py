"""Our backends in Transformers' experts interface.

Transformers calls `fn(experts_module, hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]` for
every experts class with its decorator, and the module's flags say how the weights are stored.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from expertune.distributed.dispatch import ExpertShard, Trip, return_from_experts, send_to_experts
from expertune.integrations.adapters import active_lora
from expertune.integrations.gates import activation_of
from expertune.integrations.tuned import tuned_tile
from expertune.layers.backends import IMPLEMENTATIONS, SCATTERMOE, SONICMOE_MATERIALIZE, TORCH_GROUPED
from expertune.layers.layout import projection_names, read_projection
from expertune.layers.running import WHY_NOT_COMPILED, backend_for, run_build_plan, run_expert_mlp
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.torch_grouped import combine_rows, gather_rows, grouped_expert_linear
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan

# torch.compile leaves this to Python: its backward is autograd's of any function, and it asks for addresses.
_grouped_expert_linear = torch.compiler.disable(grouped_expert_linear, reason=WHY_NOT_COMPILED)

SHARD = "expertune_shard"
"""Where an experts module that holds only some of its layer's experts keeps its `ExpertShard`."""


def install() -> None:
    """Register our backends with Transformers. Once is enough; more often does no harm.

    A function of Transformers' own under one of our names ("sonicmoe") is kept, for `uninstall` to give back.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name in IMPLEMENTATIONS:
        there = ALL_EXPERTS_FUNCTIONS._global_mapping.get(name)
        ours: Any = partial(experts_forward, name)
        # a second copy of this module (a fresh import after the first was dropped) takes the place of the first
        ours.expertune_original = getattr(there, "expertune_original", there)
        ALL_EXPERTS_FUNCTIONS.register(name, ours)


def uninstall() -> None:
    """Take our functions out of Transformers' registry again; what others registered since stays."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    registered = ALL_EXPERTS_FUNCTIONS._global_mapping
    for name in IMPLEMENTATIONS:
        if hasattr(registered.get(name), "expertune_original"):
            original = registered.pop(name).expertune_original
            if original is not None:
                registered[name] = original


def experts_forward(
    implementation: str, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the experts of one layer, with the adapters that PEFT has active on them.

    implementation: "expertune" (the best backend for the device) or a backend's name.
    hidden_states: [T, H]. top_k_index: [T, K] integer. top_k_weights: [T, K]. Returns [T, H] in the dtype of the input.
    The gate is the module's own function, whatever it computes; a kernel computes it itself where it is exactly one
    that it knows. A module that has more of its own between the projections (a norm, trainable parameters) is run in
    pieces through autograd: slower, the same result.
    A module that was given an `ExpertShard` holds only its process's experts: tokens travel (`distributed.dispatch`).
    Raises BackendError if a backend was asked for by name and cannot run on the device of the input.
    """
    up_name, down_name = projection_names(experts)
    up = read_projection(experts, up_name, active_lora(experts, up_name))
    down = read_projection(experts, down_name, active_lora(experts, down_name))
    backend = backend_for(implementation, hidden_states.device.type, up.weight_EYX.dtype, "experts_implementation")
    activation = activation_of(experts)
    in_pieces = _has_more_of_its_own(experts)

    def run(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, sentinels: bool, trip: Trip | None = None) -> Tensor:
        tile = None if in_pieces else _tile_for(backend, ids_TK, up, down)

        def build(num_live_rows: int | None = None) -> ExpertPlan:
            return run_build_plan(backend, ids_TK, up, sentinels=sentinels, num_live_rows=num_live_rows, tile=tile)

        plan = build() if trip is None else trip.plan_of(build)
        if in_pieces:
            return _run_in_pieces(backend, experts, x_TH, weights_TK, plan, up, down, activation)
        return run_expert_mlp(backend, x_TH, weights_TK, plan, up, down, activation, tile=tile)

    shard: ExpertShard | None = getattr(experts, SHARD, None)
    if shard is None:
        # Transformers before 5.18 has no flag and may always pass sentinel ids.
        sentinels = bool(getattr(experts, "_is_expert_parallel", True))
        return run(hidden_states, top_k_index, top_k_weights, sentinels)
    x_TH = hidden_states.to(up.weight_EYX.dtype)  # what the experts compute in, and no more bytes than that
    arrived = send_to_experts(x_TH, top_k_index, top_k_weights, shard)
    y_RH = run(arrived.x_RH, arrived.expert_ids_RK, arrived.weights_RK, True, arrived.trip)
    return return_from_experts(y_RH, arrived).to(hidden_states.dtype)


def _run_in_pieces(
    backend: str,
    experts: nn.Module,
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
) -> Tensor:
    """Projection by projection, the module's own things between them through autograd."""
    if backend == TORCH_GROUPED:
        h_SJ = _grouped_expert_linear(gather_rows(x_TH, plan), up, plan)
        z_SH = _grouped_expert_linear(activation(h_SJ), down, plan)
    else:
        from expertune.ops.experts.scattermoe.pieces import expert_linear

        if backend == SONICMOE_MATERIALIZE:
            from expertune.ops.experts.sonicmoe.fold import fold_projection

            up, down = fold_projection(up), fold_projection(down)
        h_SJ = expert_linear(x_TH, up, plan)
        z_SH = expert_linear(activation(h_SJ), down, plan, grouped=True)
    if getattr(experts, "has_post_expert_norm", False):
        z_SH = cast(nn.Module, experts.post_expert_norm)(z_SH)
    return combine_rows(z_SH, weights_TK, plan).to(x_TH.dtype)


def _tile_for(backend: str, expert_ids_TK: Tensor, up: ExpertProjection, down: ExpertProjection) -> LinearTile | None:
    """The tile that `expertune tune` found for scattermoe in this call on this machine; None: the table's."""
    if backend != SCATTERMOE or torch.compiler.is_compiling():
        return None
    weight = down.weight_EYX
    num_experts, hidden, intermediate = weight.shape
    rank = max(projection.lora.rank if projection.lora else 0 for projection in (up, down))
    num_rows, top_k = expert_ids_TK.numel(), expert_ids_TK.shape[1]
    return tuned_tile(num_rows, num_experts, hidden, intermediate, top_k, rank, weight.dtype, weight.device)


def _has_more_of_its_own(experts: nn.Module) -> bool:
    if getattr(experts, "has_post_expert_norm", False):
        return True
    names = projection_names(experts)
    known = {*names, *(f"{name}_bias" for name in names)}
    return any(p.requires_grad and name.split(".")[-1] not in known for name, p in experts.named_parameters())
