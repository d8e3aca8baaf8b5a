"""Routing, plan and expert MLP on the backend that a name and a device mean: what models and blocks share."""

import logging
from functools import cache

import torch
from torch import Tensor

from expertune.errors import BackendError
from expertune.layers.backends import (
    AUTO,
    SONICMOE,
    SONICMOE_MATERIALIZE,
    TORCH_GROUPED,
    pick_backend,
    unavailable_reason,
)
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.torch_grouped import grouped_expert_mlp
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan, build_plan
from expertune.ops.routing.select import select_experts
from expertune.ops.routing.types import Routing, RoutingRule

logger = logging.getLogger("expertune")

# torch.compile leaves this to Python: its backward is autograd's of any function, and it asks for addresses.
WHY_NOT_COMPILED = "expertune's torch_grouped runs outside of the graphs of torch.compile"
_grouped_expert_mlp = torch.compiler.disable(grouped_expert_mlp, reason=WHY_NOT_COMPILED)


def run_build_plan(
    backend: str,
    expert_ids_TK: Tensor,
    up: ExpertProjection,
    *,
    sentinels: bool = False,
    num_live_rows: int | None = None,
    tile: LinearTile | None = None,
) -> ExpertPlan:
    """The plan of a routing decision, with what a backend of `backend_for` wants in it; arguments of `build_plan`.

    up: the first of the projections that it is for. tile: as for `run_expert_mlp`.
    """
    if backend == TORCH_GROUPED:
        return build_plan(expert_ids_TK, up.num_experts, sentinels=sentinels, num_live_rows=num_live_rows)
    from expertune.ops.experts.scattermoe.products import build_plan_and_tables

    return build_plan_and_tables(expert_ids_TK, up, sentinels=sentinels, num_live_rows=num_live_rows, tile=tile)


def run_expert_mlp(
    backend: str,
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
    *,
    tile: LinearTile | None = None,
) -> Tensor:
    """Compute the expert MLP on a backend of `backend_for`; arguments and gradients of `grouped_expert_mlp`.

    tile: of the big products of scattermoe and sonicmoe; None: the table's.
    """
    if backend == TORCH_GROUPED:
        return _grouped_expert_mlp(x_TH, weights_TK, plan, up, down, activation)
    if backend in (SONICMOE, SONICMOE_MATERIALIZE):
        from expertune.ops.experts.sonicmoe.mlp import Adapter, sonicmoe_expert_mlp

        adapter: Adapter = "materialize" if backend == SONICMOE_MATERIALIZE else "low_rank"
        return sonicmoe_expert_mlp(x_TH, weights_TK, plan, up, down, activation, adapter=adapter, tile=tile)
    from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp

    return scattermoe_expert_mlp(x_TH, weights_TK, plan, up, down, activation, tile=tile)


def run_select_experts(
    backend: str, logits_TE: Tensor, rule: RoutingRule, *, bias_E: Tensor | None, weights_dtype: torch.dtype
) -> Routing:
    """Choose the experts on a backend of `backend_for`: one launch beside the kernels, plain torch elsewhere."""
    if backend == TORCH_GROUPED:
        return select_experts(logits_TE, rule, bias_E=bias_E, weights_dtype=weights_dtype)
    from expertune.ops.routing.fused import fused_select_experts

    return fused_select_experts(logits_TE, rule, bias_E=bias_E, weights_dtype=weights_dtype)


@torch.compiler.assume_constant_result
def backend_for(name: str, device_type: str, dtype: torch.dtype, setting: str) -> str:
    """The backend that runs for a name ("expertune": the best) on a kind of device, for weights of a dtype.

    setting: what the person set to the name, for messages. torch.compile does not look into it: it asks about devices
    and packages, and logs. Raises BackendError if a backend was asked for by name and cannot run there.
    """
    return _backend_for(name, device_type, dtype, setting)


@cache
def _backend_for(name: str, device_type: str, dtype: torch.dtype, setting: str) -> str:
    """Said once for each."""
    if name != AUTO:
        reason = unavailable_reason(name, device_type, setting=setting)
        if reason is not None:
            raise BackendError(f"{setting}={name!r}: {reason}")
        return name
    backend = pick_backend(device_type) if dtype != torch.float64 else TORCH_GROUPED  # kernels know no fp64
    logger.info("experts on %s run on the backend %s", device_type, backend)
    return backend
