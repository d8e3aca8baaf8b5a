"""A small case on a real GPU, in bf16, with device events."""

import pytest
import torch

from expertune.bench.cases import Case, ExpertShape
from expertune.bench.measure import measure
from expertune.bench.problem import draw_problem
from expertune.bench.run import find_gpu
from expertune.bench.timing import CudaTimer
from expertune.bench.ways import WAYS

pytestmark = pytest.mark.gpu
CASE = Case(ExpertShape("small", 16, 512, 256, 4), 1024, 16, "zipf")


def test_every_way_that_needs_no_rival_package_is_right_and_timed() -> None:
    device, timer = find_gpu()
    ways = [way for way in WAYS if not way.name.startswith(("axolotl", "sonic-moe"))]
    problem = draw_problem(CASE, seed=0, device=device)
    for result in measure(problem, ways, timer, repeats=5, tell=print):
        assert result.status == "ok", f"{result.way}: {result.note}"
        assert result.p50_ms is not None
        assert result.p50_queued_ms is not None
        assert 0 < result.p50_queued_ms < 1.5 * result.p50_ms
        assert result.peak_gib is not None
        assert result.peak_gib > 0
        assert result.worst_error is None or result.worst_error < 0.02


def test_queued_does_not_count_the_gaps_between_launches() -> None:
    _, timer = find_gpu()
    assert isinstance(timer, CudaTimer)
    small = torch.ones(8, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        for _ in range(200):
            small.add_(1)
        return ()

    step()
    idle = timer.idle(step)
    assert idle.host_ms > 0
    assert timer.queued(step, idle.host_ms) < idle.device_ms
