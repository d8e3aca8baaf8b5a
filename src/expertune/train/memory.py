"""Peak memory of this process: the GPU's if there is one, else resident memory."""

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """The most memory held so far: allocated by torch on the current GPU, or resident on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
