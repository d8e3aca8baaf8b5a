"""The training step of a model's layers in several processes: tokens/s of each GPU beside one GPU alone.

    torchrun --nproc-per-node 1 benchmarks/expert_parallel.py --out EP.csv          # the same line with 2 and with 4
    torchrun --nproc-per-node 4 benchmarks/expert_parallel.py --out EP.csv --shard 2      # experts 2 x shards 2
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --out EP.csv --routers even
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --out EP.csv --model GLM-4.5-Air --no-overlap
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --out EP.csv --tiny          # a toy on the CPU

Weak scaling: every process has T tokens of its own, whatever their number. Random bf16 weights, made where they lie;
adapters of rank 16 on attention and every expert, fp32, AdamW; bf16 autocast, sdpa, non-reentrant checkpointing unless
--no-checkpointing; TRL's chunked head. A step is forward, backward, the sums of gradients, clipping, AdamW; it is timed
from a barrier to the device's end, and the slowest process's time counts. `max_pairs_share`: of the (token, expert)
pairs of a layer, what the busiest process has, times their number: 1 if all have the same, in the worst layer.

Routers are random too, and tokens of a random model have much in common, so that some experts get most of them:
--routers random. --routers balanced takes a router's logits (GLM: its scores, where it chooses) less their mean over
the process's tokens, as a balanced router's bias does; in the worst layer of eight, with 8192 tokens a GPU, the busiest
still has 1.2 (of 2) or 1.5 times (of 4) its share. --routers even draws each token's experts by lot: all GPUs have the
same work, and what is left is the cost of sending tokens.

GLM-4.5-Air, all of its layers sparse here, has a shared expert beside the routed ones: it runs while tokens travel, as
in a training run, or after them with --no-overlap.

The row is appended to the CSV. `ratio_to_one` compares with the median of the rows of one process, the same machine,
layers, tokens and options, that the CSV has from before. Hosts differ, and a slow one is what the GPUs wait for:
--machine names it.
"""

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Glm4MoeConfig, PretrainedConfig, Qwen3MoeConfig
from trl.trainer.utils import add_fused_lm_head

import expertune
from environment import environment
from expertune.distributed.gradients import clip_gradients, synchronise_gradients
from expertune.distributed.mesh import ParallelMesh, join_mesh, leave_mesh
from expertune.distributed.parameters import ShardedParameter
from expertune.distributed.side_stream import SideStream
from expertune.distributed.sizes import ParallelSizes
from expertune.integrations import sharded_model
from expertune.integrations.shared_overlap import overlap_shared_experts
from expertune.layers.backends import pick_backend
from expertune.layers.layout import is_experts_module
from train_step import QWEN3_30B_A3B, RANK, TINY

WARM_STEPS = 3
GLM_4_5_AIR = {
    "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_attention_heads": 96,
    "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408, "n_shared_experts": 1, "first_k_dense_replace": 0,
}  # fmt: skip
TINY_GLM = {name: size for name, size in TINY.items() if name != "num_experts"} | {
    "n_routed_experts": TINY["num_experts"], "n_shared_experts": 1, "first_k_dense_replace": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model's configuration and its sizes: the real ones and a toy's."""

    config: type[PretrainedConfig]
    sizes: dict[str, Any]
    tiny: dict[str, Any]


ARCHITECTURES = {
    "Qwen3-30B-A3B": Architecture(Qwen3MoeConfig, QWEN3_30B_A3B, TINY),
    "GLM-4.5-Air": Architecture(Glm4MoeConfig, GLM_4_5_AIR, TINY_GLM),
}


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    machine: str
    model: str
    layers: int
    tokens: int
    rows: int
    shard: int
    backend: str
    checkpointing: bool
    routers: str
    overlap: bool
    deep_ep: bool
    steps: int
    tiny: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16


def random_parts(
    model: nn.Module, _base: str, dtype: torch.dtype, device: torch.device, _own: range, _num_experts: int
) -> Iterator[set[str]]:
    """Random weights, layer by layer; of layers that all have, the same in every process."""
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "", []).append(name)
    for seed, names in enumerate(parts.values()):
        for name in names:
            owner_name, _, own = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            is_experts = is_experts_module(owner)
            first_expert = _own.start if is_experts else 0
            generator = torch.Generator(device).manual_seed(1000 * seed + first_expert)
            shape = owner._parameters[own].shape
            value = torch.empty(shape, dtype=dtype, device=device)
            if len(shape) == 1:
                value.fill_(1.0)
            else:
                value.normal_(0, 0.02, generator=generator)
            owner._parameters[own] = nn.Parameter(value, requires_grad=False)
        yield set(names)


def balance(router: Any, _inputs: Any, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What Qwen3's router returns, with choices and weights of the logits less their mean over the tokens."""
    logits_TE, weights_TK, _ = outputs
    scores_TE = torch.softmax(logits_TE - logits_TE.mean(0), dim=-1, dtype=torch.float32)
    ids_TK = scores_TE.topk(router.top_k, dim=-1).indices
    return logits_TE, _weights_of(router, scores_TE, ids_TK).to(weights_TK.dtype), ids_TK


def balance_choice(router: Any, inputs: tuple[Tensor]) -> None:
    """The bias of GLM's router, which counts for the choice alone: the mean of its scores over the tokens, negated."""
    (hidden,) = inputs
    scores_TE = F.linear(hidden.flatten(0, -2).float(), router.weight.float()).sigmoid()
    router.e_score_correction_bias = -scores_TE.detach().mean(0)


def draw(router: Any, _inputs: Any, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What Qwen3's router returns, with experts drawn by lot and their weights from the logits."""
    logits_TE, weights_TK, _ = outputs
    scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    ids_TK = torch.rand_like(logits_TE).topk(router.top_k, dim=-1).indices
    return logits_TE, _weights_of(router, scores_TE, ids_TK).to(weights_TK.dtype), ids_TK


def draw_choice(router: Any, inputs: tuple[Tensor]) -> None:
    """The bias of GLM's router, which counts for the choice alone: for each token another, above all scores."""
    (hidden,) = inputs
    num_tokens, num_experts = hidden.flatten(0, -2).shape[0], router.weight.shape[0]
    router.e_score_correction_bias = 1e3 * torch.rand(num_tokens, num_experts, device=hidden.device)


def _weights_of(router: Any, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """As Qwen3's router makes them of the scores of the chosen experts."""
    scores_TK = scores_TE.gather(1, ids_TK)
    return scores_TK / scores_TK.sum(-1, keepdim=True) if router.norm_topk_prob else scores_TK


ROUTERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]] | None] = {
    "random": None,
    "balanced": (balance, balance_choice),
    "even": (draw, draw_choice),
}
"""How tokens choose experts: hooks after a router like Qwen3's, and before one like GLM's; None leaves it as it is."""


