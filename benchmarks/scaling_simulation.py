"""What limits 64 and 512 GPUs: simulated tokens through our routing, the bytes that leave GPU and node, a step's time.

    python benchmarks/scaling_simulation.py              # prints the tables of docs/scaling.md; --write puts them there

Seeded and deterministic, ten seconds on two CPU cores, no GPU. Tokens with random logits choose their experts by
`ops.routing.select`; each expert is more or less popular (POPULARITY), and DeepSeek-V3's correction bias balances that
by the paper's own rule. Experts lie on the GPUs of a group in order, 8 GPUs a node, tokens evenly over all GPUs.

A MoE layer exchanges rows of H bf16 values four times: dispatch and combine in the forward, their gradients in the
backward. Two ways to send them are counted:

    once a GPU      one copy of a token for each GPU that has any of its K experts, as expertune sends them (NCCL)
    once a node     one copy for each node that has any of them, spread by NVLink inside (DeepEP)

    time of an exchange = max(bytes by NVLink / NVLINK, bytes by InfiniBand / INFINIBAND) x balance
    time of the experts = measured forward and backward x balance          balance: rows of the fullest GPU / mean

Latencies, the host and other traffic on the network are left out: these times are the best that the wires allow.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from expertune.ops.routing.select import select_experts
from expertune.ops.routing.types import RoutingRule

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- scaling_simulation.py: start -->", "<!-- scaling_simulation.py: end -->"

GPUS_OF_A_NODE = 8
# Bytes/s of one GPU in one direction. H200's fourth NVLink: 900 GB/s both ways, so 450; DeepEP's best is 81 % of the
# wire (726 of 900 GB/s on SM100). ConnectX-7: 400 Gb/s, so 50; DeepEP's 90 GB/s over 2 nodes, half of which stays in
# the node, are 45 on the wire, its 61 over 4 nodes are 46. https://github.com/deepseek-ai/DeepEP
NVLINK = 360e9
INFINIBAND = 45e9
TOKENS_OF_A_GPU = 8192  # those of the measured experts
SIMULATED_TOKENS = 16384
POPULARITY = 0.25  # standard deviation of an expert's offset to all logits, whose own is 1; an assumption
RANK, ADAPTER_BYTES = 16, 4
BALANCE_ROUNDS, BALANCE_STEP = 40, 0.006  # of the correction bias; the paper's 0.001 over thousands of steps
EXCHANGES = 4
EXCHANGES_CHECKPOINTED = 6  # the forward's two once more


@dataclass(frozen=True)
class Model:
    """A model's MoE layers. speed_of: the measured shape whose speed its experts are taken to have."""

    name: str
    num_experts: int
    hidden: int
    intermediate: int
    moe_layers: int
    rule: RoutingRule
    speed_of: str
    has_bias: bool = False

    @property
    def weight_bytes(self) -> int:
        """Of all experts, bf16."""
        return 2 * self.moe_layers * self.num_experts * 3 * self.hidden * self.intermediate

    @property
    def layer_adapter_bytes(self) -> int:
        """Of one layer's experts: A and B of both projections, fp32."""
        widths = self.hidden + 2 * self.intermediate + self.intermediate + self.hidden
        return self.num_experts * RANK * widths * ADAPTER_BYTES

    @property
    def row_bytes(self) -> int:
        return 2 * self.hidden


QWEN3 = Model("Qwen3-30B-A3B", 128, 2048, 768, 48, RoutingRule(8, "softmax", normalize=True), "Qwen3-30B-A3B")
_V3 = {"score": "sigmoid", "normalize": True, "epsilon": 1e-20, "scaling": 2.5}
DEEPSEEK = Model(
    "DeepSeek-V3", 256, 7168, 2048, 58, RoutingRule(8, num_groups=8, top_groups=4, **_V3), "GLM-4.5-Air", True
)
FREE = Model("DeepSeek-V3, no groups", 256, 7168, 2048, 58, RoutingRule(8, **_V3), "GLM-4.5-Air", True)

# model, GPUs, GPUs that share the experts
CASES = (
    (QWEN3, 8, 8),
    (QWEN3, 64, 64),
    (QWEN3, 64, 8),
    (QWEN3, 512, 128),
    (QWEN3, 512, 8),
    (DEEPSEEK, 8, 8),
    (DEEPSEEK, 64, 64),
    (FREE, 64, 64),
    (DEEPSEEK, 64, 16),
    (DEEPSEEK, 512, 256),
    (FREE, 512, 256),
    (DEEPSEEK, 512, 64),
    (DEEPSEEK, 512, 16),
)


