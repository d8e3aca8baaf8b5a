"""Which part of each trainable parameter a process holds, and the whole again from the parts.

Two axes cut a parameter. The expert axis cuts adapters of experts, as PEFT stores them:

    A  [E R, in]   expert slowest: a block of rows
    B  [out, R E]  expert fastest: columns e, E + e, 2 E + e ... of each expert e

The shard axis cuts whatever is left along its first dimension, as FSDP2 does. The whole is that of one process, which
is what is saved: parameters and the optimizer's moments alike. A resumed job cuts it again for its own mesh.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from expertune.distributed.mesh import EXPERT, ParallelMesh


class Cut(Enum):
    """How the expert axis cuts a parameter: not at all, or as adapters of experts are stored."""

    NONE = "none"
    EXPERT_SLOWEST = "expert slowest"
    EXPERT_FASTEST = "expert fastest"


@dataclass(frozen=True)
class ShardedParameter:
    """A trainable parameter.

    name: in the model, the same as in one process. parameter: what this process holds of it. cut: by the expert axis.
    num_experts: of the whole, where the expert axis cuts it.
    """

    name: str
    parameter: nn.Parameter
    cut: Cut = Cut.NONE
    num_experts: int = 0

    @property
    def is_experts(self) -> bool:
        """Whether processes of the expert axis hold different parts of it."""
        return self.cut is not Cut.NONE


def cut_experts(whole: Tensor, cut: Cut, num_experts: int, index: int, size: int) -> Tensor:
    """The part of process `index` of `size` on the expert axis, dense. whole: [E R, in] or [out, R E]."""
    each = num_experts // size
    mine = slice(index * each, (index + 1) * each)
    if cut is Cut.EXPERT_SLOWEST:
        return whole.unflatten(0, (num_experts, -1))[mine].flatten(0, 1).contiguous()
    if cut is Cut.EXPERT_FASTEST:
        return whole.unflatten(1, (-1, num_experts))[..., mine].flatten(1).contiguous()
    return whole


def join_experts(parts: Sequence[Tensor], cut: Cut, num_experts: int) -> Tensor:
    """The inverse of `cut_experts`: the whole from the parts in order."""
    if cut is Cut.EXPERT_SLOWEST:
        return torch.cat(list(parts))
    if cut is Cut.EXPERT_FASTEST:
        each = num_experts // len(parts)
        return torch.cat([part.unflatten(1, (-1, each)) for part in parts], dim=2).flatten(1)
    return parts[0]


def own_part(whole: Tensor, sharded: ShardedParameter, mesh: ParallelMesh) -> Tensor:
    """This process's part of a whole tensor that is cut as `sharded` is: of its shape, dtype and kind (DTensor or not).

    whole: on any device, the same in every process.
    """
    like = sharded.parameter.detach()
    part = cut_experts(whole, sharded.cut, sharded.num_experts, mesh.index(EXPERT), mesh.sizes.expert)
    if not isinstance(like, DTensor):
        return part.to(like.device, like.dtype)
    local = like.to_local()
    first = sum(len(chunk) for chunk in _chunks(part.shape[0], mesh.sizes.shard)[: like.device_mesh.get_local_rank()])
    local = part[first : first + local.shape[0]].to(local.device, local.dtype).contiguous()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole_tensor(part: Tensor, sharded: ShardedParameter, mesh: ParallelMesh) -> Tensor:
    """The whole of a tensor that is cut as `sharded` is, in every process; every process must call it.

    part: what this process holds, a parameter or a moment of the optimizer.
    """
    part = part.detach()
    if isinstance(part, DTensor):
        part = part.full_tensor()
    if not sharded.is_experts or mesh.sizes.expert == 1:
        return part
    parts = mesh.wire(EXPERT, sharded.name).gather(part, "gathering what is saved")
    return join_experts(parts, sharded.cut, sharded.num_experts)


def _chunks(length: int, size: int) -> list[range]:
    """The rows of each process as torch.chunk deals them out; the last may get fewer, or none."""
    each = -(-length // size)
    return [range(min(index * each, length), min((index + 1) * each, length)) for index in range(size)]
