"""Step time and saved bytes on the CPU: ours beside PEFT's own fold, in one process, interleaved.

    python benchmarks/cpu_experts.py                 # writes benchmarks/results/cpu_experts.csv

A Qwen3-MoE model of two layers with 64 experts, LoRA on experts and attention, fp32; one step is forward and backward.
"Saved" counts the distinct tensors that autograd keeps between forward and backward, without parameters and buffers.
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import expertune
from environment import environment

NUM_STEPS = 9
RESULTS = Path(__file__).parent / "results" / "cpu_experts.csv"
WAYS = {
    "ours (expertune, torch_grouped)": "expertune",
    "PEFT's fold + transformers grouped_mm": "grouped_mm",
    "PEFT's fold + transformers eager": "eager",
}


def build(implementation: str, rank: int) -> PeftModel:
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=expertune.get_attention_modules(model),
        target_parameters=expertune.get_target_parameters(model),
    )
    peft_model = get_peft_model(model, lora)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model


def step(model: nn.Module, ids: Tensor) -> float:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}
    kept = []  # alive until the backward, or an address would be counted for two tensors

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(saved.values())


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(num_tokens: int, rank: int) -> list[dict[str, object]]:
    ids = torch.randint(0, 512, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    models = {name: build(implementation, rank) for name, implementation in WAYS.items()}
    first = {name: timed(lambda model=model: step(model, ids)) for name, model in models.items()}
    losses = {name: step(model, ids) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(NUM_STEPS):
        for name, model in models.items():
            seconds[name].append(timed(lambda model=model: step(model, ids)))
    rows = []
    for name, model in models.items():
        p20, p50, p80 = (1000 * q for q in statistics.quantiles(seconds[name], n=10)[1:8:3])
        rows.append(
            {
                "way": name, "tokens": num_tokens, "rank": rank, "experts": 64, "experts_per_token": 8, "layers": 2,
                "p20_ms": round(p20, 1), "p50_ms": round(p50, 1), "p80_ms": round(p80, 1),
                "first_step_ms": round(1000 * first[name], 1),
                "saved_mib": round(saved_bytes(model, ids) / 2**20, 1),
                "loss": f"{losses[name]:.7f}",
            }
        )  # fmt: skip
    return rows


def main() -> None:
    rows = [row for num_tokens in (128, 1024) for row in measure(num_tokens, rank=16)]
    versions = environment()
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *versions])
        writer.writeheader()
        writer.writerows(row | versions for row in rows)
    for row in rows:
        print(
            f"{row['way']:40} {row['tokens']:>5} tokens  {row['p50_ms']:>8} ms  {row['saved_mib']:>8} MiB saved  "
            f"loss {row['loss']}"
        )
    print(f"written to {output}")


if __name__ == "__main__":
    main()
