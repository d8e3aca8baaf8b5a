"""W + s B A and its gradients: gradcheck in fp64, one rounding, fp32 copies of a few experts only."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertune.ops.experts.sonicmoe import fold as fold_module
from expertune.ops.experts.sonicmoe.fold import fold, fold_projection
from expertune.ops.experts.torch_grouped import grouped_expert_mlp
from expertune.ops.experts.types import ExpertLora
from expertune.ops.plan import build_plan
from tests.comparing import assert_agrees, relative_error
from tests.ops.experts.cases import CASES, Case, make_problem

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
FP64 = Case(dtype=torch.float64, tokens=5, experts=3, hidden=7, intermediate=4, rank=2)


def test_gradcheck() -> None:
    up = make_problem(replace(FP64, base_grad=True, transposed=True)).up
    assert up.lora is not None

    def function(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fold(weight, ExpertLora(a, b, 0.7))

    inputs = [each.detach().clone().requires_grad_() for each in (up.weight_EYX, up.lora.a_ERX, up.lora.b_EYR)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_an_mlp_on_folded_weights_has_the_oracles_gradients_in_fp64() -> None:
    problem = make_problem(FP64)
    plan = build_plan(problem.expert_ids_TK, FP64.experts)
    up, down = fold_projection(problem.up), fold_projection(problem.down)
    y_TH = grouped_expert_mlp(problem.x_TH, problem.weights_TK, plan, up, down, FP64.activation)
    truth, got = problem.reference(torch.float64), problem.collect(y_TH)
    assert got.keys() == truth.keys()
    for key, want in truth.items():
        assert_agrees(key, got[key], want, dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    up = make_problem(Case(dtype=dtype, adapter_dtype=torch.float32, transposed=transposed)).up
    assert up.lora is not None
    folded = fold_projection(up)
    assert folded.lora is None
    assert folded.weight_EYX.dtype == dtype
    assert folded.weight_EYX.stride() == up.weight_EYX.stride()
    exact = up.weight_EYX.double() + 0.7 * (up.lora.b_EYR.double() @ up.lora.a_ERX.double())
    if dtype == torch.float32:
        assert relative_error(folded.weight_EYX, exact) < 1e-7
    else:
        away = (folded.weight_EYX != exact.to(dtype)).float().mean()  # ties of the fp32 sum aside
        assert float(away) < 1e-3


@pytest.mark.parametrize("values", [1, 400, 2**24])
def test_chunks_of_experts_change_no_bit(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    want = both_ways(make_problem(Case(experts=5, dtype=torch.bfloat16)))
    monkeypatch.setattr(fold_module, "CHUNK_VALUES", values)
    got = both_ways(make_problem(Case(experts=5, dtype=torch.bfloat16)))
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def both_ways(problem: object) -> list[Tensor]:
    up = problem.up  # type: ignore[attr-defined]
    lora = up.lora
    folded = fold(up.weight_EYX, lora)
    generator = torch.Generator().manual_seed(0)
    dfolded = torch.randn(folded.shape, generator=generator).to(folded.dtype)
    return [folded.detach(), *torch.autograd.grad(folded, (lora.a_ERX, lora.b_EYR), dfolded)]


def test_fp32_copies_are_of_a_few_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    up = make_problem(Case(experts=16, hidden=64, intermediate=32, dtype=torch.bfloat16, rank=2)).up
    monkeypatch.setattr(fold_module, "CHUNK_VALUES", 3 * 64 * 64)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                largest = max(largest, result.numel())
            return result

    with Watch():
        folded = fold_projection(up).weight_EYX
    folded.backward(torch.ones_like(folded))
    assert 0 < largest <= 3 * 64 * 64


def test_gradients_are_formed_only_where_they_are_wanted() -> None:
    up = make_problem(Case(dtype=torch.bfloat16, adapter_dtype=torch.float32)).up
    assert up.lora is not None
    lora = ExpertLora(up.lora.a_ERX.detach(), up.lora.b_EYR.detach().requires_grad_(), up.lora.scaling)
    folded = fold(up.weight_EYX, lora)
    folded.backward(torch.ones_like(folded))
    assert (up.weight_EYX.grad, lora.a_ERX.grad) == (None, None)
    assert lora.b_EYR.grad is not None
    assert lora.b_EYR.grad.dtype == torch.float32
    assert lora.b_EYR.grad.stride() == lora.b_EYR.stride()
    assert not fold(up.weight_EYX, ExpertLora(lora.a_ERX, lora.b_EYR.detach(), 1.0)).requires_grad


def test_without_an_adapter_nothing_is_formed() -> None:
    up = make_problem(CASES["no adapter"]).up
    assert fold_projection(up) is up
