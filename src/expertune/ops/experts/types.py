"""The tensors of one expert projection, travelling together.

    y = W[e] x + b[e] + scaling * B[e] (A[e] x)

Shapes are always [experts, out, in]; a checkpoint that stores the transpose comes in as a strided view, never a copy.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Activation = Callable[[Tensor], Tensor]
"""Rows of the up projection [S, J] to rows of the down projection [S, I]; without parameters of its own."""


@dataclass(frozen=True)
class ExpertLora:
    """The low-rank adapter of one expert projection.

    a_ERX: [E, R, in]. b_EYR: [E, out, R]. Any float dtype (fp32 beside a bf16 base is the usual case), any strides.
    scaling: the factor of B A (lora_alpha / R, or lora_alpha / sqrt(R) for rsLoRA).
    """

    a_ERX: Tensor
    b_EYR: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a_ERX.shape[1]


@dataclass(frozen=True)
class ExpertProjection:
    """One of the two projections of an expert MLP, with its bias and its adapter if it has them.

    weight_EYX: [E, out, in]. bias_EY: [E, out] or None. lora: its adapter or None.
    """

    weight_EYX: Tensor
    bias_EY: Tensor | None = None
    lora: ExpertLora | None = None

    @property
    def num_experts(self) -> int:
        return self.weight_EYX.shape[0]

    def check(self, name: str) -> None:
        """Raise ValueError, naming the tensor, if the shapes do not belong together."""
        if self.weight_EYX.dim() != 3:
            raise ValueError(f"{name}.weight_EYX: got shape {tuple(self.weight_EYX.shape)}, need [experts, out, in]")
        num_experts, num_out, num_in = self.weight_EYX.shape
        if not self.weight_EYX.is_floating_point():
            raise ValueError(f"{name}.weight_EYX: got dtype {self.weight_EYX.dtype}, need a floating-point weight")
        if self.bias_EY is not None and self.bias_EY.shape != (num_experts, num_out):
            raise ValueError(f"{name}.bias_EY: got {tuple(self.bias_EY.shape)}, need {(num_experts, num_out)}")
        if self.lora is None:
            return
        a_shape, b_shape = tuple(self.lora.a_ERX.shape), tuple(self.lora.b_EYR.shape)
        rank = a_shape[1] if len(a_shape) == 3 else 0
        if rank < 1 or a_shape != (num_experts, rank, num_in):
            raise ValueError(f"{name}.lora.a_ERX: got {a_shape}, need ({num_experts}, rank, {num_in})")
        if b_shape != (num_experts, num_out, rank):
            raise ValueError(f"{name}.lora.b_EYR: got {b_shape}, need {(num_experts, num_out, rank)}")
