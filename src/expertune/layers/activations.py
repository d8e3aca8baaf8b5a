"""Activations of expert MLPs by name: rows of the up projection [S, J] to rows of the down projection [S, I].

A gated one has J = 2I columns, gate then up; the others have J = I.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.types import Activation

ActivationName = Literal["swiglu", "geglu", "geglu_tanh", "clamped_glu", "relu_squared"]


@dataclass(frozen=True)
class ClampedGlu:
    """gpt-oss: `(up + 1) g sigmoid(alpha g)` with `g = min(gate, limit)` and up clamped to -limit..limit."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, h_SJ: Tensor) -> Tensor:
        gate, up = h_SJ.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


@dataclass(frozen=True)
class Glu:
    """`function(gate) * up`, for any elementwise function without parameters."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, h_SJ: Tensor) -> Tensor:
        gate, up = h_SJ.chunk(2, dim=-1)
        return self.function(gate) * up


def gelu_tanh(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def relu_squared(h_SI: Tensor) -> Tensor:
    """Not gated: Nemotron-H."""
    return F.relu(h_SI).square()


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "swiglu": SWIGLU,
        "geglu": Glu(F.gelu),
        "geglu_tanh": Glu(gelu_tanh),
        "clamped_glu": ClampedGlu(),
        "relu_squared": relu_squared,
    }
)
NOT_GATED = ("relu_squared",)


def activation_named(activation: str | Activation) -> Activation:
    """The function of a name; a function is returned as it is. Raises ValueError for a name that is none."""
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        names = ", ".join(get_args(ActivationName))
        raise ValueError(f"activation: got {activation!r}, need one of {names}, or a function")
    return ACTIVATIONS[activation]


def is_gated(activation: str | Activation, gated: bool | None) -> bool:
    """Whether the up projection has 2I columns. gated: what the user says; None leaves it to the name, and to a
    function's being gated, as nearly all are."""
    known = (activation not in NOT_GATED) if isinstance(activation, str) else None
    if gated is not None and known is not None and gated != known:
        raise ValueError(f"gated: got {gated}, {activation} is {'' if known else 'not '}gated")
    return next((answer for answer in (gated, known) if answer is not None), True)


def check_activation(activation: str | Activation, gated: bool, width: int) -> None:
    """Raise ValueError unless the activation gives [S, width] and has no parameters of its own."""
    function = activation_named(activation)
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        raise ValueError("activation: a module with parameters; backends differentiate it by its input alone")
    if isinstance(activation, str):
        return
    num_up = 2 * width if gated else width
    got = tuple(function(torch.zeros(1, num_up)).shape)
    if got != (1, width):
        hint = "gated=False says that the up projection has as many columns as the down projection has inputs"
        raise ValueError(f"activation: [1, {num_up}] became {list(got)}, need [1, {width}] ({hint})")
