"""SwiGLU between the two projections, and its backward with the routing weight's gradient in the same pass.

    a = silu(g) u                                   h [S, 2I] = g then u
    backward, from da (before the factor p):
    dp = <da, a>        dg = p da u s (1 + g (1 - s))        du = p da g s        s = sigmoid(g)

Saved: h alone. The backward can work in place: dh over h, and a, which the adapter's gradient needs once more,
over da. Bytes: 3 I values a row forward, 6 I backward; H200, S = 65536, I = 768: 4.1 TB/s.

Tried and not faster: the forward in the epilogue of the up projection. Much slower: the adapters' thin products and
sums in the same pass, for Triton keeps every value in the layouts of its stores and of its products (docs/log.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.experts.scattermoe.launches import describe_rows
from expertune.ops.experts.scattermoe.tiling import RowsTile
from expertune.ops.integers import cdiv, next_power_of_2
from expertune.ops.plan import ExpertPlan
from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

# One row a program, H200, S = 65536, I = 768: forward 71 us (256 columns, 4 warps: 123), backward 149 (1024, 4: 168).
FORWARD = RowsTile(1, 1024, num_warps=2)
BACKWARD = RowsTile(1, 256, num_warps=1)


@triton.jit(launch_metadata=describe_rows("swiglu", "width"))
def _swiglu_kernel(h_ptr, a_ptr, row_fence_ptr, num_experts, width, BLOCK_I: tl.constexpr):
    wait_for_earlier_kernels()
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = columns < tl.where(row < tl.load(row_fence_ptr + num_experts), width, 0)  # nothing of a sentinel row
    h_ptrs = h_ptr + row.to(tl.int64) * 2 * width + columns
    gate = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptrs + width, mask=mask, other=0.0).to(tl.float32)
    a = gate * tl.sigmoid(gate) * up
    tl.store(a_ptr + row.to(tl.int64) * width + columns, a.to(a_ptr.dtype.element_ty), mask=mask)


_swiglu = Launcher(_swiglu_kernel)


def swiglu(h_SJ: Tensor, plan: ExpertPlan) -> Tensor:
    """a [S, I] from h [S, 2I], contiguous; sentinel rows are not written."""
    rows, width = h_SJ.shape[0], h_SJ.shape[1] // 2
    a_SI = h_SJ.new_empty(rows, width)
    if rows:
        block = min(FORWARD.columns, next_power_of_2(width))
        grid = (rows, cdiv(width, block))
        _swiglu(grid, h_SJ, a_SI, plan.row_fence_F, plan.num_experts, width, block, num_warps=FORWARD.num_warps)
    return a_SI


@triton.jit(launch_metadata=describe_rows("swiglu_backward", "width", "WRITE_A"))
def _swiglu_backward_kernel(
    h_ptr, da_ptr, p_ptr, dh_ptr, a_ptr, slot_of_row_ptr, dweights_ptr, row_fence_ptr, num_experts, width,
    WRITE_A: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    row = tl.program_id(0)
    if row >= tl.load(row_fence_ptr + num_experts):
        return  # a sentinel row
    p = tl.load(p_ptr + row).to(tl.float32)
    start = row.to(tl.int64) * width
    dp = tl.zeros((BLOCK_I,), dtype=tl.float32)
    for first in tl.range(0, width, BLOCK_I):
        columns = first + tl.arange(0, BLOCK_I)
        mask = columns < width
        gate = tl.load(h_ptr + 2 * start + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + 2 * start + width + columns, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dp += da * silu * up
        dgate = p * da * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(dh_ptr + 2 * start + columns, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + 2 * start + width + columns, (p * da * silu).to(dh_ptr.dtype.element_ty), mask=mask)
        if WRITE_A:
            tl.store(a_ptr + start + columns, (silu * up).to(a_ptr.dtype.element_ty), mask=mask)
    slot = tl.load(slot_of_row_ptr + row)
    tl.store(dweights_ptr + slot, tl.sum(dp, axis=0).to(dweights_ptr.dtype.element_ty))


_swiglu_backward = Launcher(_swiglu_backward_kernel)


def swiglu_backward(
    h_SJ: Tensor, da_SI: Tensor, p_S: Tensor, plan: ExpertPlan, *, weights_dtype: torch.dtype, need_a: bool, reuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh [S, 2I] scaled by p, a [S, I] if needed, dweights [T, K] in `weights_dtype`).

    a is written over da, and with `reuse` dh over h. Sentinel rows: dweights is zero, dh and a are not written.
    """
    dh_SJ = h_SJ if reuse else torch.empty_like(h_SJ)
    new = torch.zeros if plan.has_sentinels else torch.empty
    dweights_TK = new(plan.num_tokens, plan.top_k, device=h_SJ.device, dtype=weights_dtype)
    if h_SJ.shape[0]:
        width = da_SI.shape[1]
        block = min(BACKWARD.columns, next_power_of_2(width))
        _swiglu_backward(
            (h_SJ.shape[0],), h_SJ, da_SI, p_S, dh_SJ, da_SI, plan.slot_of_row_S, dweights_TK, plan.row_fence_F,
            plan.num_experts, width, need_a, block, num_warps=BACKWARD.num_warps,
        )  # fmt: skip
    return dh_SJ, da_SI, dweights_TK
