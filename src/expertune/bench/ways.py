"""The ways to compute a step: the limit, ours, and the rivals. Each is built for a problem, then called many times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from expertune.bench.axolotl_rival import axolotl, axolotl_fused
from expertune.bench.cases import unknown
from expertune.bench.problem import Problem
from expertune.bench.rivals import Step, Unavailable, peft_fold, split_on_grouped_mm
from expertune.bench.sonic_rival import sonic_moe_folded
from expertune.errors import ConfigError
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.torch_grouped import grouped_expert_mlp
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan, build_plan

LIMIT, OURS, RIVAL = "limit", "ours", "rival"

ExpertMlp = Callable[[Tensor, Tensor, ExpertPlan, ExpertProjection, ExpertProjection, Activation], Tensor]
MakePlan = Callable[[Tensor, ExpertProjection], ExpertPlan]


@dataclass(frozen=True)
class Way:
    """One way to compute a step.

    name: as on the command line. kind: "limit" (base products alone, dense), "ours" or "rival".
    build: makes the step for a problem: forward, backward, everything that real training repeats, the routing plan
        included. It may raise `Unavailable`.
    """

    name: str
    kind: str
    build: Callable[[Problem], Step]


def dense(problem: Problem) -> Step:
    """The products of the base, forward and gradient of the input, as if all rows had one expert: the limit."""
    shape, x_TH = problem.case.shape, problem.x_TH.detach()
    num_rows = problem.case.tokens * shape.top_k
    gate_up_JH, down_HI = problem.gate_up_EJH[0], problem.down_EHI[0]
    dz_SH, dh_SJ, a_SI = (
        torch.randn(num_rows, width, device=x_TH.device, dtype=x_TH.dtype)
        for width in (shape.hidden, 2 * shape.intermediate, shape.intermediate)
    )

    def step() -> tuple[Tensor, ...]:
        torch.mm(dz_SH, gate_up_JH.T)  # x and dz have one shape, so one tensor serves for both
        torch.mm(a_SI, down_HI.T)
        torch.mm(dz_SH, down_HI)
        torch.mm(dh_SJ, gate_up_JH)
        return ()

    return step


def plain_plan(expert_ids_TK: Tensor, up: ExpertProjection) -> ExpertPlan:
    """Without what only some backends want in it."""
    return build_plan(expert_ids_TK, up.num_experts)


def ours(backend: ExpertMlp, problem: Problem, make_plan: MakePlan = plain_plan) -> Step:
    """A backend of `ops`, as the integration calls it."""

    def step() -> tuple[Tensor, ...]:
        up, down = problem.projections()
        plan = make_plan(problem.expert_ids_TK, up)
        return problem.backward(backend(problem.x_TH, problem.weights_TK, plan, up, down, SWIGLU))

    return step


def scattermoe(problem: Problem) -> Step:
    """Our Triton kernels; imported here because Triton is not on every machine."""
    try:
        from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
        from expertune.ops.experts.scattermoe.products import build_plan_and_tables
    except ImportError as error:
        raise Unavailable(f"its kernels cannot be imported: {error}") from error
    return ours(scattermoe_expert_mlp, problem, build_plan_and_tables)


def sonicmoe(problem: Problem, adapter: Literal["low_rank", "materialize"]) -> Step:
    """Our kernels for Hopper, the adapter in their accumulator or folded into the weights."""
    try:
        from expertune.ops.experts.scattermoe.products import build_plan_and_tables
        from expertune.ops.experts.sonicmoe.mlp import sonicmoe_expert_mlp
    except ImportError as error:
        raise Unavailable(f"its kernels cannot be imported: {error}") from error
    return ours(partial(sonicmoe_expert_mlp, adapter=adapter), problem, build_plan_and_tables)


DENSE = Way("dense cuBLAS", LIMIT, dense)
WAYS = (
    DENSE,
    Way("scattermoe", OURS, scattermoe),
    Way("sonicmoe", OURS, partial(sonicmoe, adapter="low_rank")),
    Way("sonicmoe, materialized", OURS, partial(sonicmoe, adapter="materialize")),
    Way("torch_grouped", OURS, partial(ours, grouped_expert_mlp)),
    Way("axolotl scattermoe_lora", RIVAL, axolotl),
    Way("axolotl fused", RIVAL, axolotl_fused),
    Way("sonic-moe, folded adapter", RIVAL, sonic_moe_folded),
    Way("split on grouped_mm", RIVAL, split_on_grouped_mm),
    Way("peft fold + grouped_mm", RIVAL, peft_fold),
)


def select_ways(names: Sequence[str]) -> list[Way]:
    """The ways of these names, in any case, in the order of WAYS; none means all. The limit is always among them.

    Raises ConfigError for a name that does not exist.
    """
    known = [way.name for way in WAYS]
    wanted = {name.strip().lower() for name in names}
    for name in names:
        if name.strip().lower() not in {each.lower() for each in known}:
            raise ConfigError(f"--way: {unknown(name, known)}")
    return [way for way in WAYS if not wanted or way is DENSE or way.name.lower() in wanted]
