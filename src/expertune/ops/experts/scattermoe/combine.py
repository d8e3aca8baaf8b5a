"""The K rows of each token summed, with routing weights or without, in fp32 and in order: no atomics.

y_t = sum over k of p_tk z_row(t, k)        one program reads K rows and writes one: (K + 1) H values of each token
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.integers import cdiv
from expertune.ops.plan import ExpertPlan
from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

BLOCK_COLUMNS = 1024


@triton.jit(do_not_specialize=["row_of_slot_ptr"])  # aligned only if the number of slots is even
def _combine_kernel(
    z_ptr,
    row_of_slot_ptr,
    weights_ptr,
    y_ptr,
    row_fence_ptr,
    num_experts,
    width,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_earlier_kernels()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_end = tl.load(row_fence_ptr + num_experts)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(TOP_K):
        row = tl.load(row_of_slot_ptr + token * TOP_K + k)
        mask = columns < tl.where(row < row_end, width, 0)  # nothing of a sentinel row
        z = tl.load(z_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            z *= tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        acc += z
    tl.store(y_ptr + token * width + columns, acc.to(y_ptr.dtype.element_ty), mask=columns < width)


_combine = Launcher(_combine_kernel)


def combine(z_SH: Tensor, weights_TK: Tensor | None, plan: ExpertPlan) -> Tensor:
    """Sum rows [S, H] in plan order to tokens [T, H]. weights_TK: contiguous, or None for a plain sum."""
    y_TH = z_SH.new_empty(plan.num_tokens, z_SH.shape[1])
    if plan.num_tokens:
        grid = (plan.num_tokens, cdiv(z_SH.shape[1], BLOCK_COLUMNS))
        _combine(
            grid, z_SH, plan.row_of_slot_S, weights_TK, y_TH, plan.row_fence_F, plan.num_experts, z_SH.shape[1],
            plan.top_k, weights_TK is not None, BLOCK_COLUMNS,
        )  # fmt: skip
    return y_TH
