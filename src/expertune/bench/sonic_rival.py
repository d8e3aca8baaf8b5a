"""The package `sonic-moe` (Guo et al., Apache-2.0) with adapters as PEFT gives them to it: folded into the weights.

Its kernels take a dense weight, so that their backward forms a dense dW, which autograd reduces to dA and dB. The fold
is PEFT's expression, evaluated once a step; its calls are those of Transformers' `sonicmoe`. Only the package's public
function is used; it is imported by the build of the step, nowhere else.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from expertune.bench.problem import SCALING, Problem
from expertune.bench.rivals import Step, Unavailable

_PACKAGE = "sonicmoe"


def sonic_moe_folded(problem: Problem) -> Step:
    """`moe_general_routing_inputs` on W + s B A."""
    library = _library(problem)
    swiglu = importlib.import_module(f"{_PACKAGE}.enums").ActivationType.SWIGLU
    (num_tokens, top_k), device = problem.expert_ids_TK.shape, problem.x_TH.device
    token_of_slot = torch.arange(num_tokens, device=device, dtype=torch.int32).repeat_interleave(top_k)

    def step() -> tuple[Tensor, ...]:
        gate_up_EJH = _folded(problem.gate_up_EJH, problem.a_up, problem.b_up)
        down_EHI = _folded(problem.down_EHI, problem.a_down, problem.b_down)
        y_TH, _ = library.moe_general_routing_inputs(
            problem.x_TH,
            problem.weights_TK.reshape(-1),
            token_of_slot,
            problem.expert_ids_TK.reshape(-1).int(),
            gate_up_EJH.permute(1, 2, 0),
            None,
            down_EHI.permute(1, 2, 0),
            None,
            E=problem.case.shape.num_experts,
            stream_id=None,
            activation_type=swiglu,
            concat_layout=True,
        )
        return problem.backward(y_TH)

    return step


def _folded(weight_EYX: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + s B A as PEFT's `ParamWrapper` forms it: the delta in the adapter's dtype, the sum in the base's."""
    num_experts = weight_EYX.shape[0]
    a_ERX, b_YRE = a.view(num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, num_experts)
    delta_EYX = torch.einsum("o r e, e r i -> e o i", b_YRE, a_ERX) * SCALING
    return weight_EYX + delta_EYX.to(weight_EYX.dtype)


def _library(problem: Problem) -> ModuleType:
    if importlib.util.find_spec(_PACKAGE) is None:
        raise Unavailable(
            "the package sonic-moe is not installed (pip install --no-deps sonic-moe, beside quack-kernels and "
            "nvidia-cutlass-dsl)"
        )
    if not problem.on_gpu or torch.cuda.get_device_capability(problem.x_TH.device) < (9, 0):
        raise Unavailable("its kernels need a GPU of compute capability 9.0 or newer")
    try:
        return importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise Unavailable(f"{_PACKAGE} cannot be imported: {error}") from error
