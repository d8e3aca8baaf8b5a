"""Axolotl's `scattermoe_lora`: its Triton kernels for experts with LoRA, called as Axolotl calls them.

Only that subpackage is imported. The packages above it would pull in the whole trainer with all its dependencies, so
they are entered without running their `__init__`; a folder that holds `axolotl/integrations/kernels/libs/
scattermoe_lora` alone is enough on the path.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from expertune.bench.problem import SCALING, Problem
from expertune.bench.rivals import Step, Unavailable, make_experts

_PARENTS = ("axolotl", "axolotl.integrations", "axolotl.integrations.kernels", "axolotl.integrations.kernels.libs")
_PACKAGE = f"{_PARENTS[-1]}.scattermoe_lora"


def axolotl(problem: Problem) -> Step:
    """`use_scattermoe: true` on a model with Transformers' experts interface: the registered experts forward."""
    layers, experts_forward = _library(problem, "layers"), _library(problem, "experts").scattermoe_experts_forward
    experts: Any = make_experts(problem, "eager")

    def step() -> tuple[Tensor, ...]:
        # What its patch of PEFT's wrapper does in every forward: adapters cast and put into its own order.
        experts._scattermoe_lora = {
            "gate_up_proj": (*_converted(layers, problem, problem.a_up, problem.b_up), SCALING),
            "down_proj": (*_converted(layers, problem, problem.a_down, problem.b_down), SCALING),
        }
        return problem.backward(experts_forward(experts, problem.x_TH, problem.expert_ids_TK, problem.weights_TK))

    return step


def axolotl_fused(problem: Problem) -> Step:
    """The same kernels with `use_fused_dX` and `use_fused_gather`, which its own MoE block sets on both projections."""
    layers, kernels = _library(problem, "layers"), _library(problem)
    experts: Any = make_experts(problem, "eager")
    fused = {"use_fused_dX": True, "use_fused_gather": True, "scaling": SCALING}

    def step() -> tuple[Tensor, ...]:
        shape, ids_TK = problem.case.shape, problem.expert_ids_TK
        routing = kernels.flatten_sort_count(ids_TK, num_experts=shape.num_experts)
        a, b = _converted(layers, problem, problem.a_up, problem.b_up)
        weight_EHJ = experts.gate_up_proj.transpose(2, 1)
        h_SJ = kernels.parallel_linear_lora(
            problem.x_TH, weight_EHJ, shape.top_k, *routing, lora_A=a, lora_B=b, grouped_out=True, **fused
        )
        gate, up = h_SJ.chunk(2, dim=-1)
        a, b = _converted(layers, problem, problem.a_down, problem.b_down)
        y_TH = kernels.parallel_linear_lora(
            experts.act_fn(gate) * up,
            experts.down_proj.transpose(2, 1),
            1,
            *routing,
            lora_A=a,
            lora_B=b,
            gates=problem.weights_TK,
            grouped_in=True,
            **fused,
        )
        return problem.backward(y_TH)

    return step


def _converted(layers: ModuleType, problem: Problem, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype, case = problem.x_TH.dtype, problem.case
    lora_a, lora_b = layers.peft_lora_to_scattermoe(a.to(dtype), b.to(dtype), case.shape.num_experts, case.rank)
    return lora_a, lora_b


def _library(problem: Problem, module: str = "") -> ModuleType:
    """`scattermoe_lora`, or a module of it."""
    spec = importlib.util.find_spec(_PARENTS[0])  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("the package axolotl is not installed (pip install --no-deps axolotl is enough)")
    if not problem.on_gpu:
        raise Unavailable("its Triton kernels need a GPU")
    enter_packages(Path(next(iter(spec.submodule_search_locations))))
    name = f"{_PACKAGE}.{module}" if module else _PACKAGE
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported: {error}") from error


def enter_packages(root: Path) -> None:
    """Make the packages above `scattermoe_lora` importable from `root` without running them; loaded ones stay."""
    for name in _PARENTS:
        if name not in sys.modules:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = importlib.util.module_from_spec(spec)
