"""The named shapes, and medians of ways timed in turn in one process."""

import statistics
from collections.abc import Callable

import torch

SHAPES = {  # experts, hidden, intermediate, experts per token, tokens
    "Qwen3-30B-A3B": (128, 2048, 768, 8, 8192),
    "GLM-4.5-Air": (128, 4096, 1408, 8, 8192),
    "Mixtral-8x7B": (8, 4096, 14336, 2, 8192),
}


def medians(ways: dict[str, Callable[[], object]], repeats: int = 20) -> dict[str, tuple[float, float, float]]:
    """p20, p50 and p80 in ms of each way, all ways in turn within each repeat."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for way in ways.values():
            way()
    for _ in range(repeats):
        for name, way in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            way()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: tuple(statistics.quantiles(t, n=10)[i] for i in (1, 4, 7)) for name, t in times.items()}
