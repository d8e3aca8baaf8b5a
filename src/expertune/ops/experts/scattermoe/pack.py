"""Adapters as the kernels read them: A [E, R', in] and B [E, out, R'], contiguous, in the rows' dtype.

PEFT keeps fp32, and B with the expert index fastest, where two neighbours of one expert lie E values apart. One launch
casts both, lays B out anew and pads the rank with zeros to R', a power of two from 16 on (a tensor-core product needs
16). Bytes: every value read once and written once; H200, E = 128, 13 M values of both projections: about 25 us.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.ops.experts.scattermoe.tiling import pad_rank
from expertune.ops.experts.types import ExpertLora
from expertune.ops.integers import cdiv, next_power_of_2
from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

BLOCK_VALUES = 8192  # of one program, in registers: 32 values for each of 256 threads
BLOCK_EXPERTS = 32  # neighbours in PEFT's B: 128 bytes of fp32, one full line


class PackedLora(NamedTuple):
    """a_ERX: [E, R', in]. b_EYR: [E, out, R']. scaling: the adapter's. rank: R, without the padding."""

    a_ERX: Tensor
    b_EYR: Tensor
    scaling: float
    rank: int

    @property
    def padded_rank(self) -> int:
        """R'."""
        return self.a_ERX.shape[1]


@triton.jit
def _copy_block(
    source_ptr, stride_0, stride_1, stride_2, target_ptr, target_0, target_1, target_2,
    program, num_0, num_1, num_2, padded_1, padded_2,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
):  # fmt: skip
    blocks_2, blocks_1 = tl.cdiv(padded_2, BLOCK_2), tl.cdiv(padded_1, BLOCK_1)
    i0 = (program // (blocks_1 * blocks_2)) * BLOCK_0 + tl.arange(0, BLOCK_0)[:, None, None]
    i1 = ((program // blocks_2) % blocks_1) * BLOCK_1 + tl.arange(0, BLOCK_1)[None, :, None]
    i2 = (program % blocks_2) * BLOCK_2 + tl.arange(0, BLOCK_2)[None, None, :]
    source_ptrs = source_ptr + i0.to(tl.int64) * stride_0 + i1.to(tl.int64) * stride_1 + i2.to(tl.int64) * stride_2
    values = tl.load(source_ptrs, mask=(i0 < num_0) & (i1 < num_1) & (i2 < num_2), other=0.0)
    target_ptrs = target_ptr + i0.to(tl.int64) * target_0 + i1.to(tl.int64) * target_1 + i2.to(tl.int64) * target_2
    mask = (i0 < num_0) & (i1 < padded_1) & (i2 < padded_2)
    tl.store(target_ptrs, values.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pack_kernel(
    a_ptr, stride_ae, stride_ar, stride_ax, b_ptr, stride_be, stride_by, stride_br, packed_a_ptr, packed_b_ptr,
    programs_a, num_experts, num_in, num_out, rank,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    program = tl.program_id(0)
    if program < programs_a:
        _copy_block(
            a_ptr, stride_ae, stride_ar, stride_ax, packed_a_ptr, RANK * num_in, num_in, 1,
            program, num_experts, rank, num_in, RANK, num_in, 1, BLOCK_R, BLOCK_X,
        )  # fmt: skip
    else:
        _copy_block(
            b_ptr, stride_be, stride_by, stride_br, packed_b_ptr, num_out * RANK, RANK, 1,
            program - programs_a, num_experts, num_out, rank, num_out, RANK, BLOCK_E, BLOCK_Y, RANK,
        )  # fmt: skip


_pack = Launcher(_pack_kernel)


def pack_lora(lora: ExpertLora, dtype: torch.dtype) -> PackedLora:
    """Lay an adapter out for the kernels, in one launch; an adapter that lies so already is taken as it is."""
    (num_experts, rank, num_in), num_out = lora.a_ERX.shape, lora.b_EYR.shape[1]
    padded = pad_rank(rank)
    ready = rank == padded and lora.a_ERX.dtype == lora.b_EYR.dtype == dtype
    if ready and lora.a_ERX.is_contiguous() and lora.b_EYR.is_contiguous():
        return PackedLora(lora.a_ERX, lora.b_EYR, lora.scaling, rank)
    a_ERX = lora.a_ERX.new_empty(num_experts, padded, num_in, dtype=dtype)
    b_EYR = lora.b_EYR.new_empty(num_experts, num_out, padded, dtype=dtype)
    block_r, block_e = min(padded, 64), min(BLOCK_EXPERTS, next_power_of_2(num_experts))
    block_x, block_y = BLOCK_VALUES // block_r, max(1, BLOCK_VALUES // (block_e * padded))
    programs_a = num_experts * cdiv(padded, block_r) * cdiv(num_in, block_x)
    programs_b = cdiv(num_experts, block_e) * cdiv(num_out, block_y)
    _pack(
        (programs_a + programs_b,), lora.a_ERX, *lora.a_ERX.stride(), lora.b_EYR, *lora.b_EYR.stride(), a_ERX, b_EYR,
        programs_a, num_experts, num_in, num_out, rank, padded, block_r, block_x, block_e, block_y, num_warps=8,
    )  # fmt: skip
    return PackedLora(a_ERX, b_EYR, lora.scaling, rank)


@triton.jit
def _lay_out_kernel(
    source_ptr, stride_0, stride_1, stride_2, target_ptr, target_0, target_1, target_2, num_0, num_1, num_2,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    _copy_block(
        source_ptr, stride_0, stride_1, stride_2, target_ptr, target_0, target_1, target_2,
        tl.program_id(0), num_0, num_1, num_2, num_1, num_2, BLOCK_0, BLOCK_1, BLOCK_2,
    )  # fmt: skip


_lay_out = Launcher(_lay_out_kernel)


def empty_transposed(b_EYR: Tensor) -> Tensor:
    """[E, R, out], dense, of B's dtype and device: where a sum over rows puts B's gradient."""
    num_experts, num_out, rank = b_EYR.shape
    return b_EYR.new_empty(num_experts, rank, num_out)


def lay_out_as(values_EYR: Tensor, like_EYR: Tensor) -> Tensor:
    """values with the strides of `like`: a gradient of PEFT's B is then a view of the parameter's shape.

    Autograd would make the same copy, element by element out of E rows: 40 us on an H200 where this takes 8.
    """
    out_EYR = torch.empty_like(like_EYR, dtype=values_EYR.dtype)
    if out_EYR.stride() == values_EYR.stride():
        return values_EYR
    num_experts, num_out, rank = values_EYR.shape
    block_e, block_r = min(BLOCK_EXPERTS, next_power_of_2(num_experts)), next_power_of_2(rank)
    block_y = max(1, BLOCK_VALUES // (block_e * block_r))
    _lay_out(
        (cdiv(num_experts, block_e) * cdiv(num_out, block_y),), values_EYR, *values_EYR.stride(),
        out_EYR, *out_EYR.stride(), num_experts, num_out, rank, block_e, block_y, block_r, num_warps=8,
    )  # fmt: skip
    return out_EYR
