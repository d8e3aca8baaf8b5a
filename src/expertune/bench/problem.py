"""The tensors of one case, drawn at random: frozen base weights, adapters stored as PEFT does, a routing."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertune.bench.cases import ZIPF, Case
from expertune.layers.layout import lora_from_peft
from expertune.ops.experts.types import ExpertProjection

SCALING = 2.0  # lora_alpha is twice the rank, as in most recipes
GRADIENTS = ("dx", "dweights", "da_up", "db_up", "da_down", "db_down")
"""What a step returns after the output, in this order: the gradients of `Problem.leaves`."""


@dataclass(frozen=True)
class Problem:
    """What every way gets.

    x_TH: [T, H]. weights_TK: [T, K], routing weights, each token's sum to 1. expert_ids_TK: [T, K] int64.
    dy_TH: [T, H], the upstream gradient. gate_up_EJH: [E, 2I, H], gate rows first. down_EHI: [E, H, I].
    a_up: [E * R, H]. b_up: [2I, R * E]. a_down: [E * R, I]. b_down: [H, R * E]: fp32, PEFT's layout, in B the expert
    index is fastest. Gradients are wanted of x, the routing weights and the adapters; the base is frozen.
    """

    case: Case
    seed: int
    x_TH: Tensor
    weights_TK: Tensor
    expert_ids_TK: Tensor
    dy_TH: Tensor
    gate_up_EJH: Tensor
    down_EHI: Tensor
    a_up: Tensor
    b_up: Tensor
    a_down: Tensor
    b_down: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x_TH, self.weights_TK, self.a_up, self.b_up, self.a_down, self.b_down

    @property
    def on_gpu(self) -> bool:
        return self.x_TH.is_cuda

    def projections(self) -> tuple[ExpertProjection, ExpertProjection]:
        """Up and down as `ops` takes them: views, without a copy."""
        num_experts = self.case.shape.num_experts
        up = lora_from_peft(self.a_up, self.b_up, num_experts, SCALING)
        down = lora_from_peft(self.a_down, self.b_down, num_experts, SCALING)
        return ExpertProjection(self.gate_up_EJH, lora=up), ExpertProjection(self.down_EHI, lora=down)

    def backward(self, y_TH: Tensor) -> tuple[Tensor, ...]:
        """The output and the gradient of every leaf: what a step returns."""
        return y_TH.detach(), *torch.autograd.grad(y_TH, self.leaves, self.dy_TH)


def draw_problem(case: Case, *, seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Draw a problem whose values are of order 1 after each projection; `lora_b` is random, never zero."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, rank = case.shape, case.rank

    def normal(*sizes: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=to).mul_(scale)

    def adapter(num_out: int, num_in: int) -> tuple[Tensor, Tensor]:
        a = normal(shape.num_experts * rank, num_in, scale=num_in**-0.5, to=torch.float32)
        b = normal(num_out, rank * shape.num_experts, scale=rank**-0.5, to=torch.float32)
        return nn.Parameter(a), nn.Parameter(b)  # so that PEFT's own modules can hold them

    a_up, b_up = adapter(2 * shape.intermediate, shape.hidden)
    a_down, b_down = adapter(shape.hidden, shape.intermediate)
    weights_TK = normal(case.tokens, shape.top_k, to=torch.float32).softmax(dim=-1).to(dtype)
    return Problem(
        case=case,
        seed=seed,
        x_TH=normal(case.tokens, shape.hidden).requires_grad_(),
        weights_TK=weights_TK.requires_grad_(),
        expert_ids_TK=draw_routing(case, generator),
        dy_TH=normal(case.tokens, shape.hidden),
        gate_up_EJH=normal(shape.num_experts, 2 * shape.intermediate, shape.hidden, scale=shape.hidden**-0.5),
        down_EHI=normal(shape.num_experts, shape.hidden, shape.intermediate, scale=shape.intermediate**-0.5),
        a_up=a_up,
        b_up=b_up,
        a_down=a_down,
        b_down=b_down,
    )


def draw_routing(case: Case, generator: torch.Generator) -> Tensor:
    """[T, K] int64: K distinct experts for each token.

    uniform: every expert is as likely. zipf: the expert that a random permutation puts at place n is chosen in
    proportion to 1/n, without replacement, so that a few experts get most rows, as in a router that has not balanced.
    """
    num_experts, device = case.shape.num_experts, generator.device
    popularity_E = torch.ones(num_experts, device=device)
    if case.routing == ZIPF:
        popularity_E = 1 / (torch.randperm(num_experts, generator=generator, device=device) + 1).float()
    # An exponential race: the K smallest of Exp(1) / popularity are a draw of K without replacement.
    clocks_TE = torch.empty(case.tokens, num_experts, device=device).exponential_(generator=generator) / popularity_E
    return clocks_TE.topk(case.shape.top_k, dim=-1, largest=False).indices
