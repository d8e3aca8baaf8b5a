"""Adapters laid out for the kernels and back, exactly: casts, padding, PEFT's strides."""

import pytest
import torch
from torch import Tensor

from expertune.ops.experts.scattermoe.pack import lay_out_as, pack_lora
from expertune.ops.experts.types import ExpertLora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
# the interpreter cuts fp32 off where it should round to bf16
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def peft_lora(experts: int, rank: int, num_in: int, num_out: int, dtype: torch.dtype = torch.float32) -> ExpertLora:
    """Views of the two matrices that PEFT stores: A expert-major, B with the expert index fastest."""
    a = torch.randn(experts * rank, num_in).to(DEVICE, dtype)
    b = torch.randn(num_out, rank * experts).to(DEVICE, dtype)
    return ExpertLora(a.view(experts, rank, num_in), b.view(num_out, rank, experts).permute(2, 0, 1), scaling=0.7)


def padding_to(rank: int, values_EXX: Tensor, dim: int) -> Tensor:
    """What lies past the rank."""
    return values_EXX.narrow(dim, rank, values_EXX.shape[dim] - rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("experts", "rank", "num_in", "num_out"),
    [(5, 4, 24, 32), (1, 1, 1, 1), (3, 3, 23, 13), (33, 16, 40, 24), (2, 300, 20, 17), (4, 64, 600, 500)],
)
def test_packed_is_cast_contiguous_and_padded_with_zeros(
    experts: int, rank: int, num_in: int, num_out: int, dtype: torch.dtype
) -> None:
    lora = peft_lora(experts, rank, num_in, num_out)
    packed = pack_lora(lora, dtype)
    width = max(16, 1 << (rank - 1).bit_length())
    assert (packed.rank, packed.padded_rank, packed.scaling) == (rank, width, 0.7)
    for got, want, dim in ((packed.a_ERX, lora.a_ERX, 1), (packed.b_EYR, lora.b_EYR, 2)):
        assert got.is_contiguous()
        assert got.dtype == dtype
        assert torch.equal(got.narrow(dim, 0, rank), want.to(dtype))
        assert got.shape[dim] == width
        assert not padding_to(rank, got, dim).any()


def test_what_lies_right_already_is_taken_as_it_is() -> None:
    a_ERX, b_EYR = torch.randn(3, 16, 24, device=DEVICE), torch.randn(3, 32, 16, device=DEVICE)
    packed = pack_lora(ExpertLora(a_ERX, b_EYR, 1.0), torch.float32)
    assert packed.a_ERX is a_ERX
    assert packed.b_EYR is b_EYR
    strided = ExpertLora(a_ERX, b_EYR.permute(1, 2, 0).contiguous().permute(2, 0, 1), 1.0)
    assert torch.equal(pack_lora(strided, torch.float32).b_EYR, b_EYR)


@pytest.mark.parametrize("mixed", [torch.float16, torch.bfloat16], ids=str)
def test_a_and_b_may_differ_in_dtype(mixed: torch.dtype) -> None:
    lora = peft_lora(3, 4, 24, 32)
    packed = pack_lora(ExpertLora(lora.a_ERX.to(mixed), lora.b_EYR, 1.0), torch.float32)
    assert torch.equal(packed.a_ERX[:, :4], lora.a_ERX.to(mixed).float())
    assert torch.equal(packed.b_EYR[..., :4], lora.b_EYR)


@pytest.mark.parametrize(
    ("experts", "rank", "num_out"), [(5, 4, 32), (1, 1, 1), (3, 3, 13), (33, 16, 300), (2, 300, 7)]
)
def test_laid_out_as_peft_stores(experts: int, rank: int, num_out: int) -> None:
    like = peft_lora(experts, rank, 8, num_out).b_EYR
    values_ERY = torch.randn(experts, rank, num_out, device=DEVICE)
    got = lay_out_as(values_ERY.transpose(1, 2), like)
    assert torch.equal(got, values_ERY.transpose(1, 2))
    assert got.stride() == like.stride()
    assert got.permute(1, 2, 0).is_contiguous()  # so that the gradient is a view in the parameter's own shape


def test_values_that_lie_right_already_are_returned() -> None:
    values = torch.randn(3, 32, 4, device=DEVICE)
    assert lay_out_as(values, torch.empty(3, 32, 4, device=DEVICE)) is values


def test_the_dtype_stays_that_of_the_values() -> None:
    like = peft_lora(3, 4, 8, 16, torch.float16).b_EYR
    got = lay_out_as(torch.randn(3, 16, 4, device=DEVICE), like)
    assert (got.dtype, got.stride()) == (torch.float32, like.stride())


def test_packed_and_laid_out_again_is_the_same() -> None:
    lora = peft_lora(5, 6, 24, 40)
    packed = pack_lora(lora, torch.float32)
    again = lay_out_as(packed.b_EYR[..., :6], lora.b_EYR)
    assert torch.equal(again, lora.b_EYR)
    assert again.stride() == lora.b_EYR.stride()
