"""The processes of a job on one device mesh [replicate, shard, expert].

Neighbouring ranks share experts, as the all-to-all moves the most bytes and neighbours sit in one machine; copies of
the model, which meet once a step, lie furthest apart.

    8 processes, expert 4, shard 2         rank 0 1 2 3 share the experts of shard 0, 4 5 6 7 of shard 1;
                                           0 and 4 hold the halves of the same weights, as do 1 and 5, 2 and 6, 3 and 7
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from expertune.distributed.collectives import Wire
from expertune.distributed.sizes import ParallelSizes

_WATCHDOG_LATER_S = 60.0
REPLICATE, SHARD, EXPERT = "dp_replicate", "dp_shard", "ep"


@dataclass(frozen=True)
class ParallelMesh:
    """This process's place in the mesh.

    sizes: of the axes. mesh: torch's, with the axes "dp_replicate", "dp_shard" and "ep". timeout_s: of a collective.
    """

    sizes: ParallelSizes
    mesh: DeviceMesh
    timeout_s: float

    @property
    def rank(self) -> int:
        """Of the whole job."""
        return dist.get_rank()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def index(self, axis: str) -> int:
        """This process's place on an axis."""
        return self.mesh.get_local_rank(axis)

    def wire(self, axis: str | None, where: str) -> Wire:
        """The processes along an axis (None: all of them), with the name of what talks over it."""
        return Wire(None if axis is None else self.mesh.get_group(axis), where, self.timeout_s)


def join_mesh(sizes: ParallelSizes, device_type: str, timeout_s: float) -> ParallelMesh:
    """Meet the other processes, as torchrun's environment says, and lay out the mesh.

    device_type: "cuda" talks over NCCL, "cpu" over gloo. Every process must call it. `leave_mesh` undoes it.
    """
    # NCCL's own watchdog kills the process without a word of the model: it comes after the wait that names the layer.
    timeout = timedelta(seconds=timeout_s + (_WATCHDOG_LATER_S if device_type == "cuda" else 0))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    ranks = torch.arange(sizes.world).view(sizes.replicate, sizes.shard, sizes.expert)
    groups = []
    for axis in range(ranks.dim()):  # groups of our own: a mesh's have no timeout
        lines = ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis]).tolist()
        groups.append(dist.new_subgroups_by_enumeration(lines, timeout=timeout)[0])
    mesh = DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=(REPLICATE, SHARD, EXPERT))
    return ParallelMesh(sizes, mesh, timeout_s)


def leave_mesh() -> None:
    """Say goodbye to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
