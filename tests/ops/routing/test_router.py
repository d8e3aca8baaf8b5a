"""A router's logits: fp32 whatever the dtypes, and adapters as a second linear."""

import pytest
import torch

from expertune.ops.experts.types import ExpertLora
from expertune.ops.routing.router import router_logits
from tests.comparing import assert_agrees

T, H, E, R = 30, 48, 12, 4


def tensors(
    dtype: torch.dtype, *, lora_scale: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertLora]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    lora = ExpertLora(randn(1, R, H), randn(1, E, R, scale=lora_scale), 0.5)
    return randn(T, H).to(dtype), randn(E, H, scale=0.1).to(dtype), randn(E).to(dtype), lora


def exact(x_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor, *loras: ExpertLora) -> torch.Tensor:
    weight = weight_EH.double() + sum(
        (each.b_EYR[0].double() @ each.a_ERX[0].double() * each.scaling for each in loras), torch.zeros(E, H).double()
    )
    return x_TH.double() @ weight.T + bias_E.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_loras", [0, 1, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_whatever_the_dtypes(dtype: torch.dtype, num_loras: int, autocast: bool) -> None:
    x_TH, weight_EH, bias_E, lora = tensors(dtype)
    loras = [lora] * num_loras
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits_TE = router_logits(x_TH, weight_EH, bias_E, loras=loras)
    assert logits_TE.dtype == torch.float32
    assert_agrees("logits", logits_TE, exact(x_TH, weight_EH, bias_E, *loras).float(), dtype=torch.float32)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float32])
def test_every_tensor_in_a_dtype_of_its_own(adapter: torch.dtype, weight: torch.dtype, hidden: torch.dtype) -> None:
    """Nothing is rounded beyond what the tensors themselves are, and each gradient has its tensor's dtype."""
    x_TH, weight_EH, bias_E, lora = tensors(torch.float32)
    a_ERX, b_EYR = (each.to(adapter).requires_grad_() for each in (lora.a_ERX, lora.b_EYR))
    x_TH, weight_EH = x_TH.to(hidden).requires_grad_(), weight_EH.to(weight).requires_grad_()
    lora = ExpertLora(a_ERX, b_EYR, lora.scaling)
    logits_TE = router_logits(x_TH, weight_EH, bias_E, loras=[lora])
    assert_agrees("logits", logits_TE, exact(x_TH, weight_EH, bias_E, lora).float(), dtype=torch.float32)
    leaves = (x_TH, weight_EH, a_ERX, b_EYR)
    for leaf, grad in zip(leaves, torch.autograd.grad(logits_TE.square().sum(), leaves), strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.norm() > 0


def test_an_adapter_below_the_last_place_of_the_weight_counts() -> None:
    x_TH, weight_EH, bias_E, lora = tensors(torch.bfloat16, lora_scale=1e-5)
    weight_EH = weight_EH + weight_EH.sign() * 0.1  # none so small that it would feel the adapter
    delta_EH = lora.b_EYR[0] @ lora.a_ERX[0] * lora.scaling
    assert torch.equal(weight_EH, (weight_EH + delta_EH).bfloat16())  # a fold would lose it
    moved = router_logits(x_TH, weight_EH, bias_E, loras=[lora]) - router_logits(x_TH, weight_EH, bias_E)
    want = x_TH.float() @ delta_EH.T
    assert (moved - want).norm() < 0.05 * want.norm()


def test_gradients_in_fp64() -> None:
    x_TH, weight_EH, bias_E, lora = (
        each.double() if isinstance(each, torch.Tensor) else each for each in tensors(torch.float32)
    )
    a_ERX, b_EYR = lora.a_ERX.double().requires_grad_(), lora.b_EYR.double().requires_grad_()
    inputs = (x_TH[:3].detach().requires_grad_(), weight_EH.requires_grad_(), bias_E.requires_grad_(), a_ERX, b_EYR)
    assert torch.autograd.gradcheck(lambda x, w, b, a, c: router_logits(x, w, b, loras=[ExpertLora(a, c, 0.5)]), inputs)


def test_wrong_shapes_are_named() -> None:
    x_TH, weight_EH, bias_E, _ = tensors(torch.float32)
    with pytest.raises(ValueError, match="hidden_TH"):
        router_logits(x_TH[:, 1:], weight_EH)
    with pytest.raises(ValueError, match="weight_EH"):
        router_logits(x_TH, weight_EH[0])
    with pytest.raises(ValueError, match="bias_E"):
        router_logits(x_TH, weight_EH, bias_E[1:])


def test_no_token() -> None:
    _, weight_EH, bias_E, lora = tensors(torch.bfloat16)
    assert router_logits(torch.zeros(0, H), weight_EH, bias_E, loras=[lora]).shape == (0, E)
