"""Fixtures for every test: uninitialised memory is NaN, so that a value nobody wrote cannot pass."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import let_loops_have_bounds

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run in its interpreter
    let_loops_have_bounds()


@pytest.fixture(scope="module", autouse=True)
def short_garbage_collections() -> None:
    """What a file of tests finds loaded is not looked through for garbage again: half a second of each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or what extensions leave to the last collection is reported as leaked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
