"""The expert MLP with LoRA on both projections, forward and backward, on a GPU: ours beside dense cuBLAS.

    python benchmarks/expert_mlp.py OUT.csv

bf16, rank 16, fp32 adapters, frozen base; gradients of x, adapters and routing weights; uniform routing; the plan is
built in every step; every way in turn. "Dense" is cuBLAS doing the FLOPs of the base products (both forward, dx of
both). Peak is above what the inputs take. The worst difference is relative, to torch_grouped, over the output and
every gradient.
"""

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from environment import environment
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
from expertune.ops.experts.torch_grouped import grouped_expert_mlp
from expertune.ops.experts.types import ExpertLora, ExpertProjection
from expertune.ops.plan import build_plan
from timing import SHAPES, medians

RANK = 16
RUNS = [
    ("Qwen3-30B-A3B", 8192),
    ("Qwen3-30B-A3B", 1024),
    ("Qwen3-30B-A3B", 32768),
    ("GLM-4.5-Air", 8192),
    ("Mixtral-8x7B", 8192),
]
BACKENDS = {"scattermoe": scattermoe_expert_mlp, "torch_grouped": grouped_expert_mlp}


def projection(experts: int, num_out: int, num_in: int) -> ExpertProjection:
    weight = torch.randn(experts, num_out, num_in, device="cuda", dtype=torch.bfloat16) * num_in**-0.5
    a = (torch.randn(experts, RANK, num_in, device="cuda") * num_in**-0.5).requires_grad_()
    b = (torch.randn(experts, num_out, RANK, device="cuda") * RANK**-0.5).requires_grad_()
    return ExpertProjection(weight, lora=ExpertLora(a, b, scaling=2.0))


def measure(name: str, tokens: int) -> list[dict[str, object]]:
    experts, hidden, intermediate, top_k, _ = SHAPES[name]
    torch.manual_seed(0)
    x_TH = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy_TH = torch.randn_like(x_TH)
    up, down = projection(experts, 2 * intermediate, hidden), projection(experts, hidden, intermediate)
    weights_TK, ids_TK = torch.rand(tokens, experts, device="cuda").softmax(-1).topk(top_k)
    weights_TK = weights_TK.to(torch.bfloat16).requires_grad_()
    leaves = [x_TH, weights_TK, up.lora.a_ERX, up.lora.b_EYR, down.lora.a_ERX, down.lora.b_EYR]
    rows = tokens * top_k
    x_SH, h_SJ, a_SI = (
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        for width in (hidden, 2 * intermediate, intermediate)
    )

    def dense() -> None:
        torch.mm(x_SH, up.weight_EYX[0].T)
        torch.mm(a_SI, down.weight_EYX[0].T)
        torch.mm(x_SH, down.weight_EYX[0])
        torch.mm(h_SJ, up.weight_EYX[0])

    def step(backend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        plan = build_plan(ids_TK, experts)
        y_TH = backend(x_TH, weights_TK, plan, up, down, SWIGLU)
        return y_TH, *torch.autograd.grad(y_TH, leaves, dy_TH)

    results: dict[str, dict[str, object]] = {"dense cuBLAS": {}}
    ways: dict[str, Callable[[], object]] = {"dense cuBLAS": dense}
    outputs = {}
    for way, backend in BACKENDS.items():
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(backend)
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs[way] = step(backend)
        results[way] = {
            "first_call_s": round(first, 2),
            "peak_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 3),
        }
        ways[way] = lambda backend=backend: step(backend)
    for way in BACKENDS:
        other = outputs["torch_grouped"]
        errors = [
            ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(outputs[way], other, strict=True)
        ]
        results[way]["worst_difference"] = f"{max(errors):.1e}"
    del outputs
    times = medians(ways)
    limit = times["dense cuBLAS"][1]
    return [
        {
            "shape": name, "tokens": tokens, "way": way,
            "p20_ms": round(p20, 3), "p50_ms": round(p50, 3), "p80_ms": round(p80, 3), "of_dense": f"{limit / p50:.0%}",
            "peak_gib": "", "first_call_s": "", "worst_difference": "",
        } | results[way]
        for way, (p20, p50, p80) in times.items()
    ]  # fmt: skip


def main() -> None:
    where = environment()
    with Path(sys.argv[1]).open("w", newline="") as file:
        writer = None
        for name, tokens in RUNS:
            rows = measure(name, tokens)
            torch.cuda.empty_cache()
            if writer is None:
                writer = csv.DictWriter(file, [*rows[0], *where])
                writer.writeheader()
            writer.writerows(row | where for row in rows)
            file.flush()
            for row in rows:
                print(*(str(value).ljust(14) for value in row.values()))


if __name__ == "__main__":
    main()