@dataclass(frozen=True)
class Traffic:
    """Copies of a token that one exchange sends, on average, and how even the load is.

    to_node, to_others: to other GPUs of the node and to GPUs of other nodes, a copy for each GPU. nodes: to other
    nodes, a copy for each node. balance: rows of the fullest GPU over the mean.
    """

    to_node: float
    to_others: float
    nodes: float
    balance: float

    @property
    def to_gpus(self) -> float:
        """To other GPUs, wherever they are."""
        return self.to_node + self.to_others


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in ms, of one MoE layer on one GPU."""

    model: Model
    num_gpus: int
    group: int
    traffic: Traffic
    by_gpu_ms: float
    by_node_ms: float
    experts_ms: float
    gradients_ms: float

    def efficiency(self, exchange_ms: float, *, overlapped: bool) -> float:
        """The experts' time alone and even, over that with the exchange."""
        busy = self.experts_ms * self.traffic.balance
        return self.experts_ms / (max(busy, exchange_ms) if overlapped else busy + exchange_ms)


@cache
def route(model: Model) -> Tensor:
    """Expert ids [T, K] of simulated tokens."""
    generator = torch.Generator().manual_seed(0)
    offsets_E = POPULARITY * torch.randn(model.num_experts, generator=generator)
    logits_TE = torch.randn(SIMULATED_TOKENS, model.num_experts, generator=generator) + offsets_E
    bias_E = balanced_bias(logits_TE, model.rule) if model.has_bias else None
    return select_experts(logits_TE, model.rule, bias_E=bias_E).expert_ids_TK


