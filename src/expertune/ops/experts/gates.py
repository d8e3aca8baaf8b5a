"""The gates that kernels know by heart. Each is also a plain function of torch, so it serves every backend."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """SwiGLU: `silu(gate) * up`, the J = 2I columns being gate then up.

    A kernel that meets a Gate computes it itself; any other activation is called as the function that it is.
    """

    name: str = "swiglu"

    def __call__(self, h_SJ: Tensor) -> Tensor:
        gate, up = h_SJ.chunk(2, dim=-1)
        return F.silu(gate) * up


SWIGLU = Gate()
