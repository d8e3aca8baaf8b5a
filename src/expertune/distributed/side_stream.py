"""A CUDA stream beside the current one, and what its memory needs to know.

The caching allocator gives freed memory out again in the order of the stream that it was allocated on, so whatever the
other stream reads is told to it (`record_stream`). Nodes of autograd run on the stream of their forward, and autograd
lets streams wait where a gradient passes from one to the other.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """One more stream of a GPU. device: the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run `function(x)` after all that the current stream has been given so far, beside what it is given next.

        x: on the GPU. Whoever reads the result calls `wait` first.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        x.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            return function(x)

    def wait(self, result: Tensor | None = None) -> None:
        """Let the current stream wait for all that was started. result: what will be read on the current stream."""
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        if result is not None:
            result.record_stream(current)
