"""Adapter and optimizer state, gathered from all processes in the form of one process, and dealt out again.

Why not torch.distributed.checkpoint: what trains is the adapter, a thousandth of the model, so the whole of it fits on
the first process, tensor by tensor from the GPUs into its memory. One format then serves every mesh: a run goes on in
any number of processes, one included, `expertune eval` and PEFT read any checkpoint, and exactly the same numbers come
back (a gather moves bits). The base model is frozen and never saved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expertune.distributed.mesh import ParallelMesh
from expertune.distributed.parameters import Cut, ShardedParameter, own_part, whole_tensor


def gather_parameters(parameters: Sequence[ShardedParameter], mesh: ParallelMesh) -> dict[str, Tensor]:
    """The whole parameters by name, on the CPU of the first process; empty in the others. All must call it."""
    return {
        sharded.name: whole.cpu()
        for sharded in parameters
        if (whole := _on_first(sharded.parameter, sharded, mesh)) is not None
    }


def deal_out_parameters(
    wholes: Mapping[str, Tensor], parameters: Sequence[ShardedParameter], mesh: ParallelMesh
) -> None:
    """Copy each process's parts of whole parameters, by name, into the model; KeyError for one that is missing."""
    with torch.no_grad():
        for sharded in parameters:
            whole = wholes[sharded.name]
            sharded.parameter.copy_(own_part(whole, sharded, mesh))


def gather_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[ShardedParameter], mesh: ParallelMesh
) -> dict[str, Any] | None:
    """The optimizer's state_dict as one process has it, on the CPU of the first process; None in the others.

    Moments have the shape of their parameter and are gathered as it is; counters are the same everywhere.
    """
    state = optimizer.state_dict()
    owners = _owners(optimizer, parameters)
    whole: dict[int, dict[str, Any]] = {}
    for index in sorted(state["state"]):
        sharded = owners[index]
        whole[index] = {}
        for name, value in state["state"][index].items():
            if _is_moment(value, sharded):
                gathered = _on_first(value, sharded, mesh)
                value = None if gathered is None else gathered.cpu()
            whole[index][name] = value.cpu() if isinstance(value, Tensor) else value
    return {"state": whole, "param_groups": state["param_groups"]} if mesh.is_first else None


def deal_out_optimizer(
    whole: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[ShardedParameter],
    mesh: ParallelMesh,
) -> None:
    """Load a whole state_dict, of a run on any mesh, into this process's optimizer."""
    owners = _owners(optimizer, parameters)
    state = {}
    for index, values in whole["state"].items():
        sharded = owners[index]
        shape = whole_shape(sharded, mesh)
        state[index] = {
            name: own_part(value, sharded, mesh) if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in values.items()
        }
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def whole_shape(sharded: ShardedParameter, mesh: ParallelMesh) -> torch.Size:
    """The shape of the parameter in one process."""
    shape = list(sharded.parameter.shape)  # a DTensor's is that before the shard axis cuts it
    if sharded.is_experts:
        dimension = 0 if sharded.cut is Cut.EXPERT_SLOWEST else 1
        shape[dimension] *= mesh.sizes.expert
    return torch.Size(shape)


def _on_first(part: Tensor, sharded: ShardedParameter, mesh: ParallelMesh) -> Tensor | None:
    whole = whole_tensor(part, sharded, mesh)
    return whole if mesh.is_first else None


def _is_moment(value: Any, sharded: ShardedParameter) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == sharded.parameter.shape


def _owners(optimizer: torch.optim.Optimizer, parameters: Sequence[ShardedParameter]) -> dict[int, ShardedParameter]:
    """The parameter of each index of the state_dict."""
    by_id = {id(sharded.parameter): sharded for sharded in parameters}
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: by_id[id(parameter)] for index, parameter in enumerate(listed)}
