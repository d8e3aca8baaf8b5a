"""PEFT's adapter of a router's weight [E, H], applied as a second linear in fp32 instead of folded into the weight:

    logits = F.linear(x, W) + s F.linear(F.linear(x, A), B)        x, A, B in fp32, the sum rounded to the logits' dtype

PEFT forms `W + s B A` in the dtype of W. In bf16 that rounds away what an adapter changes, where a router needs it
most, and where W is a DTensor it cannot be formed with A and B that are none.

Routers return different things (logits, or scores and indices that were chosen from them), so the sum must be made
inside of their forward. All of them give their weight, as it is or cast to fp32, to `F.linear`; a `TorchFunctionMode`
that is active in this thread during this forward sees that call. It leaves alone what does not involve the weight, and
whatever else is done with the weight gets `W + s B A` as PEFT forms it. `torch.compile` traces the mode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from expertune.integrations.notices import warn_once
from expertune.ops.experts.types import ExpertLora
from expertune.ops.routing.router import add_second_linear

_CASTS = (torch.Tensor.float, torch.Tensor.type, torch.Tensor.to)


class SecondLinear(TorchFunctionMode):
    """Within it, `F.linear` on one router's weight also applies adapters.

    weight: [E, H]. loras: a [1, R, H] and b [1, E, R], any number. fold: gives `W + s B A` of all of them, as PEFT
    does. name: how to call the router in a warning. applied: whether the weight has been used in a way that was seen.
    """

    def __init__(self, weight: Tensor, loras: Sequence[ExpertLora], fold: Callable[[], Tensor], name: str) -> None:
        super().__init__()
        self.same_weight = [weight]  # and its casts
        self.loras, self.fold, self.name = loras, fold, name
        self.applied = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):  # a shape, a dtype, a device
            return out
        if func is F.linear:
            x, weight = _linear_operands(*args, **kwargs)
            if self._is_weight(weight):
                self.applied = True
                return add_second_linear(out, x, self.loras)
            return out
        if not any(self._is_weight(value) for value in (*args, *kwargs.values())):
            return out
        if func in _CASTS:
            self.same_weight.append(out)
            return out
        self.applied = True
        warn_once(
            f"expertune leaves the adapter of a router to PEFT's fold: {self.name} uses its weight in "
            f"{getattr(func, '__name__', func)}, not in F.linear alone"
        )
        folded = self.fold()
        kwargs = dict(zip(kwargs, self._replaced(kwargs.values(), folded), strict=True))
        return func(*self._replaced(args, folded), **kwargs)

    def _is_weight(self, value: object) -> bool:
        return any(value is weight for weight in self.same_weight)

    def _replaced(self, values: Any, folded: Tensor) -> list[Any]:
        return [folded.to(value.dtype) if self._is_weight(value) else value for value in values]


def _linear_operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return input, weight
