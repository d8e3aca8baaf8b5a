"""Linears with a weight for each expert or one for all, and the adapter that trains beside them:

    y = W x + b + s B (A x)        A [R, in] and B [out, R] in fp32, [E, R, in] and [E, out, R] for stacked experts

A begins as PEFT begins it (Kaiming uniform, +-1 / sqrt(in)), B with zeros: a new adapter changes nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune.ops.experts.types import ExpertLora, ExpertProjection


@dataclass(frozen=True)
class LoraSpec:
    """One adapter: its rank R, and alpha, whose quotient is the scaling of B A.

    rslora: whether scaling is alpha / sqrt(R) instead of alpha / R.
    """

    rank: int
    alpha: float
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}, need at least 1")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class LoraPlaces:
    """Which linears of a MoEBlock have an adapter; None: not that one. A gated up projection is one linear."""

    experts_up: LoraSpec | None = None
    experts_down: LoraSpec | None = None
    router: LoraSpec | None = None
    shared_up: LoraSpec | None = None
    shared_down: LoraSpec | None = None
    shared_gate: LoraSpec | None = None

    @classmethod
    def on_experts(cls, rank: int, alpha: float, *, rslora: bool = False) -> "LoraPlaces":
        """The same adapter on both projections of the routed experts: the usual choice."""
        spec = LoraSpec(rank, alpha, rslora)
        return cls(experts_up=spec, experts_down=spec)

    def given(self) -> dict[str, LoraSpec]:
        """The places that have one, by name."""
        return {field.name: spec for field in fields(self) if (spec := getattr(self, field.name)) is not None}


class KeepsFp32(nn.Module):
    """A module some of whose own tensors, named in `keeps_fp32`, `.to(torch.bfloat16)` and `.half()` leave in fp32."""

    keeps_fp32: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = {name: getattr(self, name) for name in self.keeps_fp32}
        kept = {name: tensor.data for name, tensor in own.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            tensor = getattr(self, name)
            if tensor.itemsize < 4 <= data.itemsize:
                tensor.data = data.to(tensor.device)
                tensor.grad = None if tensor.grad is None else tensor.grad.to(data.dtype)
        return self


class WithAdapter(KeepsFp32):
    """weight: [..., out, in]. bias: [..., out] or None. lora_a, lora_b: the adapter, None without one."""

    keeps_fp32: tuple[str, ...] = ("lora_a", "lora_b")
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[:-1])) if bias else None)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.lora_scaling = 0.0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1 / sqrt(in), as nn.Linear's; biases zero; an adapter as new."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.lora_a is not None and self.lora_b is not None:
            nn.init.uniform_(self.lora_a, -bound, bound)
            nn.init.zeros_(self.lora_b)

    @property
    def lora(self) -> ExpertLora | None:
        """The adapter, as `ops` takes it: with a leading dimension of experts, 1 where there is one weight for all."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return ExpertLora(_stacked(self.lora_a), _stacked(self.lora_b), self.lora_scaling)

    def add_lora(self, spec: LoraSpec) -> None:
        """Make an adapter in fp32 (fp64 beside fp64 weights), on the device of the weight."""
        if self.lora_a is not None:
            raise ValueError("lora: there is an adapter already; merge_lora() folds it into the weight")
        *lead, num_out, num_in = self.weight.shape
        options: Any = {
            "dtype": torch.promote_types(self.weight.dtype, torch.float32),
            "device": self.weight.device,
        }
        self.lora_a = nn.Parameter(torch.empty(*lead, spec.rank, num_in, **options))
        self.lora_b = nn.Parameter(torch.zeros(*lead, num_out, spec.rank, **options))
        nn.init.uniform_(self.lora_a, -(num_in**-0.5), num_in**-0.5)
        self.lora_scaling = spec.scaling

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Add s B A to the weight, rounded once, and drop the adapter. An expert at a time: nothing of W's size."""
        if self.lora_a is None or self.lora_b is None:
            return
        for weight, a, b in zip(*map(_stacked, (self.weight, self.lora_a, self.lora_b)), strict=True):
            weight.copy_(weight.to(a.dtype) + self.lora_scaling * (b @ a))
        self.lora_a = self.lora_b = None

    def extra_repr(self) -> str:
        text = f"{list(self.weight.shape)}, bias={self.bias is not None}"
        return text if self.lora_a is None else f"{text}, rank={self.lora_a.shape[-2]}, scaling={self.lora_scaling:g}"


class LoraLinear(WithAdapter):
    """One linear: weight [out, in]."""

    def __init__(self, num_in: int, num_out: int, *, bias: bool = False) -> None:
        super().__init__((num_out, num_in), bias)

    def forward(self, x_TX: Tensor) -> Tensor:
        """[..., in] to [..., out], all of it in the dtype of the weight."""
        dtype = self.weight.dtype
        x_TX = x_TX.to(dtype)
        y_TY = F.linear(x_TX, self.weight, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return y_TY
        return y_TY + F.linear(F.linear(x_TX, self.lora_a.to(dtype)), self.lora_b.to(dtype)) * self.lora_scaling


class StackedLinear(WithAdapter):
    """The same projection of every expert: weight [E, out, in]. It has no forward; backends take `projection()`."""

    def __init__(self, num_experts: int, num_in: int, num_out: int, *, bias: bool = False) -> None:
        super().__init__((num_experts, num_out, num_in), bias)

    def projection(self) -> ExpertProjection:
        """Its tensors, as `ops.experts` takes them."""
        return ExpertProjection(self.weight, self.bias, self.lora)


def _stacked(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