def routers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def build(setting: Setting, mesh: ParallelMesh, device: torch.device) -> tuple[Any, list[ShardedParameter]]:
    architecture = ARCHITECTURES[setting.model]
    sizes = architecture.tiny if setting.tiny else architecture.sizes
    options = {"experts_implementation": setting.backend, "attn_implementation": "sdpa"}
    with tempfile.TemporaryDirectory() as folder:
        architecture.config(**sizes, num_hidden_layers=setting.layers).save_pretrained(folder)
        model = sharded_model.build_skeleton(folder, setting.dtype, **options)
        torch.manual_seed(0)
        lora = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=expertune.get_attention_modules(model),
            target_parameters=expertune.get_target_parameters(model),
        )
        model = get_peft_model(model, lora)
        parameters = sharded_model.spread_model(
            model, folder, setting.dtype, mesh, device, fill=random_parts, deep_ep=setting.deep_ep, **options
        )
    add_fused_lm_head(model.get_base_model())
    if (hooks := ROUTERS[setting.routers]) is not None:
        change, change_choice = hooks
        for router in routers_of(model):
            if hasattr(router, "e_score_correction_bias"):
                router.register_forward_pre_hook(change_choice)
            else:
                router.register_forward_hook(change)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), parameters


def random_batch(setting: Setting, vocab: int, step: int, device: torch.device) -> Tensor:
    """Tokens [rows, tokens / rows], of this process and step alone."""
    generator = torch.Generator(device).manual_seed(1 + step * 1000 + dist.get_rank())
    shape = (setting.rows, setting.tokens // setting.rows)
    return torch.randint(0, vocab, shape, device=device, generator=generator)


def busiest_share(model: nn.Module, ids: Tensor, sizes: ParallelSizes) -> float:
    """What the busiest process of the expert axis has of a layer's (token, expert) pairs, times their number."""
    counts: list[Tensor] = []

    def count(module: Any, _inputs: Any, outputs: Any) -> None:
        owners = outputs[2].flatten() // (module.num_experts // sizes.expert)
        counts.append(torch.bincount(owners, minlength=sizes.expert))

    hooks = [router.register_forward_hook(count) for router in routers_of(model)]
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
    for hook in hooks:
        hook.remove()
    stacked = torch.stack(counts).float()
    dist.all_reduce(stacked)
    return float((stacked.amax(1) / stacked.mean(1)).max())


def measure(setting: Setting, mesh: ParallelMesh, device: torch.device) -> dict[str, Any]:
    model, parameters = build(setting, mesh, device)
    overlapped = 0
    if setting.overlap and device.type == "cuda":
        overlapped = len(overlap_shared_experts(model, SideStream(device)).layers)
    vocab = model.config.vocab_size
    optimizer = torch.optim.AdamW([each.parameter for each in parameters], lr=1e-4, fused=True)
    seconds, losses = [], []
    for step in range(WARM_STEPS + setting.steps):
        ids = random_batch(setting, vocab, step, device)
        mesh.wire(None, "the benchmark").barrier("the start of a step")
        if device.type == "cuda":
            torch.cuda.synchronize()
            if step == WARM_STEPS:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=not setting.tiny):
            log_probs = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
        loss = -log_probs.sum() / ids[:, 1:].numel()
        loss.backward()
        synchronise_gradients(parameters, mesh)
        clip_gradients(parameters, 1.0, mesh)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        slowest = torch.tensor([time.perf_counter() - start], device=device)
        seconds.append(float(mesh.wire(None, "the benchmark").maximum(slowest, "the end of a step")))
        mean = mesh.wire(None, "the benchmark").sum(loss.detach().float().view(1), "the loss", wait=True)
        losses.append(float(mean) / mesh.sizes.world)
    peak = torch.tensor([torch.cuda.max_memory_allocated() if device.type == "cuda" else 0], device=device)
    peak_bytes = int(mesh.wire(None, "the benchmark").maximum(peak, "peak memory"))
    share = busiest_share(model, random_batch(setting, vocab, 0, device), mesh.sizes)
    p20, p50, p80 = (1000 * q for q in statistics.quantiles(seconds[WARM_STEPS:], n=10)[1:8:3])
    sizes = mesh.sizes
    return {
        "machine": setting.machine, "model": setting.model,
        "processes": sizes.world, "expert_parallel_size": sizes.expert, "dp_shard_size": sizes.shard,
        "dp_replicate_size": sizes.replicate, "layers": setting.layers, "tokens_per_gpu": setting.tokens, "rank": RANK,
        "backend": setting.backend,
        "expert_parallel_backend": "deep_ep" if setting.deep_ep else dist.get_backend(),
        "checkpointing": setting.checkpointing, "routers": setting.routers, "overlapped_layers": overlapped,
        "num_steps": setting.steps,
        "p20_ms": round(p20, 1), "p50_ms": round(p50, 1), "p80_ms": round(p80, 1),
        "tokens_per_s_per_gpu": round(1000 * setting.tokens / p50), "first_step_s": round(seconds[0], 2),
        "peak_gib_per_gpu": round(peak_bytes / 2**30, 2), "max_pairs_share": round(share, 3),
        "first_loss": f"{losses[0]:.6f}", "last_loss": f"{losses[-1]:.6f}",
    }  # fmt: skip


