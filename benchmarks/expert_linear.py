"""One expert projection with LoRA on a GPU: ours gathered and grouped, torch's grouped_mm, and dense cuBLAS.

    python benchmarks/expert_linear.py OUT.csv

bf16, rank 16, uniform routing, random data; every way in turn, medians of device-event times. The tile table is built
before, as a layer shares it between its products. TFLOP/s count 2 S X Y of the base product alone, for every way. Each
of ours is first compared with the fp32 product of a sample of rows.
"""

import csv
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from environment import environment
from expertune.ops.experts.scattermoe.linear import LinearTile, expert_linear
from expertune.ops.experts.scattermoe.tiles import build_row_tiles
from expertune.ops.experts.types import ExpertLora, ExpertProjection
from expertune.ops.plan import ExpertPlan, build_plan
from timing import SHAPES, medians

RANK = 16
TILES = [
    LinearTile(rows=rows, columns=columns, k_step=64, num_warps=8, num_stages=stages)
    for (rows, columns), stages in product(((128, 256), (64, 256)), (3, 4))
]


def sample_error(out_SY: Tensor, x_SX: Tensor, projection: ExpertProjection, plan: ExpertPlan) -> float:
    """Relative error of 512 random rows against the formula in fp32."""
    rows = torch.randint(plan.num_rows, (512,), device=x_SX.device)
    expert, x, lora = plan.expert_of_row()[rows], x_SX[rows].float(), projection.lora
    want = torch.stack(
        [
            projection.weight_EYX[e].float() @ x[i]
            + (lora.scaling * lora.b_EYR[e].float() @ (lora.a_ERX[e].float() @ x[i]) if lora else 0)
            for i, e in enumerate(expert.tolist())
        ]
    )
    return ((out_SY[rows].float() - want).norm() / want.norm()).item()


def measure(name: str) -> list[dict[str, object]]:
    experts, hidden, intermediate, top_k, tokens = SHAPES[name]
    torch.manual_seed(0)
    num_out = 2 * intermediate
    x_TH = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(experts, num_out, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5
    lora = ExpertLora(
        torch.randn(experts, RANK, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5,
        torch.randn(experts, num_out, RANK, device="cuda", dtype=torch.bfloat16) * RANK**-0.5,
        scaling=2.0,
    )
    projection, base = ExpertProjection(weight, lora=lora), ExpertProjection(weight)
    plan = build_plan(torch.rand(tokens, experts, device="cuda").topk(top_k).indices, experts)
    x_SX = x_TH[plan.token_of_row_S]
    ways: dict[str, Callable[[], Tensor]] = {
        "dense cuBLAS": lambda: x_SX @ weight[0].T,
        "torch grouped_mm, pre-gathered, no LoRA": lambda: F.grouped_mm(
            x_SX, weight.transpose(1, 2), offs=plan.row_ends_E
        ),
    }
    errors = {}
    for tile in TILES:
        tiles = build_row_tiles(plan, tile.rows)
        shape = f"{tile.rows}x{tile.columns}x{tile.k_step}, {tile.num_warps} warps, {tile.num_stages} stages"
        for what, call in {
            f"ours, gathered, LoRA, {shape}": lambda tile=tile, tiles=tiles: expert_linear(
                x_TH, projection, plan, tile=tile, tiles=tiles
            ),
            f"ours, gathered, no LoRA, {shape}": lambda tile=tile, tiles=tiles: expert_linear(
                x_TH, base, plan, tile=tile, tiles=tiles
            ),
            f"ours, grouped, no LoRA, {shape}": lambda tile=tile, tiles=tiles: expert_linear(
                x_SX, base, plan, grouped=True, tile=tile, tiles=tiles
            ),
        }.items():
            try:
                errors[what] = sample_error(call(), x_SX, base if "no LoRA" in what else projection, plan)
            except Exception as error:  # a tile that does not fit is a row of the table, not the end of the run
                print(f"{what}: {type(error).__name__} {str(error)[:80]}")
                continue
            ways[what] = call
    flops = 2 * plan.num_rows * hidden * num_out
    return [
        {
            "shape": name,
            "way": way,
            "p20_ms": round(p20, 4),
            "p50_ms": round(p50, 4),
            "p80_ms": round(p80, 4),
            "tflops": round(flops / p50 / 1e9, 1),
            "relative_error": f"{errors[way]:.1e}" if way in errors else "",
        }
        for way, (p20, p50, p80) in medians(ways).items()
    ]


def main() -> None:
    where = environment()
    with Path(sys.argv[1]).open("w", newline="") as file:
        writer = None
        for name in SHAPES:
            rows = measure(name)
            torch.cuda.empty_cache()
            writer = writer or csv.DictWriter(file, [*rows[0], *where])
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(row | where for row in rows)
            for row in rows:
                print(f"{name:14} {row['way']:62} {row['p50_ms']:8.3f} ms {row['tflops']:6.0f} {row['relative_error']}")


if __name__ == "__main__":
    main()
