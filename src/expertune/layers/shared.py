"""Shared experts of a MoEBlock: the MLP of every token, beside the experts that a router chose for it.

y = sigmoid(G x) * (W2 act(W1 x))        the factor only where there is a gate
"""

from typing import cast

import torch
from torch import Tensor, nn

from expertune.layers.lora import LoraLinear
from expertune.ops.experts.types import Activation


class SharedExperts(nn.Module):
    """Shared experts of a MoEBlock. n experts of width I are one MLP of width n I: their sum.

    up: [J, H]. down: [H, I]. gate: [1, H] or None.
    """

    def __init__(self, hidden: int, num_up: int, width: int, activation: Activation, *, gate: bool = False) -> None:
        super().__init__()
        self.up = LoraLinear(hidden, num_up)
        self.down = LoraLinear(width, hidden)
        self.gate = LoraLinear(hidden, 1) if gate else None
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., H] in the dtype of the input; computed in the dtype of the weights."""
        with torch.autocast(hidden.device.type, enabled=False):
            out = self.down(self.activation(self.up(hidden)))
            if self.gate is not None:
                out = torch.sigmoid(self.gate(hidden)) * out
        return cast(Tensor, out.to(hidden.dtype))
