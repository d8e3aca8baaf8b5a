"""The way that tokens took in a checkpointed forward, for the recomputation of that forward.

Checkpointing runs a layer's forward once more in the backward. Its tokens choose the same experts, so they travel the
same ways: no sizes have to be exchanged, and the host has not to wait for them, once a layer and step less; nor are
expert ids and routing weights sent again. Autograd's graph has what the forward found out; with non-reentrant
checkpointing it comes to the recomputation in this order:

    backward of the results' return        leaves it here
    backward of the experts                asks for a saved tensor, so the forward runs again and takes it

Where something behind the experts saves a tensor too, the forward runs again before anything was left, exchanges
sizes, and what comes next leaves nothing. Reentrant checkpointing keeps no graph and always exchanges. Every process
runs the same program, so all of them come to the same decision.
"""

from typing import Generic, TypeVar

import torch

Found = TypeVar("Found")
_NO_BACKWARD = -1


class Recall(Generic[Found]):
    """Of one layer: what its forward found out, from that forward's backward to its recomputation."""

    def __init__(self) -> None:
        self._left: tuple[int, Found] | None = None  # in which backward, and what
        self._ran_again_in = _NO_BACKWARD

    def leave(self, found: Found) -> None:
        """In the backward of the layer's end: `found` is what its forward found out."""
        backward = torch._C._current_graph_task_id()
        if self._ran_again_in == backward:
            self._ran_again_in = _NO_BACKWARD
        else:
            self._left = backward, found

    def take(self) -> Found | None:
        """At the start of a forward: what was left for it; None outside of a backward, and where nothing was."""
        backward, (left, self._left) = torch._C._current_graph_task_id(), (self._left, None)
        if backward == _NO_BACKWARD:
            return None
        if left is not None and left[0] == backward:
            return left[1]
        self._ran_again_in = backward
        return None

    def drop(self, found: Found) -> None:
        """In the backward of the layer's start: nobody will ask for it any more."""
        if self._left is not None and self._left[1] is found:
            self._left = None
