"""One projection written plainly, row by row from the formula: what the pieces are compared with."""

import torch
from torch import Tensor

from expertune.ops.experts.types import ExpertProjection
from expertune.ops.plan import ExpertPlan


def local_rows(plan: ExpertPlan) -> Tensor:
    """[S, 1], 1 for a row of an expert and 0 for a sentinel row."""
    return (torch.arange(plan.num_rows, device=plan.row_fence_F.device) < plan.row_fence_F[-1]).unsqueeze(1)


def plain_linear(
    x_NX: Tensor,
    projection: ExpertProjection,
    plan: ExpertPlan,
    *,
    grouped: bool = False,
    output: str = "grouped",
    weights_TK: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`expert_linear` in `dtype`, differentiated by autograd, with every row's own copy of its weights."""
    expert_S, x_SX = plan.expert_of_row(), x_NX.to(dtype)
    x_SX = x_SX if grouped else x_SX[plan.token_of_row_S]
    out_SY = torch.einsum("sx,syx->sy", x_SX, projection.weight_EYX.to(dtype)[expert_S])
    if projection.bias_EY is not None:
        out_SY = out_SY + projection.bias_EY.to(dtype)[expert_S]
    if projection.lora is not None:
        u_SR = torch.einsum("sx,srx->sr", x_SX, projection.lora.a_ERX.to(dtype)[expert_S])
        b_SYR = projection.lora.b_EYR.to(dtype)[expert_S]
        out_SY = out_SY + projection.lora.scaling * torch.einsum("sr,syr->sy", u_SR, b_SYR)
    out_SY = torch.where(local_rows(plan), out_SY, 0.0)
    if output == "grouped":
        return out_SY
    out_TKY = out_SY[plan.row_of_slot_S].unflatten(0, (plan.num_tokens, plan.top_k))
    if output == "scattered":
        return out_TKY
    assert weights_TK is not None
    return (out_TKY * weights_TK.to(dtype).unsqueeze(-1)).sum(dim=1)
