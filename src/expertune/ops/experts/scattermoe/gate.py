"""SwiGLU between the two projections, and its backward with the routing weight's gradient in the same pass.

    a = silu(g) u                                   h [S, 2I] = g then u
    backward, from da (before the factor p):
    dp = <da, a>        dg = p da u s (1 + g (1 - s))        du = p da g s        s = sigmoid(g)

Saved: h alone; the backward writes a once more, for the adapter's gradient. Bytes: 3 I rows forward, 6 I backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.plan import ExpertPlan

BLOCK_COLUMNS = 512


@triton.jit
def _swiglu_kernel(h_ptr, a_ptr, row_end_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < tl.where(row < tl.load(row_end_ptr), width, 0)  # nothing of a sentinel row
    h_ptrs = h_ptr + row.to(tl.int64) * 2 * width + columns
    gate = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptrs + width, mask=mask, other=0.0).to(tl.float32)
    a = gate * tl.sigmoid(gate) * up
    tl.store(a_ptr + row.to(tl.int64) * width + columns, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(h_ptr, da_ptr, p_ptr, dh_ptr, a_ptr, dp_ptr, row_end_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    row_width = tl.where(row < tl.load(row_end_ptr), width, 0)  # nothing of a sentinel row
    p = tl.load(p_ptr + row).to(tl.float32)
    start = row.to(tl.int64) * width
    dp = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in tl.range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < row_width
        gate = tl.load(h_ptr + 2 * start + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + 2 * start + width + columns, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dp += da * silu * up
        dgate = p * da * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(dh_ptr + 2 * start + columns, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + 2 * start + width + columns, (p * da * silu).to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(a_ptr + start + columns, (silu * up).to(a_ptr.dtype.element_ty), mask=mask)
    tl.store(dp_ptr + row, tl.sum(dp, axis=0))  # zero for a sentinel row


def swiglu(h_SJ: Tensor, plan: ExpertPlan) -> Tensor:
    """a [S, I] from h [S, 2I], contiguous; sentinel rows are not written."""
    rows, width = h_SJ.shape[0], h_SJ.shape[1] // 2
    a_SI = h_SJ.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK_COLUMNS))
        _swiglu_kernel[grid](h_SJ, a_SI, plan.row_fence_F[-1:], width, BLOCK=BLOCK_COLUMNS)
    return a_SI


def swiglu_backward(h_SJ: Tensor, da_SI: Tensor, p_S: Tensor, plan: ExpertPlan) -> tuple[Tensor, Tensor, Tensor]:
    """(dh [S, 2I] scaled by p, a [S, I], dp [S] fp32); in sentinel rows dp is zero, dh and a are not written."""
    dh_SJ, a_SI = torch.empty_like(h_SJ), torch.empty_like(da_SI)
    dp_S = torch.empty(h_SJ.shape[0], device=h_SJ.device, dtype=torch.float32)
    if h_SJ.shape[0]:
        _swiglu_backward_kernel[(h_SJ.shape[0],)](
            h_SJ, da_SI, p_S, dh_SJ, a_SI, dp_S, plan.row_fence_F[-1:], da_SI.shape[1], BLOCK=BLOCK_COLUMNS
        )
    return dh_SJ, a_SI, dp_S
