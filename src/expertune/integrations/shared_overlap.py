"""Shared experts that run while tokens travel to the routed ones, in Transformers' blocks as they are.

The routed experts are one call in a block, and the shared ones another, before or after it:

    shared after (DeepSeek-V3, GLM-4)      router | sizes leave, SHARED STARTS, sizes arrive | tokens leave, experts,
                                           results return | the block calls the shared experts: wait, hand over
    shared before (Qwen2-MoE, Ernie 4.5)   the block calls the shared experts: SHARED STARTS | router | sizes | tokens
                                           leave, experts, results return | the block reads what the call gave it: wait

In the first kind a hook takes the tensor that goes to the router; the dispatch starts the shared experts on it where
the host would only wait. What they gave is handed over if the block then calls them with that very tensor; otherwise
they are computed as if nothing had been started. In the second kind the call returns at once, and the first operation
on its result (`Unawaited`) waits.

Bit for bit the same. The shared experts' share of dx is added up before it meets that of the others, in the order of
the block without overlap: in the first kind x passes through a view of its own, whose gradient is that share; in the
second the graph is made where it always was.

Backward: autograd runs a node on the stream of its forward, those of later calls first: the experts' messages are
underway when the shared experts' gradients are launched. Before dx goes on, the stream waits for all that was launched
beside it, gradients of adapters included: FSDP2 sends these and frees the weights right after.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from expertune.distributed.dispatch import ExpertShard
from expertune.integrations.experts import SHARD
from expertune.layers.route import SHARED

ROUTER = ("gate", "router")


class Lane(Protocol):
    """Where work runs beside other work: `distributed.side_stream.SideStream`."""

    def start(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run `function(x)` there; nobody may read the result before `wait`."""

    def wait(self, result: Tensor | None = None) -> None:
        """Wait for all that was started, before `result` is read."""


@dataclass
class _Run:
    """Shared experts on a lane.

    x: their input. version: how often it had been written to; None: nobody will ask. modes: see `_modes`, of then.
    """

    lane: Lane
    x: Tensor
    result: Tensor
    version: int | None
    modes: tuple[Any, ...]
    is_awaited: bool = False

    def wait(self) -> None:
        if not self.is_awaited:
            self.is_awaited = True
            self.lane.wait(self.result)

    def result_for(self, y: Tensor) -> Tensor | None:
        """The result in the shape of y; None unless y is the input: the same values still, the same to autograd."""
        if not _is_same(self.x, y) or y._version != self.version or _modes(y) != self.modes:
            return None
        return self.result if y is self.x else self.result.view(*y.shape[:-1], self.result.shape[-1])


class Unawaited(Tensor):
    """A result that is still being computed; the first operation on it waits, whoever calls it."""

    run: _Run
    result: Tensor

    @staticmethod
    def of(result: Tensor, run: _Run) -> "Unawaited":
        """The result of a run, or a view of it, that nobody has read yet."""
        unawaited = result.as_subclass(Unawaited)
        unawaited.result, unawaited.run = result, run
        return unawaited

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = (args, kwargs or {})
        runs = [value.run for value in tree_leaves(operands) if isinstance(value, Unawaited)]
        args, kwargs = tree_map(lambda value: value.result if isinstance(value, Unawaited) else value, operands)
        if func is Tensor.view:  # AFMoE's, before the routed experts: another shape reads nothing
            return Unawaited.of(func(*args, **kwargs), runs[0])
        for run in runs:
            run.wait()
        return func(*args, **kwargs)


@dataclass
class _Block:
    """A forward of the module that has the shared experts.

    is_open: neither were they called nor have tokens left. noted: what the router got. run: what runs, or ran, early.
    handed_over: whether the block has it.
    """

    is_open: bool = False
    noted: Tensor | None = None
    run: _Run | None = None
    handed_over: bool = False


