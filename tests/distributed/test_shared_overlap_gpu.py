"""On GPUs, over NCCL: shared experts on a stream of their own give every bit that they give without, and do overlap.

The stream is slow on purpose, forward and backward: what forgets to wait for it reads something else.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from expertune.distributed.mesh import join_mesh
from expertune.distributed.side_stream import SideStream
from expertune.distributed.sizes import ParallelSizes
from expertune.integrations.sharded_model import build_skeleton, spread_model
from expertune.integrations.shared_overlap import Lane, overlap_shared_experts
from tests.distributed.processes import Crew, crew
from tests.distributed.test_shared_overlap import AFTER, BEFORE, losses_and_gradients, named, with_adapters
from tests.integrations.architectures import SIZES, VOCAB, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
ROWS, LENGTH, TIMES = 8, 64, 3
SOME_MS, LONG = 10_000_000, 1_000_000_000  # cycles of a clock below 2 GHz: more than 5 and 500 ms


class LateBackward(torch.autograd.Function):
    """y = x; the stream of its backward is held up first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        torch.cuda._sleep(SOME_MS)
        return dy


class SlowStream(SideStream):
    """Everything on it comes late: in the forward by `cycles`, in the backward by some ms."""

    def __init__(self, device: torch.device, cycles: int) -> None:
        super().__init__(device)
        self.cycles = cycles

    def start(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        def late(x: Tensor) -> Tensor:
            torch.cuda._sleep(self.cycles)
            return LateBackward.apply(function(x))

        return super().start(late, x)

    def is_busy(self) -> bool:
        return not self._stream.query()


@pytest.fixture(scope="module")
def gpus() -> Iterator[dict[int, Crew]]:
    with crew(2) as two:
        if torch.cuda.device_count() < 4:
            yield {2: two}
        else:
            with crew(4) as four:
                yield {2: two, 4: four}


@pytest.fixture(scope="module", params=[AFTER, BEFORE])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model, wide enough for tensor cores."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    wide = {"hidden_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    with patch.dict(SIZES, wide):
        build(named(request.param), "eager").save_pretrained(folder)
    return str(folder)


def spread(folder: str, sizes: ParallelSizes, device_type: str) -> tuple[nn.Module, torch.device]:
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    mesh = join_mesh(sizes, device_type, timeout_s=120)
    settings = {"experts_implementation": "expertune", "attn_implementation": "eager"}
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    model = with_adapters(build_skeleton(folder, dtype, **settings))
    spread_model(model, folder, dtype, mesh, device, **settings)
    return model.train(), device


def what_differs(
    folder: str,
    sizes: ParallelSizes,
    checkpointing: bool | None,
    lanes: Callable[[torch.device], list[Lane]],
    device_type: str = "cuda",
) -> dict[str, list[str]]:
    """Names of losses and gradients that are not bit for bit those of the first pass: of another, and of each lane.

    checkpointing: None without, else use_reentrant.
    """
    model, device = spread(folder, sizes, device_type)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    generator = torch.Generator().manual_seed(5 + int(os.environ["RANK"]))
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator).to(device)

    def passed() -> dict[str, Tensor]:
        found = losses_and_gradients(model, batches=2, ids=ids, autocast=device_type == "cuda")
        return {name: value.detach().cpu() for name, value in found.items()}

    def different() -> list[str]:
        got = passed()
        assert got.keys() == want.keys()
        return [name for name in want if not torch.equal(got[name], want[name])]

    want = passed()
    assert all(bool(value.isfinite().all()) for value in want.values())
    assert all(bool(want[name].any()) for name in want if ".shared_expert" in name)
    found = {"again": different()}
    for lane in lanes(device):
        overlap = overlap_shared_experts(model, lane)
        assert overlap.layers
        found[type(lane).__name__] = [name for _ in range(TIMES) for name in different()]
        overlap.remove()
    return found


def streams(device: torch.device) -> list[Lane]:
    return [SideStream(device), SlowStream(device, SOME_MS)]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "checkpointed, reentrant"])
@pytest.mark.parametrize("sizes", [ParallelSizes(expert=2), ParallelSizes(expert=2, shard=2)], ids=["ep", "ep x shard"])
def test_every_bit_is_the_same(
    sizes: ParallelSizes, checkpointing: bool | None, saved: str, gpus: dict[int, Crew]
) -> None:
    if sizes.world not in gpus:
        pytest.skip(f"needs {sizes.world} GPUs")
    for found in gpus[sizes.world].run(what_differs, saved, sizes, checkpointing, streams, timeout_s=300):
        assert found == {"again": [], "SideStream": [], "SlowStream": []}


def still_running(folder: str) -> list[bool]:
    """Whether, when a layer's routed experts were through, its shared experts were still at it; of each layer."""
    model, device = spread(folder, ParallelSizes(expert=2), "cuda")
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), device=device)
    lane, seen = SlowStream(device, 1), []

    def look(*_: Any) -> None:
        torch.cuda.current_stream().synchronize()
        seen.append(lane.is_busy())

    overlap = overlap_shared_experts(model, lane)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):  # compiling, loading and allocating may wait for the whole GPU
            model(input_ids=ids, use_cache=False)
        lane.cycles = LONG
        for layer in overlap.layers:
            for experts, _ in layer._shards:
                experts.register_forward_hook(look)
        model(input_ids=ids, use_cache=False)
    assert len(seen) == len(overlap.layers) > 0
    return seen


def test_tokens_travel_while_shared_experts_run(saved: str, gpus: dict[int, Crew]) -> None:
    for seen in gpus[2].run(still_running, saved, timeout_s=300):
        assert all(seen)