def balanced_bias(logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """DeepSeek-V3's rule: an overloaded expert's bias goes down a step, any other's up (arXiv 2412.19437, 2.1.2)."""
    num_experts = logits_TE.shape[1]
    bias_E = torch.zeros(num_experts)
    for turn in range(BALANCE_ROUNDS):
        part_TE = logits_TE[turn % 4 :: 4]
        load_E = select_experts(part_TE, rule, bias_E=bias_E).load_E(num_experts)
        bias_E -= BALANCE_STEP * torch.sign(load_E - load_E.float().mean())
    return bias_E


def traffic_of(model: Model, group: int) -> Traffic:
    """Count the copies for a group of so many GPUs; token t is on GPU t modulo the group."""
    ids_TK = route(model)
    gpu_TK = ids_TK * group // model.num_experts
    node_TK = gpu_TK // GPUS_OF_A_NODE
    own_gpu_T1 = (torch.arange(len(ids_TK)) % group).unsqueeze(1)
    own_node_T1 = own_gpu_T1 // GPUS_OF_A_NODE
    other_node_TK, other_gpu_TK = node_TK != own_node_T1, gpu_TK != own_gpu_T1
    rows_G = torch.bincount(gpu_TK.flatten(), minlength=group).double()
    first_TK = _first_of(gpu_TK)
    return Traffic(
        to_node=_mean(first_TK & other_gpu_TK & ~other_node_TK),
        to_others=_mean(first_TK & other_node_TK),
        nodes=_mean(_first_of(node_TK) & other_node_TK),
        balance=float(rows_G.max() / rows_G.mean()),
    )


def _first_of(places_TK: Tensor) -> Tensor:
    """True where a place comes up for the first time in its row."""
    sorted_TK, order_TK = places_TK.sort(dim=1, stable=True)
    first_TK = torch.ones_like(sorted_TK, dtype=torch.bool)
    first_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return torch.zeros_like(first_TK).scatter_(1, order_TK, first_TK)


def _mean(chosen_TK: Tensor) -> float:
    """Copies of a token."""
    return float(chosen_TK.sum(dim=1).double().mean())


@cache
def measured_experts() -> dict[str, float]:
    """FLOP/s of our kernels by shape: forward and backward on an H200, the device's time."""
    speeds: dict[str, float] = {}
    with (RESULTS / "bench_h200.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            shape = (line["way"], line["tokens"], line["rank"], line["routing"])
            if shape == ("scattermoe", str(TOKENS_OF_A_GPU), str(RANK), "uniform") and line["shape"] not in speeds:
                sizes = [int(line[name]) for name in ("top_k", "hidden", "intermediate")]
                speeds[line["shape"]] = _flops(*sizes) / (float(line["p50_queued_ms"]) / 1000)
    return speeds


@cache
def measured_layer_ms() -> float:
    """A layer of Qwen3-30B-A3B's whole training step with checkpointing, everything of the step shared among layers."""
    with (RESULTS / "train_step_h200.csv").open(newline="") as file:
        ours = next(line for line in csv.DictReader(file) if line["way"].startswith("ours"))
    return float(ours["p50_ms"]) / int(ours["layers"])


def _flops(top_k: int, hidden: int, intermediate: int) -> float:
    return 4.0 * TOKENS_OF_A_GPU * top_k * 3 * hidden * intermediate


def exchange_ms(model: Model, by_nvlink: float, by_network: float, balance: float) -> float:
    """Of copies of each token by either way."""
    num_bytes = TOKENS_OF_A_GPU * model.row_bytes
    return 1000 * balance * max(by_nvlink * num_bytes / NVLINK, by_network * num_bytes / INFINIBAND)


def simulate(model: Model, num_gpus: int, group: int) -> Row:
    traffic = traffic_of(model, group)
    copies = num_gpus // group
    share = 2 * (copies - 1) / copies  # of a ring's all-reduce
    flops = _flops(model.rule.top_k, model.hidden, model.intermediate)
    return Row(
        model,
        num_gpus,
        group,
        traffic,
        by_gpu_ms=EXCHANGES * exchange_ms(model, traffic.to_node, traffic.to_others, traffic.balance),
        by_node_ms=EXCHANGES * exchange_ms(model, traffic.to_gpus, traffic.nodes, traffic.balance),
        experts_ms=1000 * flops / measured_experts()[model.speed_of],
        gradients_ms=1000 * share * model.layer_adapter_bytes / group / INFINIBAND,
    )


def layer_table(rows: list[Row]) -> Iterator[str]:
    yield (
        "| model | GPUs | layout (ep x replicate) | expert weights, GiB a GPU | nodes a token goes to | "
        "leaves the GPU, MiB | leaves the node, MiB: a GPU / a node | balance | exchange, ms: a GPU / a node | "
        "experts, ms | efficiency: a GPU / a node / a node, overlapped | adapters' gradients, ms |"
    )
    yield "|" + " --- |" + " ---: |" * 11
    for row in rows:
        t, mib = row.traffic, TOKENS_OF_A_GPU * row.model.row_bytes / 2**20
        efficiencies = (
            row.efficiency(row.by_gpu_ms, overlapped=False),
            row.efficiency(row.by_node_ms, overlapped=False),
            row.efficiency(row.by_node_ms, overlapped=True),
        )
        cells = (
            row.model.name, f"{row.num_gpus}", f"{row.group} x {row.num_gpus // row.group}",
            f"{row.model.weight_bytes / row.group / 2**30:.1f}", f"{t.nodes:.1f}",
            f"{t.to_gpus * mib:.0f}", f"{t.to_others * mib:.0f} / {t.nodes * mib:.0f}",
            f"{t.balance:.2f}", f"{row.by_gpu_ms:.1f} / {row.by_node_ms:.1f}", f"{row.experts_ms:.1f}",
            " / ".join(f"{each:.0%}" for each in efficiencies), f"{row.gradients_ms:.2f}",
        )  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def step_table(rows: list[Row]) -> Iterator[str]:
    """Qwen3-30B-A3B alone: of the other model there is no measured step."""
    yield "| GPUs | layout (ep x replicate) | layer alone, ms | added, ms: a GPU / a node | efficiency |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    layer_ms = measured_layer_ms()
    for row in (row for row in rows if row.model is QWEN3):
        repeated = EXCHANGES_CHECKPOINTED / EXCHANGES
        waiting = row.experts_ms * 4 / 3 * (row.traffic.balance - 1) + row.gradients_ms  # the forward is computed twice
        added = [each * repeated + waiting for each in (row.by_gpu_ms, row.by_node_ms)]
        cells = (
            f"{row.num_gpus}", f"{row.group} x {row.num_gpus // row.group}", f"{layer_ms:.1f}",
            " / ".join(f"{each:.1f}" for each in added),
            " / ".join(f"{layer_ms / (layer_ms + each):.0%}" for each in added),
        )  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def tables() -> str:
    """Both tables, as the docs have them."""
    rows = [simulate(*case) for case in CASES]
    parts = [
        f"One MoE layer, {TOKENS_OF_A_GPU} tokens on each GPU, rank {RANK}:", "", *layer_table(rows), "",
        "The whole training step of Qwen3-30B-A3B with checkpointing, nothing overlapped:", "", *step_table(rows),
    ]  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="What limits 64 and 512 GPUs.")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    text = tables()
    print(text)
    if parser.parse_args().write:
        docs = DOCS.read_text(encoding="utf-8")
        before, after = docs.partition(START)[0], docs.partition(END)[2]
        DOCS.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
