"""The fp32 truth of a problem, and how far a way is from it.

One expert at a time goes through the oracle of `ops` and back, so that at the shapes of real models only one expert's
weights and rows are in fp32 at once: y and every gradient are sums over experts, or belong to one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.bench.problem import SCALING, Problem
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.reference import reference_expert_mlp
from expertune.ops.experts.types import ExpertLora, ExpertProjection

_ACCUMULATION = torch.float32


def reference_step(problem: Problem) -> tuple[Tensor, ...]:
    """The output and the gradient of every leaf in fp32, from inputs as they are stored."""
    shape, rank = problem.case.shape, problem.case.rank
    y_TH = torch.zeros_like(problem.x_TH, dtype=_ACCUMULATION)
    grads = [torch.zeros_like(leaf, dtype=_ACCUMULATION) for leaf in problem.leaves]
    dx_TH, dweights_TK = grads[:2]
    # Views of each adapter's gradient by expert: A [E, R, in], B [E, out, R].
    da_up, db_up, da_down, db_down = grads[2:]
    by_expert = [grad.view(shape.num_experts, rank, -1) for grad in (da_up, da_down)]
    by_expert += [grad.view(-1, rank, shape.num_experts).permute(2, 0, 1) for grad in (db_up, db_down)]
    up, down = problem.projections()
    for expert in range(shape.num_experts):
        token_N, k_N = torch.where(problem.expert_ids_TK == expert)
        x_NH = _leaf(problem.x_TH[token_N])
        weights_N1 = _leaf(problem.weights_TK[token_N, k_N].unsqueeze(1))
        one_up, one_down = _one(up, expert), _one(down, expert)
        assert one_up.lora is not None
        assert one_down.lora is not None
        leaves = [x_NH, weights_N1]
        leaves += [one_up.lora.a_ERX, one_down.lora.a_ERX, one_up.lora.b_EYR, one_down.lora.b_EYR]
        ids_N1 = torch.zeros_like(weights_N1, dtype=torch.int64)
        y_NH = reference_expert_mlp(x_NH, ids_N1, weights_N1, one_up, one_down, SWIGLU)
        dx_NH, dweights_N1, *dadapters = torch.autograd.grad(y_NH, leaves, problem.dy_TH[token_N].to(_ACCUMULATION))
        y_TH.index_add_(0, token_N, y_NH.detach())
        dx_TH.index_add_(0, token_N, dx_NH)
        dweights_TK[token_N, k_N] = dweights_N1.squeeze(1)
        for total, grad_1 in zip(by_expert, dadapters, strict=True):
            total[expert] = grad_1[0]
    return y_TH, *grads


def relative_errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[float, ...]:
    """||got - want|| / ||want|| of each tensor, sums in fp64; infinite for a NaN, or if only zeros are right."""
    return tuple(_relative_error(one, other) for one, other in zip(got, want, strict=True))


def _relative_error(got: Tensor, want: Tensor) -> float:
    scale = torch.linalg.vector_norm(want, dtype=torch.float64).item()
    error = torch.linalg.vector_norm(got.float() - want, dtype=torch.float64).item()
    if not error < float("inf"):
        return float("inf")
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_ACCUMULATION).requires_grad_()


def _one(projection: ExpertProjection, expert: int) -> ExpertProjection:
    """The projection of one expert alone, its weight in fp32 and its adapter as leaves."""
    lora, rows = projection.lora, slice(expert, expert + 1)
    assert lora is not None
    adapter = ExpertLora(_leaf(lora.a_ERX[rows]), _leaf(lora.b_EYR[rows]), SCALING)
    return ExpertProjection(projection.weight_EYX[rows].to(_ACCUMULATION), lora=adapter)
