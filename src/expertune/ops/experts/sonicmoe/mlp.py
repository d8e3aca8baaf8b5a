"""The expert MLP for Hopper and newer GPUs, with the adapter applied in one of two ways.

    low_rank       h = W x + s B (A x): the adapter is one more step in the accumulator of the base product. Nothing of
                   W's size is formed, forward or backward.
    materialize    W_eff = W + s B A (`fold`), once a forward; then products without an adapter, whose dense dW gives
                   dA and dB. What a kernel that takes dense weights only would need, kept to measure such kernels by.

Both run the products of `scattermoe`, whose tiles for Hopper are computed by the kernel of `scattermoe.hopper`; what
that does not take (`hopper.takes`: other GPUs, fp32, odd widths, ranks above 64) runs in the kernel of
`scattermoe.linear`, to the same bits. Which of them ran is in a launch's record: "hopper_linear" or "expert_linear".
"""

from typing import Literal

from torch import Tensor

from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.sonicmoe.fold import fold_projection
from expertune.ops.experts.torch_grouped import check_expert_mlp
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan

Adapter = Literal["low_rank", "materialize"]
ADAPTERS: tuple[Adapter, ...] = ("low_rank", "materialize")


def sonicmoe_expert_mlp(
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
    *,
    adapter: Adapter = "low_rank",
    tile: LinearTile | None = None,
) -> Tensor:
    """Compute `y_t = sum over K of p (W2 act(W1 x + ...) + ...)`; arguments and gradients of `scattermoe_expert_mlp`.

    adapter: "low_rank" or "materialize"; the same up to rounding. Without adapters there is no difference.
    tile: of the four big products; by default the table's, which on Hopper is that of its own kernel.
    A frozen base gets no gradient either way; materialize forms a dense dW of each adapted projection to reduce it to
    dA and dB, in fp32 from a dW in the base's dtype. low_rank is deterministic, also bit for bit.
    Raises ValueError, naming the argument, if arguments do not belong together.
    """
    if adapter not in ADAPTERS:
        raise ValueError(f"adapter: got {adapter!r}, need one of {', '.join(ADAPTERS)}")
    if adapter == "materialize":
        check_expert_mlp(x_TH, weights_TK, plan, up, down)
        up, down = fold_projection(up), fold_projection(down)
    return scattermoe_expert_mlp(x_TH, weights_TK, plan, up, down, activation, tile=tile)
