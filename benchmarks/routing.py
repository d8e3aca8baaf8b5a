"""Routing and the plan on a GPU: torch's chain of kernels beside ours, forward and backward.

    python benchmarks/routing.py                     # writes benchmarks/results/routing.csv

T = 1024, 8192, 32768 tokens, E = 64, 128, 256 experts, K = 8, fp32 logits as the routers of this house compute them,
softmax over all, weights normalised. The device's time where the host runs ahead (`bench.timing`), of CALLS calls in a
row, divided by them; all ways of a size by turns, in a new random order each time, because clocks drift.

Routing:  "transformers" softmax, topk, division, as Qwen3-MoE's router does; "select_experts" our plain torch, whose
          stable sort makes ties certain; "fused" one launch and one backward.
Plan:     "torch" a stable sort, its inverse, the fence by search, and the row tables in one launch of ours; "three
          launches" the counting sort and the row tables after it; "two launches" the sort that writes them in passing.
Both:     the routing of "transformers" and the plan of "torch"; "fused" and "two launches".
"""

import argparse
import csv
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from environment import environment
from expertune.bench.timing import Timer, find_gpu
from expertune.errors import ConfigError
from expertune.ops.experts.scattermoe.tiles import CHUNK_ROWS, build_row_tables
from expertune.ops.plan import ExpertPlan, build_plan
from expertune.ops.routing.fused import fused_select_experts
from expertune.ops.routing.select import select_experts
from expertune.ops.routing.types import RoutingRule

TOKENS, EXPERTS, TOP_K = (1024, 8192, 32768), (64, 128, 256), 8
RULE = RoutingRule(TOP_K, "softmax", normalize=True)
TILE_ROWS = 128
WARM_UPS, ROUNDS, CALLS = 3, 25, 10
RESULTS = Path(__file__).parent / "results" / "routing.csv"
Step = Callable[[], tuple[Tensor, ...]]
Way = tuple[str, str, str]  # what, pass, way


