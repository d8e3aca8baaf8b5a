"""The oracle: the expert MLP with LoRA as a loop over experts, in fp32 or fp64, differentiated by autograd.

    h   = W1[e] x_t + b1[e] + s1 B1[e] (A1[e] x_t)
    z   = W2[e] act(h) + b2[e] + s2 B2[e] (A2[e] act(h))
    y_t = sum over the K experts e of token t of  p_te * z

It is slow and holds every intermediate; every other backend is compared with it, each value and each gradient.
"""

import torch
from torch import Tensor

from expertune.ops.experts.types import Activation, ExpertProjection


def reference_expert_mlp(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the expert MLP for every token, exactly as the formula above reads.

    x_TH: [T, H]. expert_ids_TK: [T, K]; ids outside 0 .. E - 1 contribute nothing. weights_TK: [T, K].
    up: [E, J, H]. down: [E, H, I]. activation: [*, J] to [*, I].
    dtype: everything is computed and returned in it (fp32, or fp64 for gradcheck). Gradients flow to every tensor.
    """
    x_TH, weights_TK = x_TH.to(dtype), weights_TK.to(dtype)
    y_TH = torch.zeros(x_TH.shape[0], down.weight_EYX.shape[1], dtype=dtype, device=x_TH.device)
    for expert in range(up.num_experts):
        token, k = torch.where(expert_ids_TK == expert)
        h = _project(x_TH[token], up, expert)
        z = _project(activation(h), down, expert)
        y_TH = y_TH.index_add(0, token, z * weights_TK[token, k, None])
    return y_TH


def _project(rows_NX: Tensor, projection: ExpertProjection, expert: int) -> Tensor:
    dtype = rows_NX.dtype
    out_NY = rows_NX @ projection.weight_EYX[expert].to(dtype).T
    if projection.bias_EY is not None:
        out_NY = out_NY + projection.bias_EY[expert].to(dtype)
    if projection.lora is not None:
        a_RX, b_YR = projection.lora.a_ERX[expert].to(dtype), projection.lora.b_EYR[expert].to(dtype)
        out_NY = out_NY + projection.lora.scaling * (rows_NX @ a_RX.T) @ b_YR.T
    return out_NY
