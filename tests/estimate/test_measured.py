"""The estimate beside what was measured on H200s: train_step_h200.csv, expert_parallel_h200.csv and bench_h200.csv."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3MoeConfig

from expertune.distributed.sizes import ParallelSizes
from expertune.estimate.experts import plan_on_paper, scattermoe_on_paper
from expertune.estimate.gpus import GIB
from expertune.estimate.layout import memory_on
from expertune.estimate.ledger import HEAD, Ledger
from expertune.estimate.model import build_on_meta, count
from expertune.estimate.optimizers import optimizer_bytes
from expertune.estimate.step import Paper, Step
from expertune.layers.layout import lora_from_peft
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.types import ExpertProjection
from tests.estimate.settings import config_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QWEN3_30B_A3B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "max_position_embeddings": 40960,
}  # fmt: skip


def full_logits(ledger: Ledger, hidden: Tensor, head: nn.Module) -> Tensor:
    """The loss of that benchmark: Transformers' own, on fp32 logits, which accelerate casts to fp32 once more."""

    def loss_of(logits: Tensor) -> Tensor:
        labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    with ledger.scope(HEAD):
        logits = head(hidden)
        loss = loss_of(logits)
        logits = logits.float()
        return loss


def test_the_peak_of_twelve_layers_on_an_h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (RESULTS / "train_step_h200.csv").open(newline="") as file:
        measured = next(row for row in csv.DictReader(file) if row["way"] == "ours (scattermoe)")
    assert (measured["layers"], measured["tokens"], measured["rank"]) == ("12", "8192", "16")
    monkeypatch.setattr("expertune.estimate.step.fused_loss_on_paper", full_logits)
    model_config = Qwen3MoeConfig(**QWEN3_30B_A3B, num_hidden_layers=12, norm_topk_prob=True)
    built = build_on_meta(config_of(tmp_path, model_config, lora_r=16))
    model = count(built)
    course = Paper(built).run(Step(2, 4096, torch.bfloat16, checkpointing=True, balance_coefficient=0.0))
    estimated = memory_on(ParallelSizes(), model, optimizer_bytes("adamw_torch"), course).allocated_bytes
    assert estimated / GIB == pytest.approx(float(measured["peak_gib"]), rel=0.02)


def measured_peaks() -> dict[tuple[ParallelSizes, int], list[float]]:
    """Of eight layers of Qwen3-30B-A3B on one to four H200s: by layout and tokens of a GPU, in GiB."""
    peaks: dict[tuple[ParallelSizes, int], list[float]] = {}
    with (RESULTS / "expert_parallel_h200.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["model"], row["expert_parallel_backend"]) == ("Qwen3-30B-A3B", "nccl"):
                assert (row["layers"], row["rank"], row["checkpointing"]) == ("8", "16", "True")
                names = ("expert_parallel_size", "dp_shard_size", "dp_replicate_size")
                key = ParallelSizes(*(int(row[name]) for name in names)), int(row["tokens_per_gpu"])
                peaks.setdefault(key, []).append(float(row["peak_gib_per_gpu"]))
    return peaks


@pytest.fixture(scope="module")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    model_config = Qwen3MoeConfig(**QWEN3_30B_A3B, num_hidden_layers=8, norm_topk_prob=True)
    return build_on_meta(config_of(tmp_path_factory.mktemp("eight"), model_config, lora_r=16))


@pytest.mark.parametrize(
    ("layout", "tokens", "peaks_gib"),
    [
        pytest.param(layout, tokens, peaks, id=f"{layout.expert}-{layout.shard}-{tokens}")
        for (layout, tokens), peaks in measured_peaks().items()
    ],
)
def test_the_peak_of_eight_layers_on_several_h200s(
    layout: ParallelSizes, tokens: int, peaks_gib: list[float], eight_layers: PeftModel
) -> None:
    step = Step(
        tokens // 4096, 4096, torch.bfloat16, checkpointing=True, expert_parallel=layout.expert, balance_coefficient=0.0
    )
    course = Paper(eight_layers).run(step)
    memory = memory_on(layout, count(eight_layers), optimizer_bytes("adamw_torch_fused"), course)
    for measured in peaks_gib:  # routers of several kinds, and so several loads
        assert memory.allocated_bytes / GIB == pytest.approx(measured, rel=0.02 if layout.world == 1 else 0.1)


def measured_experts() -> list[dict[str, str]]:
    """Our kernels' rows of the benchmark of experts alone, on an H200."""
    with (RESULTS / "bench_h200.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["way"] == "scattermoe" and row["routing"] == "uniform"]


@pytest.mark.parametrize("row", measured_experts(), ids=lambda row: f"{row['shape']}-{row['tokens']}-{row['rank']}")
def test_the_memory_of_experts_alone_on_an_h200(row: dict[str, str]) -> None:
    names = ("experts", "hidden", "intermediate", "top_k", "tokens", "rank")
    num_experts, hidden, intermediate, top_k, tokens, rank = (int(row[name]) for name in names)

    def projection(num_out: int, num_in: int) -> ExpertProjection:
        a = torch.empty(num_experts * rank, num_in, requires_grad=True)
        b = torch.empty(num_out, rank * num_experts, requires_grad=True)
        weight = torch.empty(num_experts, num_out, num_in, dtype=torch.bfloat16)
        return ExpertProjection(weight, lora=lora_from_peft(a, b, num_experts, 2.0))

    with FakeTensorMode():
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.empty(tokens, top_k, dtype=torch.bfloat16, requires_grad=True)
        up, down = projection(2 * intermediate, hidden), projection(hidden, intermediate)
        dy = torch.empty_like(x)
        with Ledger() as ledger:
            plan = plan_on_paper(tokens, top_k, num_experts, x.device)
            y = scattermoe_on_paper(ledger, x, weights, plan, up, down, SWIGLU)
            y.backward(dy)
    assert ledger.peak_bytes / GIB == pytest.approx(float(row["peak_gib"]), rel=0.02)
