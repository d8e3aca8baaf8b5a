"""Rows brought into plan order, and dot products of rows: what surrounds a projection.

    out_s = c_s x_r(s)                   grouping: r(s) is the token, or the slot, of row s; c its coefficient, if any
    dot_s = <g_s, x_r(s)>                stored at the slot of row s: the gradient of a coefficient

The gradient of x sums the K rows of a token: `combine`. Sums in fp32, no atomics. Bytes: grouping reads the row of a
token K times and writes S H values; dot products read 2 S H.
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

TILE = RowsTile(1, 1024, num_warps=2)  # the tile of SwiGLU's forward, a kernel of the same kind; not tuned for these


@triton.jit(launch_metadata=describe_rows("group_rows", "width", "HAS_COEFFICIENTS"))
def _group_rows_kernel(
    x_ptr, stride_x, row_index_ptr, coefficients_ptr, slot_of_row_ptr, out_ptr, row_fence_ptr, num_experts, width,
    HAS_COEFFICIENTS: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    in_expert = row < tl.load(row_fence_ptr + num_experts)  # a sentinel row is written, as zeros
    source = tl.load(row_index_ptr + row).to(tl.int64)
    mask = columns < tl.where(in_expert, width, 0)
    values = tl.load(x_ptr + source * stride_x + columns, mask=mask, other=0.0)
    if HAS_COEFFICIENTS:
        coefficient = tl.load(coefficients_ptr + tl.load(slot_of_row_ptr + row)).to(tl.float32)
        values = tl.where(mask, values.to(tl.float32) * coefficient, 0.0)
    out_ptrs = out_ptr + row.to(tl.int64) * width + columns
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=columns < width)


_group_rows = Launcher(_group_rows_kernel)


def launch_group_rows(x_NH: Tensor, coefficients_TK: Tensor | None, plan: ExpertPlan) -> Tensor:
    """out [S, H], contiguous, sentinel rows zero. x: dense rows. coefficients: contiguous, in slot order, or None."""
    width = x_NH.shape[1]
    out_SH = x_NH.new_empty(plan.num_rows, width)
    if plan.num_rows:
        block = min(TILE.columns, next_power_of_2(width))
        _group_rows(
            (plan.num_rows, cdiv(width, block)), x_NH, x_NH.stride(0), plan.token_of_row_S, coefficients_TK,
            plan.slot_of_row_S, out_SH, plan.row_fence_F, plan.num_experts, width, coefficients_TK is not None, block,
            num_warps=TILE.num_warps,
        )  # fmt: skip
    return out_SH


@triton.jit(launch_metadata=describe_rows("row_dots", "width", "GATHER"))
def _row_dots_kernel(
    left_ptr, stride_left, x_ptr, stride_x, row_index_ptr, slot_of_row_ptr, dots_ptr, row_fence_ptr, num_experts, width,
    GATHER: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(row_index_ptr + row).to(tl.int64) if GATHER else row
    end = tl.where(row < tl.load(row_fence_ptr + num_experts), width, 0)  # nothing of a sentinel row
    dots = tl.zeros((BLOCK_X,), dtype=tl.float32)
    for first in tl.range(0, end, BLOCK_X):
        columns = first + tl.arange(0, BLOCK_X)
        left = tl.load(left_ptr + row * stride_left + columns, mask=columns < end, other=0.0).to(tl.float32)
        dots += left * tl.load(x_ptr + source * stride_x + columns, mask=columns < end, other=0.0).to(tl.float32)
    tl.store(dots_ptr + tl.load(slot_of_row_ptr + row), tl.sum(dots, axis=0))


_row_dots = Launcher(_row_dots_kernel)


def launch_row_dots(left_SX: Tensor, x_NX: Tensor, row_index_S: Tensor | None, plan: ExpertPlan) -> Tensor:
    """<left_s, x_r(s)> in slot order: [T, K] fp32, zero for a sentinel slot. Both of dense rows."""
    new = left_SX.new_zeros if plan.has_sentinels else left_SX.new_empty
    dots_TK = new(plan.num_tokens, plan.top_k, dtype=torch.float32)
    if plan.num_rows:
        width = left_SX.shape[1]
        block = min(TILE.columns, next_power_of_2(width))
        _row_dots(
            (plan.num_rows,), left_SX, left_SX.stride(0), x_NX, x_NX.stride(0), row_index_S, plan.slot_of_row_S,
            dots_TK, plan.row_fence_F, plan.num_experts, width, row_index_S is not None, block,
            num_warps=TILE.num_warps,
        )  # fmt: skip
    return dots_TK