SAME = (
    "machine", "model", "layers", "tokens_per_gpu", "rank", "backend", "checkpointing", "routers", "device",
)  # fmt: skip


def append(row: dict[str, Any], output: Path) -> None:
    """Add the row, with its ratio to the rows of one process that the file has."""
    rows: list[dict[str, Any]] = []
    if output.is_file():
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
    ones = [
        float(each["tokens_per_s_per_gpu"])
        for each in [*rows, row]
        if str(each["processes"]) == "1" and all(str(each[name]) == str(row[name]) for name in SAME)
    ]
    row["ratio_to_one"] = f"{row['tokens_per_s_per_gpu'] / statistics.median(ones):.3f}" if ones else ""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows([*rows, row])


def versions() -> dict[str, str]:
    triton = sys.modules.get("triton")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""
    return {"triton": getattr(triton, "__version__", ""), "nccl": nccl} | environment()


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens/s of each GPU in several processes.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--machine", default="", help="a name for this machine")
    parser.add_argument("--model", choices=ARCHITECTURES, default="Qwen3-30B-A3B")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8192, help="of each process in a step")
    parser.add_argument("--rows", type=int, default=2, help="sequences that these tokens make")
    parser.add_argument("--shard", type=int, default=1, help="dp_shard_size; the other processes share the experts")
    parser.add_argument("--replicate", type=int, default=1, help="dp_replicate_size")
    parser.add_argument("--backend", help="of the experts (default: the best that runs)")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--routers", choices=ROUTERS, default="random", help="how tokens choose their experts")
    parser.add_argument("--deep-ep", action="store_true", help="tokens travel by DeepEP")
    parser.add_argument("--no-overlap", action="store_true", help="shared experts run after the routed ones")
    parser.add_argument("--steps", type=int, default=10, help="that count")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU in fp32")
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.error("no GPU: only --tiny runs here")
    world = int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if arguments.tiny else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not arguments.tiny:
        torch.cuda.set_device(device)
    sizes = ParallelSizes(world // (arguments.shard * arguments.replicate), arguments.shard, arguments.replicate)
    if sizes.world != world:
        parser.error(f"{sizes.arithmetic()}, and there are {world} processes")
    setting = Setting(
        machine=arguments.machine,
        model=arguments.model,
        layers=2 if arguments.tiny else arguments.layers,
        tokens=64 if arguments.tiny else arguments.tokens,
        rows=arguments.rows,
        shard=arguments.shard,
        backend=arguments.backend or pick_backend(device.type),
        checkpointing=not arguments.no_checkpointing,
        routers=arguments.routers,
        overlap=not arguments.no_overlap,
        deep_ep=arguments.deep_ep,
        steps=arguments.steps,
        tiny=arguments.tiny,
    )
    mesh = join_mesh(sizes, device.type, timeout_s=300)
    row = measure(setting, mesh, device)
    if mesh.is_first:
        row |= versions()
        append(row, arguments.out)
        print(json.dumps(row, indent=1))
    leave_mesh()


if __name__ == "__main__":
    main()