class EarlyShared:
    """The forward of a block's shared experts, in place of the module's own.

    owner: the module that has them. shared: they. lane: where they run early.
    It is open from the beginning of the owner's forward until the shared experts are called or tokens leave, and keeps
    nothing beyond the end of the owner's forward, however that ends.
    """

    def __init__(self, owner: nn.Module, shared: nn.Module, lane: Lane) -> None:
        self._shared, self._lane = shared, lane
        self._forward: Callable[..., Any] = shared.forward
        self._replaced = vars(shared).get("forward")
        self._block = _Block()
        self._handles: list[RemovableHandle] = [
            owner.register_forward_pre_hook(self._begin),
            # before FSDP2's hook, which frees the weights
            owner.register_forward_hook(self._end, prepend=True, always_call=True),
        ]
        beside = _beside_shared(owner, shared)
        if beside is not None:
            self._handles.append(beside.register_forward_pre_hook(self._note))
        self._shards: list[tuple[nn.Module, ExpertShard]] = []
        for experts in _sharded_experts(owner, shared):
            shard: ExpertShard = vars(experts)[SHARD]
            self._shards.append((experts, shard))
            setattr(experts, SHARD, replace(shard, meanwhile=self._start))
        shared.forward = self  # of this instance alone: all names stay

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for experts, shard in self._shards:
            setattr(experts, SHARD, shard)
        if vars(self._shared).get("forward") is self:
            del self._shared.forward
            if self._replaced is not None:
                self._shared.forward = self._replaced
        self._block = _Block()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward returns, whenever it was computed."""
        block = self._block
        was_open, block.is_open = block.is_open, False
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            if was_open:
                run = self._run(block, args[0], None)
                block.handed_over = True
                return Unawaited.of(run.result, run)
            if block.run is not None and not block.handed_over:
                result = block.run.result_for(args[0])
                if result is not None:
                    block.run.wait()
                    block.handed_over = True
                    return result
        return self._forward(*args, **kwargs)

    def _begin(self, owner: nn.Module, args: Any) -> None:
        self._block = _Block(is_open=True)

    def _note(self, beside: nn.Module, args: Any) -> None:
        if self._block.is_open and self._block.noted is None and args and isinstance(args[0], Tensor):
            self._block.noted = args[0]

    def _start(self) -> None:
        """Tokens leave: start, unless the block has called the shared experts already."""
        block = self._block
        was_open, block.is_open = block.is_open, False
        x = block.noted
        # Hooks before the forward belong to the block's own call; tensors of inference mode do not count writes.
        if was_open and x is not None and not self._shared._forward_pre_hooks and not x.is_inference():
            self._run(block, x, x._version)

    def _run(self, block: _Block, x: Tensor, version: int | None) -> _Run:
        """Start on x, in the block's own call (no version) or ahead of it."""
        given = x if version is None else x.view_as(x)
        block.run = _Run(self._lane, x, self._lane.start(self._forward, given), version, _modes(x))
        if given.requires_grad and torch.is_grad_enabled():
            given.register_hook(self._before_dx_goes_on)
        return block.run

    def _before_dx_goes_on(self, dx: Tensor) -> None:
        self._lane.wait()

    def _end(self, owner: nn.Module, args: Any, output: Any) -> None:
        if self._block.run is not None:
            self._block.run.wait()
        self._block = _Block()


@dataclass(frozen=True)
class SharedOverlap:
    """The layers of a model whose shared experts run while tokens travel."""

    layers: tuple[EarlyShared, ...]

    def remove(self) -> None:
        """Leave the model as it was."""
        for layer in self.layers:
            layer.remove()


def overlap_shared_experts(model: nn.Module, lane: Lane) -> SharedOverlap:
    """Let shared experts run on `lane` while tokens travel, wherever a module has both and the experts are sharded.

    model: after `spread_model`. Names of modules and parameters stay, and so does every bit that the model computes.
    A second call changes nothing. Left alone are shared experts that need more than one tensor (Inkling's take weights
    from the router) and those that FSDP2 gathers by themselves.
    """
    layers = []
    for owner in list(model.modules()):
        shared = next((module for name in SHARED if (module := owner._modules.get(name)) is not None), None)
        if shared is None or not any(_sharded_experts(owner, shared)):
            continue
        there = vars(shared).get("forward")
        if isinstance(there, EarlyShared):
            layers.append(there)
        elif _can_start(shared):
            layers.append(EarlyShared(owner, shared, lane))
    return SharedOverlap(tuple(layers))


def _sharded_experts(owner: nn.Module, shared: nn.Module) -> Iterator[nn.Module]:
    """The owner's experts modules whose tokens travel."""
    inside = set(shared.modules())
    yield from (module for module in owner.modules() if SHARD in vars(module) and module not in inside)


def _can_start(shared: nn.Module) -> bool:
    needed = [
        each
        for each in inspect.signature(shared.forward).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    return len(needed) == 1 and not any(isinstance(module, FSDPModule) for module in shared.modules())


def _beside_shared(owner: nn.Module, shared: nn.Module) -> nn.Module | None:
    """What the owner calls with the tensor that it calls its shared experts with: the router.

    Where the experts are in a block beside the shared ones (Granite's, in the layer), it is that block.
    """
    for child in owner.children():
        if child is not shared and any(_sharded_experts(child, shared)) and _has_router(child):
            return child
    return next((module for name in ROUTER if (module := owner._modules.get(name)) is not None), None)


def _has_router(module: nn.Module) -> bool:
    return any(module._modules.get(name) is not None for name in ROUTER)


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether y is x, or x in another shape and nothing else."""
    if y is x:
        return True
    if (y.data_ptr(), y.dtype, y.device, y.numel()) != (x.data_ptr(), x.dtype, x.device, x.numel()):
        return False
    if y.shape[-1:] != x.shape[-1:] or not (x.is_contiguous() and y.is_contiguous()):
        return False
    if not (x.requires_grad and y.requires_grad):
        return x.requires_grad == y.requires_grad
    # The same numbers could come with another gradient: detached, scaled on its way back.
    edge, above = get_gradient_edge(x), y.grad_fn
    if above is None or above.name() != "ViewBackward0":
        return False
    return above.next_functions == ((edge.node, edge.output_nr),)


def _modes(x: Tensor) -> tuple[Any, ...]:
    """What else the result of a forward depends on."""
    kind = x.device.type
    return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
