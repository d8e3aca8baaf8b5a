"""`expertune estimate` against measured peaks: the memory of three real training steps beside what was estimated.

    python benchmarks/estimate_check.py OUT.csv             # one GPU, below two minutes
    python benchmarks/estimate_check.py OUT.csv --tiny      # toys in fp32 on the CPU

Each case is a model with random weights made on the device, adapted by `train.model.add_adapter` and trained for three
steps by `train.trainer.Trainer` (TRL's SFTTrainer) with the arguments of `train.arguments`: the path of `expertune
train`. The estimate reads the same YAML. Measured on a GPU: `torch.cuda.max_memory_allocated` over the steps, less what
the case before has left. Measured on the CPU, where no allocator keeps count: parameters, buffers and the peak of
every tensor that torch makes in the steps, by the estimate's own ledger on real tensors; the estimate then has no
cuBLAS. Columns: `ratio` is estimated over measured. `reserved_gib` and `device_gib` show the allowances: what torch
has taken from the GPU, and what the GPU says is in use.
"""

import argparse
import csv
import gc
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

from environment import environment
from expertune.cli.quiet import quiet_libraries
from expertune.distributed.sizes import ParallelSizes
from expertune.estimate.gpus import GIB
from expertune.estimate.layout import CUBLAS_BYTES, memory_on
from expertune.estimate.ledger import Ledger, bytes_of
from expertune.estimate.model import adapt_on_meta, compute_dtype_on_gpu, count
from expertune.estimate.optimizers import optimizer_bytes
from expertune.estimate.run import Settings, load_settings, step_of
from expertune.estimate.step import Paper, Rows
from expertune.layers.backends import AUTO, SCATTERMOE, TORCH_GROUPED
from expertune.train.arguments import sft_config
from expertune.train.data import LossPlan
from expertune.train.model import add_adapter
from expertune.train.trainer import Trainer
from train_step import QWEN3_30B_A3B

STEPS = 3
TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny_moe" / "model"
OLMOE = {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 4096,
}  # fmt: skip
TINY = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and a batch. padded: every second row of a batch is half as long as the others."""

    name: str
    model: PretrainedConfig
    batch_size: int
    sequence_len: int
    checkpointing: bool
    padded: bool = False
    rank: int = 16

    @property
    def rows(self) -> Rows:
        return "padded" if self.padded else "full"


def qwen3(layers: int, sizes: dict[str, Any]) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**sizes, num_hidden_layers=layers, norm_topk_prob=True)


REAL = (
    Case("Qwen3-30B-A3B, 2 layers", qwen3(2, QWEN3_30B_A3B), 2, 4096, checkpointing=True),
    Case("Qwen3-30B-A3B, 4 layers", qwen3(4, QWEN3_30B_A3B), 2, 4096, checkpointing=False),
    Case("Qwen3-30B-A3B, 4 layers", qwen3(4, QWEN3_30B_A3B), 4, 2048, checkpointing=False, padded=True),
    Case("Qwen3-30B-A3B, 8 layers", qwen3(8, QWEN3_30B_A3B), 4, 4096, checkpointing=True, rank=32),
    Case("OLMoE, 8 layers", OlmoeConfig(**OLMOE, num_hidden_layers=8), 2, 2048, checkpointing=False),
)
TOYS = (
    Case("tiny, 2 layers", qwen3(2, TINY), 2, 256, checkpointing=False),
    Case("tiny, 3 layers", qwen3(3, TINY), 2, 256, checkpointing=True, rank=64),
)


@dataclass(frozen=True)
class Measured:
    """Bytes. peak: what the estimate is of. reserved, device: 0 on a CPU."""

    peak: int
    reserved: int = 0
    device: int = 0


def settings_of(case: Case, folder: Path, *, tiny: bool) -> Settings:
    """The case as a configuration that `expertune estimate` reads."""
    case.model.save_pretrained(folder)
    keys = {
        "base_model": str(folder),
        "datasets": [{"path": "random/tokens"}],
        "output_dir": str(folder / "run"),
        "sequence_len": case.sequence_len,
        "micro_batch_size": case.batch_size,
        "gradient_checkpointing": case.checkpointing,
        "lora_r": case.rank,
        "max_steps": STEPS,
        "bf16": not tiny,
        "experts_implementation": TORCH_GROUPED if tiny else SCATTERMOE,
    }
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return load_settings(path)


def estimated_bytes(case: Case, settings: Settings) -> int:
    built = adapt_on_meta(case.model, settings.config)
    model = count(built)
    step = step_of(settings, checkpointing=case.checkpointing, rows=case.rows)
    course = Paper(built).run(step)
    return memory_on(ParallelSizes(), model, optimizer_bytes(settings.config.optimizer), course).allocated_bytes


def make_trainer(case: Case, settings: Settings, device: str) -> Trainer:
    config = settings.config
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            case.model, dtype=compute_dtype_on_gpu(config), experts_implementation=AUTO
        )
    arguments = sft_config(config, LossPlan("text", False, False, None))
    arguments.max_length = None  # the rows are as long as they should be
    arguments.save_strategy = "no"
    return Trainer(
        model=add_adapter(model, config),
        args=arguments,
        train_dataset=random_rows(case),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
    )


def random_rows(case: Case) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(STEPS * case.batch_size):
        length = case.sequence_len // (2 if case.padded and index % 2 else 1)
        ids = torch.randint(0, case.model.vocab_size, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


def measure(case: Case, settings: Settings, device: str) -> Measured:
    """Train, and forget."""
    left_over = torch.cuda.memory_allocated() if device == "cuda" else 0
    trainer = make_trainer(case, settings, device)
    try:
        if device == "cpu":
            here = bytes_of([*trainer.model.parameters(), *trainer.model.buffers()])
            with Ledger() as ledger:
                trainer.train()
            return Measured(here + ledger.peak_bytes)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated() - left_over
        return Measured(peak, torch.cuda.max_memory_reserved(), total - free)
    finally:
        del trainer
        release(device)


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def row(case: Case, estimated: int, measured: Measured) -> dict[str, object]:
    return {
        "case": case.name, "batch": case.batch_size, "tokens": case.sequence_len, "rank": case.rank,
        "checkpointing": case.checkpointing, "padded": case.padded,
        "estimated_gib": f"{estimated / GIB:.4f}", "measured_gib": f"{measured.peak / GIB:.4f}",
        "ratio": f"{estimated / measured.peak:.3f}",
        "reserved_gib": f"{measured.reserved / GIB:.3f}", "device_gib": f"{measured.device / GIB:.3f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated beside measured memory of a training step.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toys in fp32 on the CPU")
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.error("no GPU: only --tiny runs here")
    if arguments.tiny and torch.cuda.is_available():
        parser.error("--tiny measures on the CPU, and training takes the GPU: set CUDA_VISIBLE_DEVICES=")
    quiet_libraries()
    device = "cpu" if arguments.tiny else "cuda"
    where = {"triton": getattr(sys.modules.get("triton"), "__version__", "")} | environment()
    rows: list[dict[str, object]] = []
    for case in TOYS if arguments.tiny else REAL:
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(case, Path(folder), tiny=arguments.tiny)
            estimated = estimated_bytes(case, settings) - (CUBLAS_BYTES if arguments.tiny else 0)
            rows.append(row(case, estimated, measure(case, settings, device)))
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep="  ", flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("w", newline="") as file:  # after each case: a run cut short keeps what it has
            writer = csv.DictWriter(file, [*rows[0], *where])
            writer.writeheader()
            writer.writerows(each | where for each in rows)


if __name__ == "__main__":
    main()
