"""Rivals that need nothing but torch, Transformers and PEFT: LoRA as extra grouped products, and PEFT's own fold."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from expertune.bench.problem import SCALING, Problem
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.types import ExpertProjection
from expertune.ops.plan import ExpertPlan, build_plan

Step = Callable[[], tuple[Tensor, ...]]
"""Forward and backward: the output and the gradients of `Problem.leaves`, or nothing (the limit)."""


class Unavailable(Exception):
    """A way cannot run here; the message says why and, if there is one, the way out."""


def split_on_grouped_mm(problem: Problem) -> Step:
    """LoRA beside the base: three grouped products for each projection, differentiated by autograd.

    The sort is ours, which is free of synchronisation, and the gather is `index_select`, whose gradient needs no sort.
    """

    def step() -> tuple[Tensor, ...]:
        plan = build_plan(problem.expert_ids_TK, problem.case.shape.num_experts)
        up, down = problem.projections()
        x_SH = problem.x_TH.index_select(0, plan.token_of_row_S)
        z_SH = _split_projection(SWIGLU(_split_projection(x_SH, up, plan)), down, plan)
        weights_S = problem.weights_TK.reshape(-1).index_select(0, plan.slot_of_row_S)
        rows_SH = (z_SH * weights_S.unsqueeze(1)).index_select(0, plan.row_of_slot_S)
        return problem.backward(rows_SH.unflatten(0, problem.weights_TK.shape).sum(dim=1))

    return step


def _split_projection(rows_SX: Tensor, projection: ExpertProjection, plan: ExpertPlan) -> Tensor:
    lora, ends_E = projection.lora, plan.row_ends_E
    assert lora is not None
    a_ERX, b_EYR = lora.a_ERX.to(rows_SX.dtype), lora.b_EYR.to(rows_SX.dtype).contiguous()
    u_SR = F.grouped_mm(rows_SX, a_ERX.transpose(1, 2), offs=ends_E)
    delta_SY = F.grouped_mm(u_SR, b_EYR.transpose(1, 2), offs=ends_E)
    return F.grouped_mm(rows_SX, projection.weight_EYX.transpose(1, 2), offs=ends_E) + SCALING * delta_SY


def peft_fold(problem: Problem) -> Step:
    """What Transformers and PEFT do by themselves: the real ParamWrapper around experts on grouped_mm."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError as error:
        raise Unavailable(f"PEFT cannot be imported: {error}") from error
    rank = problem.case.rank
    config = LoraConfig(
        r=rank,
        lora_alpha=round(SCALING * rank),
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    block: Any = nn.Module()
    block.experts = make_experts(problem, "grouped_mm")
    inject_adapter_in_model(config, block)
    adapters = {"gate_up_proj": (problem.a_up, problem.b_up), "down_proj": (problem.a_down, problem.b_down)}
    for module in block.modules():
        if isinstance(module, ParamWrapper):
            a, b = adapters.pop(module.parameter_name)
            # The very parameters of the problem, in fp32, as `get_peft_model` keeps them.
            (module.lora_A["default"].weight, module.lora_B["default"].weight) = a, b
    if adapters:
        raise Unavailable(f"this version of PEFT did not adapt {' and '.join(adapters)}")

    def step() -> tuple[Tensor, ...]:
        return problem.backward(block.experts(problem.x_TH, problem.expert_ids_TK, problem.weights_TK))

    return step


def make_experts(problem: Problem, implementation: str) -> nn.Module:
    """The experts of one layer as Transformers' modelling code has them, on the problem's own weights.

    implementation: a name in Transformers' experts interface.
    """
    try:
        from transformers.integrations import use_experts_implementation
    except ImportError as error:
        raise Unavailable(f"Transformers' experts interface cannot be imported: {error}") from error

    @use_experts_implementation
    class Experts(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.num_experts = problem.case.shape.num_experts
            self.gate_up_proj = nn.Parameter(problem.gate_up_EJH, requires_grad=False)
            self.down_proj = nn.Parameter(problem.down_EHI, requires_grad=False)
            self.act_fn = nn.SiLU()

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise NotImplementedError("Transformers' experts interface did not take the call over")

    return cast(nn.Module, Experts(SimpleNamespace(_experts_implementation=implementation)))