def transformers_router(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen3MoeTopKRouter.forward, after its linear."""
    probs_TE = torch.nn.functional.softmax(logits_TE, dtype=torch.float, dim=-1)
    weights_TK, ids_TK = torch.topk(probs_TE, TOP_K, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK.to(logits_TE.dtype), ids_TK


def plain_torch(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    routing = select_experts(logits_TE, RULE)
    return routing.weights_TK, routing.expert_ids_TK


def fused(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    routing = fused_select_experts(logits_TE, RULE)
    return routing.weights_TK, routing.expert_ids_TK


def torch_plan(ids_TK: Tensor, num_experts: int) -> ExpertPlan:
    with patch("expertune.ops.plan._has_triton", return_value=False):
        return build_plan(ids_TK, num_experts)


def plan_results(plan: ExpertPlan) -> tuple[Tensor, ...]:
    tables = build_row_tables(plan, TILE_ROWS)
    return plan.slot_of_row_S, plan.row_of_slot_S, plan.row_fence_F, tables.tiles.entries_4M, tables.chunks.entries_4M


def two_launches(ids_TK: Tensor, num_experts: int) -> ExpertPlan:
    return build_plan(ids_TK, num_experts, table_rows=(TILE_ROWS, CHUNK_ROWS))


def make_steps(num_tokens: int, num_experts: int, device: torch.device) -> dict[Way, Step]:
    """One step for each way; the ways of one kind are checked against each other first."""
    generator = torch.Generator(device).manual_seed(0)
    logits_TE = torch.randn(num_tokens, num_experts, device=device, generator=generator)
    dweights_TK = torch.randn(num_tokens, TOP_K, device=device, generator=generator)
    leaf_TE = logits_TE.clone().requires_grad_()
    routers = {"transformers": transformers_router, "select_experts": plain_torch, "fused": fused}
    plans = {"torch": torch_plan, "three launches": build_plan, "two launches": two_launches}
    steps: dict[Way, Step] = {}
    for name, router in routers.items():
        steps["routing", "forward", name] = lambda router=router: router(logits_TE)

        def forward_and_backward(router=router) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
            return torch.autograd.grad(router(leaf_TE)[0], leaf_TE, dweights_TK)

        steps["routing", "forward + backward", name] = forward_and_backward
    ids_TK = fused(logits_TE)[1]
    for name, plan in plans.items():
        steps["plan", "forward", name] = lambda plan=plan: plan_results(plan(ids_TK, num_experts))
    for name, router, plan in (
        ("transformers, torch", transformers_router, torch_plan),
        ("fused, two launches", fused, two_launches),
    ):
        steps["both", "forward", name] = lambda router=router, plan=plan: plan_results(
            plan(router(logits_TE)[1], num_experts)
        )
    check(steps)
    return steps


def check(steps: dict[Way, Step]) -> None:
    """Raise if a way computes something else: a benchmark of a wrong kernel is worth nothing."""
    want = steps["routing", "forward", "transformers"]()
    for name in ("select_experts", "fused"):
        weights_TK, ids_TK = steps["routing", "forward", name]()
        if (ids_TK == want[1]).float().mean() < 0.999 or not torch.allclose(weights_TK, want[0], atol=1e-5):
            raise SystemExit(f"{name}: not the routing of transformers")
    gradients = [steps["routing", "forward + backward", name]()[0] for name in ("select_experts", "fused")]
    if (gradients[0] - gradients[1]).norm() > 1e-2 * gradients[0].norm():  # rows whose near-ties changed places
        raise SystemExit("fused: not the gradient of select_experts")
    want = steps["plan", "forward", "torch"]()
    for name in ("three launches", "two launches"):
        for mine, theirs in zip(steps["plan", "forward", name]()[:3], want[:3], strict=True):
            if not torch.equal(mine, theirs):
                raise SystemExit(f"{name}: not the plan of torch's sort")


def repeated(step: Step) -> Step:
    def many() -> tuple[Tensor, ...]:
        for _ in range(CALLS - 1):
            step()
        return step()

    return many


def measure(num_tokens: int, num_experts: int, device: torch.device, timer: Timer) -> list[dict[str, object]]:
    steps = {way: repeated(step) for way, step in make_steps(num_tokens, num_experts, device).items()}
    host_ms = {}
    for way, step in steps.items():
        host_ms[way] = [timer.idle(step).host_ms for _ in range(WARM_UPS)][-1]
    taken_us: dict[Way, list[float]] = {way: [] for way in steps}
    shuffled = random.Random(num_tokens + num_experts)
    for _ in range(ROUNDS):
        for way in shuffled.sample(list(steps), len(steps)):
            taken_us[way].append(1000 * timer.queued(steps[way], host_ms[way]) / CALLS)
    rows: list[dict[str, object]] = []
    for (what, passes, way), taken in taken_us.items():
        p20, p50, p80 = statistics.quantiles(taken, n=10)[1:8:3]
        rows.append(
            {
                "what": what, "pass": passes, "way": way, "tokens": num_tokens, "experts": num_experts,
                "top_k": TOP_K, "dtype": "float32", "p20_us": round(p20, 2), "p50_us": round(p50, 2),
                "p80_us": round(p80, 2), "host_us": round(1000 * host_ms[what, passes, way] / CALLS, 1),
            }
        )  # fmt: skip
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    print(f"{'T':>6} {'E':>4}  {'':<28} {'torch':>9} {'ours':>9}")
    torchs = {"routing": "transformers", "plan": "torch", "both": "transformers, torch"}
    ours = {"routing": "fused", "plan": "two launches", "both": "fused, two launches"}
    for row in rows:
        what = str(row["what"])
        if row["way"] != ours[what]:
            continue
        same = ("what", "pass", "tokens", "experts")
        theirs = next(r for r in rows if r["way"] == torchs[what] and all(r[key] == row[key] for key in same))
        mine_us, theirs_us = float(str(row["p50_us"])), float(str(theirs["p50_us"]))
        print(
            f"{row['tokens']:>6} {row['experts']:>4}  {what + ', ' + str(row['pass']):<28} {theirs_us:>6.1f} us "
            f"{mine_us:>6.1f} us  {theirs_us / mine_us:>5.1f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    given = parser.parse_args()
    try:
        device, timer = find_gpu("benchmarks/routing.py")
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    rows = [
        row for tokens in given.tokens for experts in given.experts for row in measure(tokens, experts, device, timer)
    ]
    versions = environment()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *versions])
        writer.writeheader()
        writer.writerows(row | versions for row in rows)
    print_table(rows)
    print(f"written to {given.output}")


if __name__ == "__main__":
    main()
