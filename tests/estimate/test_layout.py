"""A GPU's share under each layout, and which layout is the smallest that fits."""

from dataclasses import replace
from pathlib import Path

import pytest

from expertune.distributed.sizes import ParallelSizes
from expertune.estimate.layout import (
    CUBLAS_BYTES,
    FRAGMENTS,
    GATHERED_LAYERS,
    NCCL_BYTES,
    GpuMemory,
    layouts_of,
    memory_on,
)
from expertune.estimate.ledger import EXPERT_GRADIENTS, KEPT, OTHER_GRADIENTS, PASSING, rounded
from expertune.estimate.model import ModelBytes
from expertune.estimate.optimizers import optimizer_bytes
from expertune.estimate.run import estimate
from expertune.estimate.step import Course
from tests.estimate.settings import settings_of
from tests.tiny import tiny_config

MIB = 2**20
MODEL = ModelBytes(
    experts=800 * MIB,
    others=80 * MIB,
    expert_adapters=32 * MIB,
    other_adapters=8 * MIB,
    largest_layer_experts=100 * MIB,
    largest_layer_others=10 * MIB,
    outside_layers=40 * MIB,
    num_parameters=440 * MIB,
    num_trainable=10 * MIB,
    num_trainable_experts=8 * MIB,
    num_experts=8,
)
ADAMW = optimizer_bytes("adamw_torch_fused")
EARLY = {KEPT: 400 * MIB}
LATE = {KEPT: 100 * MIB, PASSING: 270 * MIB, EXPERT_GRADIENTS: 32 * MIB, OTHER_GRADIENTS: 8 * MIB}
COURSE = Course((EARLY, LATE), EARLY)


def item(memory: GpuMemory, name: str) -> int:
    return next((each.num_bytes for each in memory.items if each.name == name), 0)


def test_one_gpu_holds_everything_at_the_highest_moment() -> None:
    memory = memory_on(ParallelSizes(), MODEL, ADAMW, COURSE)
    assert memory.allocated_bytes == (880 + 40 + 80 + 410) * MIB + CUBLAS_BYTES
    assert item(memory, "optimizer states") == 80 * MIB
    assert item(memory, "gradients of adapters") == 40 * MIB, "the late moment is the highest"
    assert item(memory, "fragmentation") == int(FRAGMENTS * 410 * MIB)
    assert memory.total_bytes > memory.allocated_bytes
    assert not any(each.name in ("NCCL", "gathered layers") for each in memory.items)


def test_shared_gradients_can_make_another_moment_the_highest() -> None:
    memory = memory_on(ParallelSizes(expert=8), MODEL, ADAMW, COURSE)
    assert item(memory, "gradients of adapters") == 0, "100 + 270 + 4 + 8 is less than 400"
    assert item(memory, KEPT) == 400 * MIB


def test_each_axis_shares_what_it_should() -> None:
    experts = memory_on(ParallelSizes(expert=4), MODEL, ADAMW, COURSE)
    assert item(experts, "expert weights") == 200 * MIB
    assert item(experts, "other weights") == 80 * MIB
    assert item(experts, "expert adapters") == 8 * MIB
    assert item(experts, "optimizer states") == (2 + 2) * 8 * MIB
    assert item(experts, "NCCL") == NCCL_BYTES

    shards = memory_on(ParallelSizes(expert=2, shard=4), MODEL, ADAMW, COURSE)
    assert item(shards, "expert weights") == 100 * MIB
    assert item(shards, "other weights") == 20 * MIB
    assert item(shards, "gathered layers") == GATHERED_LAYERS * (50 + 10) * MIB
    assert item(shards, "gathered embeddings and head") == 40 * MIB
    assert item(shards, "NCCL") == 2 * NCCL_BYTES

    copies = memory_on(ParallelSizes(replicate=4), MODEL, ADAMW, COURSE)
    assert item(copies, "expert weights") == 800 * MIB


def test_gradients_that_are_summed_over_gpus_pass_through_a_bucket() -> None:
    quiet = Course(({KEPT: MIB},), {KEPT: MIB})

    def bucket(layout: ParallelSizes) -> int:
        return item(memory_on(layout, MODEL, ADAMW, quiet), "gradients being summed over GPUs")

    assert bucket(ParallelSizes()) == 0
    assert bucket(ParallelSizes(expert=4)) == 8 * MIB, "attention's adapters are on every GPU"
    assert bucket(ParallelSizes(replicate=4)) == 40 * MIB
    large = replace(MODEL, expert_adapters=2**30)
    assert item(memory_on(ParallelSizes(replicate=2), large, ADAMW, quiet), "gradients being summed over GPUs") == 2**28


def test_an_update_that_copies_all_tensors_can_be_the_peak() -> None:
    quiet = Course(({KEPT: MIB},), {KEPT: MIB})
    copying = memory_on(ParallelSizes(), MODEL, optimizer_bytes("adamw_torch"), quiet)
    in_place = memory_on(ParallelSizes(), MODEL, ADAMW, quiet)
    assert copying.allocated_bytes - in_place.allocated_bytes == 40 * MIB


def test_layouts_multiply_to_the_gpus_and_divide_the_experts() -> None:
    layouts = list(layouts_of(12, num_experts=8))
    assert all(layout.world == 12 and 8 % layout.expert == 0 for layout in layouts)
    assert {layout.expert for layout in layouts} == {1, 2, 4}
    assert len(set(layouts)) == len(layouts) == 6 + 4 + 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    # so large that its experts, not the LM head's tile, decide
    model = tiny_config(hidden_size=256, moe_intermediate_size=512, num_hidden_layers=4, num_experts=16)
    folder: Path = tmp_path_factory.mktemp("plain")
    return settings_of(folder, model, gradient_checkpointing=True)


def test_the_smallest_layout_is_the_first_that_fits(plain) -> None:  # type: ignore[no-untyped-def]
    alone = estimate(plain, gpu_bytes=2**40)
    assert alone.smallest is not None
    assert alone.smallest.layout == ParallelSizes()
    assert alone.configured == alone.smallest
    below = estimate(plain, gpu_bytes=alone.configured.total_bytes - 1, num_gpus=4)
    exactly = estimate(plain, gpu_bytes=alone.configured.total_bytes, num_gpus=4)
    assert exactly.smallest is not None
    assert exactly.smallest.layout == ParallelSizes()
    assert below.smallest is None or below.smallest.layout.world > 1
    assert estimate(plain).smallest is None, "no GPU named"


def test_where_nothing_fits_the_least_is_named(plain) -> None:  # type: ignore[no-untyped-def]
    found = estimate(plain, gpu_bytes=2**20, num_gpus=2)
    assert found.smallest is None
    assert found.least is not None
    assert found.least.total_bytes <= found.configured.total_bytes


def test_checkpointing_is_compared_whichever_is_configured(plain) -> None:  # type: ignore[no-untyped-def]
    checkpointed = estimate(plain)
    without = estimate(replace(plain, config=plain.config.model_copy(update={"gradient_checkpointing": False})))
    assert checkpointed.checkpointed_bytes == without.checkpointed_bytes == checkpointed.configured.total_bytes
    assert checkpointed.plain_bytes == without.plain_bytes == without.configured.total_bytes
    assert checkpointed.plain_bytes > checkpointed.checkpointed_bytes


def test_bytes_are_whole_blocks(plain) -> None:  # type: ignore[no-untyped-def]
    items = [each for each in estimate(plain).configured.items if not each.allowance]
    assert all(rounded(each.num_bytes) == each.num_bytes for each in items)
