"""Which bytes a step holds at each moment, by kind: every storage that torch makes, from its birth to its death.

A `TorchDispatchMode` sees each operator's results, on real tensors and on fake ones alike. A storage counts from the
operator that made it until Python and autograd have let go of it. Sizes are rounded up to 512 bytes, as torch's CUDA
allocator rounds them, so a sum is what `torch.cuda.memory_allocated` says.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

ROUND_BYTES = 512  # torch's c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize

KEPT = "activations kept for the backward"
RECOMPUTED = "activations computed again"
PASSING = "gradients passing back"
EXPERTS = "experts' kernels"
HEAD = "LM head and loss"
EXCHANGE = "all-to-all buffers"
EXPERT_GRADIENTS = "gradients of expert adapters"
OTHER_GRADIENTS = "gradients of other adapters"

_SHARED = (EXPERT_GRADIENTS, OTHER_GRADIENTS)

Moment = Mapping[str, int]
"""Bytes by kind, at one moment."""


def rounded(num_bytes: int) -> int:
    """What the allocator takes for so many bytes."""
    return -(-num_bytes // ROUND_BYTES) * ROUND_BYTES


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What the storages of these tensors take, each counted once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(map(rounded, storages.values()))


class Ledger(TorchDispatchMode):
    """Counts while it is active; what was there before does not count.

    alive: bytes by kind, now. moments: those that may be the peak, also where gradients are shared among GPUs: at every
    other moment one of these has as much of each kind of gradients, and as much of all the rest.
    Without a `scope` the kind is by where it happens: in the forward, in what checkpointing computes again
    (`checkpointed`), or in the backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[str, int] = {}
        self._kept: list[tuple[tuple[int, ...], Moment]] = []
        self.in_backward = False
        self._kind_of: dict[int, tuple[str, int]] = {}  # of each storage that is alive: kind and bytes
        self._scope: tuple[str, list[int]] | None = None
        self._again = False
        self._grew = False

    @property
    def moments(self) -> list[Moment]:
        """See above."""
        return [moment for _, moment in self._kept]

    @property
    def peak_bytes(self) -> int:
        """The most that was alive at one time."""
        return max((sum(moment.values()) for moment in [*self.moments, self.alive]), default=0)

    @contextmanager
    def scope(self, kind: str, *, passing: bool = False) -> Iterator[None]:
        """What is made inside is of this kind; with `passing`, what outlives the block is then of its place's kind."""
        before, made = self._scope, list[int]()
        self._scope = (kind, made)
        try:
            yield
        finally:
            self._scope = before
            if passing:
                for key in made:
                    self._move(key, self._kind_here())

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """What is made inside of this during the backward is computed again."""
        self._again = self.in_backward
        try:
            yield
        finally:
            self._again = False

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Give the storage of a tensor another kind."""
        self._move(tensor.untyped_storage()._cdata, kind)

    def mark_gradient(self, parameter: Tensor, kind: str) -> RemovableHandle:
        """From now on the gradient of a parameter is of this kind once it is accumulated, until the hook is removed."""

        def mark(accumulated: Tensor) -> None:
            if accumulated.grad is not None:
                self.relabel(accumulated.grad, kind)

        return parameter.register_post_accumulate_grad_hook(mark)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._note(value, was_there=True)
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._note(value)
        return out

    def _note(self, tensor: Tensor, *, was_there: bool = False) -> None:
        """Count a storage that is new; one that was there before the ledger is known from now on, with no bytes."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kind_of:
            return
        size, kind = 0 if was_there else rounded(storage.nbytes()), self._kind_here()
        self._kind_of[key] = (kind, size)
        weakref.finalize(storage, self._forget, key).atexit = False
        self.alive[kind] = self.alive.get(kind, 0) + size
        self._grew = self._grew or size > 0
        if self._scope is not None and not was_there:
            self._scope[1].append(key)

    def _kind_here(self) -> str:
        if self._scope is not None:
            return self._scope[0]
        if not self.in_backward:
            return KEPT
        return RECOMPUTED if self._again else PASSING

    def _forget(self, key: int) -> None:
        if self._grew:  # the moment before the first release after growth is the only one that can be a peak
            self._keep_moment()
            self._grew = False
        kind, size = self._kind_of.pop(key)
        if size:
            self.alive[kind] -= size

    def _move(self, key: int, kind: str) -> None:
        if key not in self._kind_of:
            return
        before, size = self._kind_of[key]
        self._kind_of[key] = (kind, size)
        if size:
            self._grew = True
            self.alive[before] -= size
            self.alive[kind] = self.alive.get(kind, 0) + size

    def _keep_moment(self) -> None:
        now = {kind: size for kind, size in self.alive.items() if size}
        gradients = tuple(now.get(kind, 0) for kind in _SHARED)
        sizes = (sum(now.values()) - sum(gradients), *gradients)
        if any(_covers(more, sizes) for more, _ in reversed(self._kept)):
            return
        self._kept = [(less, moment) for less, moment in self._kept if not _covers(sizes, less)]
        self._kept.append((sizes, now))

    def __exit__(self, *error: Any) -> Any:
        self._keep_moment()
        return super().__exit__(*error)


def _covers(more: tuple[int, ...], less: tuple[int, ...]) -> bool:
    """Whether each part is at least as large in `more`."""
    return more[0] >= less[0] and more[1] >= less[1] and more[2] >= less[2]
