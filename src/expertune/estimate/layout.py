"""Which GPU holds what: a layout's share of weights, adapters, gradients and optimizer, and what sharding adds.

On one mesh of expert_parallel x dp_shard x dp_replicate GPUs, each with rows of its own:

    experts             / (expert_parallel x dp_shard)      whole experts over the first axis, slices over the second
    everything else     / dp_shard
    dp_replicate        copies all of it

Activations depend on the layout only in that expert parallelism keeps the rows that came in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from expertune.distributed.gradients import BUCKET_VALUES
from expertune.distributed.sizes import ParallelSizes, divisors
from expertune.estimate.gpus import GIB
from expertune.estimate.ledger import (
    EXCHANGE,
    EXPERT_GRADIENTS,
    EXPERTS,
    HEAD,
    KEPT,
    OTHER_GRADIENTS,
    PASSING,
    RECOMPUTED,
    rounded,
)
from expertune.estimate.model import ModelBytes
from expertune.estimate.optimizers import OptimizerBytes
from expertune.estimate.step import Course

MIB = 2**20
CUBLAS_BYTES = 2 * 32 * MIB  # torch's default on Hopper, for the thread of the forward and the one of the backward
CONTEXT_BYTES = 3 * GIB // 4  # allowance: CUDA context, loaded kernels
NCCL_BYTES = GIB // 2  # allowance: each communicator's channels, outside of torch's allocator
FRAGMENTS = 0.05  # allowance: of what comes and goes
BUCKET_BYTES = 4 * BUCKET_VALUES  # as gradients are summed, that of one bucket, in fp32
GATHERED_LAYERS = 2  # FSDP2 gathers the next layer while one computes


@dataclass(frozen=True)
class Item:
    """One line of an estimate. allowance: a rule of thumb for what torch does not count, not a computation."""

    name: str
    num_bytes: int
    what: str = ""
    allowance: bool = False


@dataclass(frozen=True)
class GpuMemory:
    """The memory of one GPU at the peak of a step."""

    layout: ParallelSizes
    items: tuple[Item, ...]

    @property
    def allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` says: without the allowances."""
        return sum(item.num_bytes for item in self.items if not item.allowance)

    @property
    def total_bytes(self) -> int:
        """What the GPU must have."""
        return sum(item.num_bytes for item in self.items)


def memory_on(layout: ParallelSizes, model: ModelBytes, optimizer: OptimizerBytes, course: Course) -> GpuMemory:
    """Itemise a GPU's memory at the moment when most of it is used.

    course: of the step, run with the layout's expert parallelism.
    """
    experts, others = 1 / (layout.expert * layout.shard), 1 / layout.shard
    expert_adapters, other_adapters = model.expert_adapters * experts, model.other_adapters * others
    gradients = {EXPERT_GRADIENTS: model.expert_adapters, OTHER_GRADIENTS: model.other_adapters}
    after: list[Mapping[str, float]] = [
        {**gradients, _UPDATE: (expert_adapters + other_adapters) * optimizer.passing},
        {**gradients, _BUCKET: _bucket(layout, expert_adapters, other_adapters)},
    ]
    moments = [_shared(moment, experts, others) for moment in (*course.moments, *after)]
    peak = max(moments, key=lambda moment: sum(moment.values()))
    trained = model.num_trainable_experts * experts + (model.num_trainable - model.num_trainable_experts) * others
    static = [
        Item("expert weights", _whole(model.experts * experts), "frozen"),
        Item("other weights", _whole(model.others * others), "frozen: attention, routers, embeddings, head, norms"),
        Item("expert adapters", _whole(expert_adapters)),
        Item("other adapters", _whole(other_adapters)),
        Item("optimizer states", _whole(trained * optimizer.kept), optimizer.name),
        *_of_sharding(layout, model),
        Item("cuBLAS workspaces", CUBLAS_BYTES, "two threads"),
    ]
    moving = [
        Item("gradients of adapters", _whole(sum(peak.get(kind, 0) for kind in (EXPERT_GRADIENTS, OTHER_GRADIENTS)))),
        *(Item(kind, _whole(peak[kind]), what) for kind, what in _WHAT.items() if peak.get(kind)),
    ]
    comes_and_goes = sum(item.num_bytes for item in moving)
    axes = sum(size > 1 for size in (layout.expert, layout.shard, layout.replicate))
    allowances = [
        Item("CUDA context", CONTEXT_BYTES, "allowance", allowance=True),
        Item("NCCL", axes * NCCL_BYTES, "allowance, for each axis", allowance=True),
        Item("fragmentation", int(FRAGMENTS * comes_and_goes), f"allowance, {FRAGMENTS:.0%} of what moves", True),
    ]
    items = (item for item in (*static, *moving, *allowances) if item.num_bytes)
    return GpuMemory(layout, tuple(items))


def layouts_of(num_gpus: int, num_experts: int) -> Iterator[ParallelSizes]:
    """Every layout of exactly so many GPUs whose expert axis divides the experts."""
    for expert_parallel in divisors(num_gpus):
        if num_experts % expert_parallel:
            continue
        rest = num_gpus // expert_parallel
        for dp_shard in divisors(rest):
            yield ParallelSizes(expert_parallel, dp_shard, rest // dp_shard)


_UPDATE = "the optimizer's update"
_BUCKET = "gradients being summed over GPUs"
_WHAT = {
    KEPT: "with checkpointing: the inputs of each layer",
    RECOMPUTED: "one layer, by checkpointing",
    PASSING: "and what operators of the backward hold for a moment",
    EXPERTS: "what scattermoe holds during one call",
    EXCHANGE: "rows sent and received at an even load",
    HEAD: "TRL's head: logits in tiles of 4096 tokens x 32768 words",
    _UPDATE: "square roots of all second moments",
    _BUCKET: "one bucket at a time",
}


def _shared(moment: Mapping[str, float], experts: float, others: float) -> dict[str, float]:
    shares = {EXPERT_GRADIENTS: experts, OTHER_GRADIENTS: others}
    return {kind: size * shares.get(kind, 1) for kind, size in moment.items()}


def _of_sharding(layout: ParallelSizes, model: ModelBytes) -> Iterator[Item]:
    """What is whole for a while though it is shared."""
    if layout.shard > 1:
        layer = model.largest_layer_experts / layout.expert + model.largest_layer_others
        yield Item("gathered layers", _whole(GATHERED_LAYERS * layer), f"FSDP2: {GATHERED_LAYERS} at a time")
        yield Item("gathered embeddings and head", model.outside_layers, "FSDP2: during the whole step")


def _bucket(layout: ParallelSizes, expert_adapters: float, other_adapters: float) -> float:
    """Gradients on their way to the GPUs that hold the same adapters, after the backward."""
    travelling = other_adapters if layout.world > 1 else 0
    travelling += expert_adapters if layout.replicate > 1 else 0
    return min(travelling, BUCKET_BYTES)


def _whole(num_bytes: float) -> int:
    return rounded(int(num_bytes))
