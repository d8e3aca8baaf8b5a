"""The adapters' gradients: skinny outer products over the rows of each expert, in fp32, in a fixed order.

    out[e] [R, X] = sum over rows s of expert e of  p_s left_s [R]  right_r(s) [X]

One program owns R by BLOCK_X values of one expert and walks its rows: no atomics, the same bits every time, exact zeros
for an expert without rows. Bytes: right once, left once for each block of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.plan import ExpertPlan

BLOCK_ROWS = 64
BLOCK_COLUMNS = 128


@triton.jit
def _expert_outer_kernel(
    left_ptr,
    right_ptr,
    stride_right,
    row_index_ptr,
    scale_ptr,
    out_ptr,
    row_fence_ptr,
    width,
    GATHER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    ranks = tl.arange(0, RANK)
    end = tl.load(row_fence_ptr + expert + 1)
    acc = tl.zeros((RANK, BLOCK_X), dtype=tl.float32)
    for first in tl.range(tl.load(row_fence_ptr + expert), end, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        mask = rows < end
        sources = tl.load(row_index_ptr + rows, mask=mask, other=0) if GATHER else rows
        left = tl.load(left_ptr + rows.to(tl.int64)[:, None] * RANK + ranks[None, :], mask=mask[:, None], other=0.0)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + rows, mask=mask, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * scale[:, None]).to(left.dtype)
        right_ptrs = right_ptr + sources.to(tl.int64)[:, None] * stride_right + columns[None, :]
        right = tl.load(right_ptrs, mask=mask[:, None] & (columns < width)[None, :], other=0.0)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + (expert.to(tl.int64) * RANK + ranks)[:, None] * width + columns[None, :]
    tl.store(out_ptrs, acc, mask=(columns < width)[None, :])


def expert_outer(
    left_SR: Tensor, right_NX: Tensor, plan: ExpertPlan, *, gather: bool, scale_S: Tensor | None = None
) -> Tensor:
    """Sum `scale left^T right` over the rows of each expert: [E, R, X] fp32.

    left_SR: [S, R] contiguous, R a power of two from 16 on. right_NX: [S, X] in plan order, or, with `gather`, [T, X].
    """
    rank, width = left_SR.shape[1], right_NX.shape[1]
    out_ERX = torch.empty(plan.num_experts, rank, width, device=left_SR.device, dtype=torch.float32)
    _expert_outer_kernel[(triton.cdiv(width, BLOCK_COLUMNS), plan.num_experts)](
        left_SR,
        right_NX,
        right_NX.stride(0),
        plan.token_of_row_S if gather else None,
        scale_S,
        out_ERX,
        plan.row_fence_F,
        width,
        GATHER=gather,
        HAS_SCALE=scale_S is not None,
        RANK=rank,
        PRECISION="ieee" if left_SR.dtype == torch.float32 else "tf32",
        BLOCK_S=BLOCK_ROWS,
        BLOCK_X=BLOCK_COLUMNS,
    )
    return out_ERX
