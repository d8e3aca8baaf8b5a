"""Gradients as one process would have them: summed over the mesh, scaled once, clipped by one norm.

Every process has a batch of its own. With N_tok trained tokens in the batches of all W processes, process w computes
(TRL's trainer, as for DDP)

    loss_w = W / N_tok * (sum of the nats of its own tokens)

so that the mean over processes is the loss of one process with all batches, and the gradient wanted is the mean of the
processes' gradients:  g = 1/W sum over w of dloss_w/dtheta,  W = expert x shard x replicate.

  shared by all (attention, router)    each process has dloss_w/dtheta; FSDP2 means over the shard axis; the sum over
                                       the expert and the replicate axis, divided by expert x replicate, is g.
  of experts                           tokens of all processes of the expert axis came here, and their gradients with
                                       them: what autograd leaves is already the sum over the expert axis. FSDP2 means
                                       over the shard axis; the sum over the replicate axis, divided by expert x
                                       replicate, is g. (Without the division by `expert` it would be too large.)

So both are divided by the same number, and only the sums differ. It happens once a step, after the last micro-batch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from expertune.distributed.mesh import EXPERT, REPLICATE, SHARD, ParallelMesh
from expertune.distributed.parameters import ShardedParameter

BUCKET_VALUES = 2**26  # 256 MiB in fp32: few, large messages, and not a second copy of all gradients at once


def synchronise_gradients(parameters: Sequence[ShardedParameter], mesh: ParallelMesh) -> None:
    """Turn each process's gradients into those of one process with all batches. Every process must call it.

    A parameter without a gradient gets zeros, in every process alike.
    """
    sizes = mesh.sizes
    for sharded in parameters:
        if sharded.parameter.grad is None:
            sharded.parameter.grad = torch.zeros_like(sharded.parameter)
    with torch.no_grad():
        for bucket in _buckets(parameters):
            grads = [_local(sharded.parameter.grad) for sharded in bucket]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            what = "summing gradients"
            if sizes.expert > 1 and not bucket[0].is_experts:
                mesh.wire(EXPERT, "the adapters that all share").sum(flat, what)
            if sizes.replicate > 1:
                mesh.wire(REPLICATE, "the adapters of all copies").sum(flat, what)
            flat /= sizes.expert * sizes.replicate
            for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view_as(grad))


def gradient_norm(parameters: Sequence[ShardedParameter], mesh: ParallelMesh) -> Tensor:
    """The L2 norm of all gradients together, each value of the whole counted once; fp64, the same in every process."""
    squares = torch.zeros(2, dtype=torch.float64, device=_local(parameters[0].parameter).device)
    for sharded in parameters:
        if sharded.parameter.grad is not None:
            norm = torch.linalg.vector_norm(_local(sharded.parameter.grad.detach()), dtype=torch.float32)
            squares[int(sharded.is_experts)] += norm.double().square()
    experts = squares[1:]
    if mesh.sizes.expert > 1:
        mesh.wire(EXPERT, "the experts' adapters").sum(experts, "the norm of gradients")
    if mesh.sizes.shard > 1:
        mesh.wire(SHARD, "the shards").sum(squares, "the norm of gradients")
    # The one wait of a step for the whole job: a rank that is stuck in its backward is noticed here.
    mesh.wire(None, "the whole model").maximum(squares, "the end of the backward pass")
    return squares.sum().sqrt()


def clip_gradients(parameters: Sequence[ShardedParameter], max_norm: float, mesh: ParallelMesh) -> Tensor:
    """Scale all gradients down so that their norm is at most `max_norm`, as torch's clip_grad_norm_; returns the norm.

    max_norm: infinity only measures.
    """
    norm = gradient_norm(parameters, mesh)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for sharded in parameters:
        if sharded.parameter.grad is not None:
            _local(sharded.parameter.grad).mul_(factor.to(sharded.parameter.dtype))
    return norm.float()


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(parameters: Sequence[ShardedParameter]) -> Iterator[list[ShardedParameter]]:
    """Parameters that travel together: one dtype, all or none of experts, in the same order in every process."""
    kinds: dict[tuple[bool, torch.dtype], list[ShardedParameter]] = {}
    for sharded in parameters:
        kinds.setdefault((sharded.is_experts, sharded.parameter.dtype), []).append(sharded)
    for kind in kinds.values():
        bucket: list[ShardedParameter] = []
        num_values = 0
        for sharded in kind:
            size = _local(sharded.parameter.detach()).numel()
            if bucket and num_values + size > BUCKET_VALUES:
                yield bucket
                bucket, num_values = [], 0
            bucket.append(sharded)
            num_values += size
        yield bucket
