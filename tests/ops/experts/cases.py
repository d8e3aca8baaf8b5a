"""Random expert MLPs of every shape that the backends must get right, shared by the tests of all backends."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.ops.experts.reference import reference_expert_mlp
from expertune.ops.experts.types import Activation, ExpertLora, ExpertProjection


def swiglu(h_SJ: Tensor) -> Tensor:
    gate, up = h_SJ.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_glu(h_SJ: Tensor) -> Tensor:
    """Interleaved gate and up, clamped: gpt-oss."""
    gate, up = h_SJ[..., ::2].clamp(max=7.0), h_SJ[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def relu_squared(h_SI: Tensor) -> Tensor:
    """Non-gated: Nemotron-H."""
    return F.relu(h_SI).square()


GATED = {swiglu: True, clamped_glu: True, relu_squared: False}


@dataclass(frozen=True)
class Case:
    """Sizes and options of one random problem; `tokens_on` sends every token to the same experts."""

    tokens: int = 37
    top_k: int = 2
    experts: int = 5
    hidden: int = 24
    intermediate: int = 16
    rank: int = 4
    activation: Activation = swiglu
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    up_lora: bool = True
    down_lora: bool = True
    bias: bool = False
    transposed: bool = False
    base_grad: bool = False
    sentinels: bool = False
    all_on_first: bool = False
    weights_dtype: torch.dtype | None = None
    seed: int = 0


@dataclass
class Problem:
    case: Case
    x_TH: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    up: ExpertProjection
    down: ExpertProjection
    dy_TH: Tensor
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients of the oracle, computed in `dtype`."""
        y_TH = reference_expert_mlp(
            self.x_TH, self.expert_ids_TK, self.weights_TK, self.up, self.down, self.case.activation, dtype=dtype
        )
        return self.collect(y_TH)

    def collect(self, y_TH: Tensor) -> dict[str, Tensor]:
        """The output and the gradient of every leaf for the upstream gradient dy."""
        for leaf in self.leaves.values():
            leaf.grad = None
        if y_TH.requires_grad:
            y_TH.backward(self.dy_TH.to(y_TH.dtype))
        grads = {f"d{name}": leaf.grad.clone() for name, leaf in self.leaves.items() if leaf.grad is not None}
        return {"y": y_TH.detach(), **grads}


def make_problem(case: Case, device: str = "cpu") -> Problem:
    """Draw one problem: values of order 1 after each projection, `lora_b` random, never zero."""
    generator = torch.Generator().manual_seed(case.seed + 1000 * case.tokens + case.rank)
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        value = (torch.randn(shape, generator=generator) * scale).to(device, dtype or case.dtype).requires_grad_(grad)
        if grad:
            leaves[name] = value
        return value

    def projection(name: str, num_out: int, num_in: int, lora: bool) -> ExpertProjection:
        e, r = case.experts, case.rank
        shape = (e, num_in, num_out) if case.transposed else (e, num_out, num_in)
        stored = leaf(f"{name}_weight", *shape, scale=num_in**-0.5, grad=case.base_grad)
        weight = stored.transpose(1, 2) if case.transposed else stored
        bias = leaf(f"{name}_bias", e, num_out, scale=0.3, grad=case.base_grad) if case.bias else None
        if not lora:
            return ExpertProjection(weight, bias)
        # stored as PEFT does: expert-major A, expert-fastest B, so the views are not contiguous
        a = leaf(f"{name}_lora_a", e * r, num_in, scale=num_in**-0.5, dtype=case.adapter_dtype)
        b = leaf(f"{name}_lora_b", num_out, r * e, scale=r**-0.5, dtype=case.adapter_dtype)
        adapter = ExpertLora(a.view(e, r, num_in), b.view(num_out, r, e).permute(2, 0, 1), scaling=0.7)
        return ExpertProjection(weight, bias, adapter)

    num_up = 2 * case.intermediate if GATED[case.activation] else case.intermediate
    x_TH = leaf("x", case.tokens, case.hidden)
    weights_TK = leaf("weights", case.tokens, case.top_k, dtype=case.weights_dtype)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    scores[:, -1] = -1.0 if case.top_k < case.experts else scores[:, -1]  # the last expert gets no row
    if case.all_on_first:
        scores[:, : case.top_k] += 2
    expert_ids_TK = scores.topk(case.top_k, dim=-1).indices
    if case.sentinels:
        lost = torch.rand(case.tokens, case.top_k, generator=generator) < 0.4
        ids = torch.tensor([-1, case.experts, case.experts + 3])[torch.randint(3, lost.shape, generator=generator)]
        expert_ids_TK = torch.where(lost, ids, expert_ids_TK)
    return Problem(
        case=case,
        x_TH=x_TH,
        expert_ids_TK=expert_ids_TK.to(device),
        weights_TK=weights_TK,
        up=projection("up", num_up, case.hidden, case.up_lora),
        down=projection("down", case.hidden, case.intermediate, case.down_lora),
        dy_TH=torch.randn(case.tokens, case.hidden, generator=generator).to(device, case.dtype),
        leaves=leaves,
    )


CASES = {
    "plain": Case(),
    "no adapter": Case(up_lora=False, down_lora=False),
    "up only": Case(down_lora=False),
    "down only": Case(up_lora=False),
    "rank 1": Case(rank=1),
    "rank 3": Case(rank=3),
    "rank 16": Case(rank=16),
    "rank 64, above the width": Case(rank=64),
    "one token": Case(tokens=1),
    "no token": Case(tokens=0),
    "every expert": Case(top_k=5),
    "all on the first expert": Case(top_k=1, all_on_first=True),
    "odd widths": Case(hidden=23, intermediate=13, rank=5),
    "bias": Case(bias=True),
    "transposed, bias, interleaved": Case(transposed=True, bias=True, activation=clamped_glu),
    "not gated": Case(activation=relu_squared),
    "full fine-tuning": Case(base_grad=True, bias=True),
    "full, transposed, no adapter": Case(base_grad=True, transposed=True, up_lora=False, down_lora=False),
    "sentinels": Case(sentinels=True),
    "sentinels, bias, base grad": Case(sentinels=True, bias=True, base_grad=True),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16, fp32 adapters and routing": Case(
        dtype=torch.bfloat16, adapter_dtype=torch.float32, weights_dtype=torch.float32, rank=12
    ),
    "fp16": Case(dtype=torch.float16),
    "many experts": Case(tokens=200, experts=64, top_k=8, hidden=40, intermediate=24, rank=8),
}


def with_seed(case: Case, seed: int) -> Case:
    return replace(case, seed=seed)
