"""For tests that train in one process on a machine with several GPUs, where expertune asks which are meant."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

FIRST_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
"""The environment of a process of its own."""


@contextmanager
def one_gpu() -> Iterator[None]:
    """This process sees the first GPU only."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.device_count() > 1:
            patch.setattr(torch.cuda, "device_count", lambda: 1)
        yield
