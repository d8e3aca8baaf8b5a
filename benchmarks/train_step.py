"""The whole training step in transformers' Trainer: ours beside PEFT's fold and Axolotl's kernels, in one process.

    python benchmarks/train_step.py OUT.csv --axolotl PATH          # one GPU; --ours scattermoe torch_grouped
    python benchmarks/train_step.py OUT.csv --tiny                  # a toy in fp32 on the CPU, to test this script

A Qwen3-MoE of 12 layers like Qwen3-30B-A3B's, random bf16 weights made on the GPU, 2 x 4096 random tokens a step, bf16
autocast, sdpa, non-reentrant checkpointing, full logits, AdamW on fp32 adapters of rank 16 on attention and experts.
PATH holds the folder `axolotl` of an unpacked wheel of Axolotl; of it only `integrations/kernels/libs/__init__.py` and
`integrations/kernels/libs/scattermoe_lora` are used. A way that cannot run is skipped, with its reason.

Every way is a Trainer of its own around the same frozen weights (one copy), the same adapters and the same batches.
Round 0 is each way's first steps (compilation, tuning); then the ways take turns, a block of steps each, in a rotating
order. A step lasts from `on_step_begin` to `on_step_end` with the GPU synchronised at both: forward, backward,
clipping, AdamW, zero_grad. The first steps of a block are not counted. Peak is what a process with this way alone would
have: what the other ways' adapters and optimizers take is subtracted. `ratio_to_peft` is PEFT's median time over this
way's. Losses are compared with PEFT's, step by step.
"""

import argparse
import csv
import importlib
import logging
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen3MoeConfig, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

import expertune
from environment import environment
from expertune.layers.backends import unavailable_reason

RANK = 16
BATCH_SIZE = 2
UNCOUNTED_STEPS = 2  # of each block: Trainer empties the allocator's cache when a block begins
PEFTS = "PEFT on grouped_mm"
FLOOR = "attention only"
AXOLOTL = "axolotl_scattermoe"  # our name for it: Axolotl's own is the name of one of our backends

QWEN3_30B_A3B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "max_position_embeddings": 40960, "rope_theta": 1e6,
}  # fmt: skip
TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is the same for every way."""

    sizes: dict[str, Any]
    layers: int
    sequence_len: int
    dtype: torch.dtype
    device: str
    block_steps: int
    folder: str

    @property
    def num_tokens(self) -> int:
        return BATCH_SIZE * self.sequence_len


@dataclass
class Way:
    """One way to train: the experts implementation, whether experts are adapted, and what was measured."""

    name: str
    implementation: str
    adapt_experts: bool = True
    ours: bool = False
    trainer: "MeasuredTrainer | None" = None
    first_step_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Unavailable(Exception):
    """A way that this machine or this installation does not have."""


class StepTimes(TrainerCallback):
    """The seconds of each step, synchronised at both ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


class MeasuredTrainer(Trainer):
    """Trainer as it is; it keeps the loss of each step and the step times."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        on_gpu = setting.device == "cuda"
        arguments = TrainingArguments(
            output_dir=setting.folder, max_steps=setting.block_steps, per_device_train_batch_size=BATCH_SIZE,
            learning_rate=1e-4, lr_scheduler_type="constant", optim="adamw_torch",
            bf16=setting.dtype == torch.bfloat16, use_cpu=not on_gpu, dataloader_pin_memory=on_gpu,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            train_sampling_strategy="sequential", remove_unused_columns=False,
            disable_tqdm=True, logging_strategy="no", save_strategy="no", report_to="none",
        )  # fmt: skip
        self.step_times = StepTimes()
        self.step_losses: list[Tensor] = []
        super().__init__(model, arguments, train_dataset=batches(setting), callbacks=[self.step_times])
        self.remove_callback(PrinterCallback)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss.clone())
        return loss


def batches(setting: Setting) -> list[dict[str, Tensor]]:
    """Random rows for one block; every block of every way sees the same ones."""
    size = (BATCH_SIZE * setting.block_steps, setting.sequence_len)
    ids = torch.randint(0, setting.sizes["vocab_size"], size, generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def build(way: Way, setting: Setting, base: dict[str, Tensor] | None) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with adapters, and the frozen weights: those of `base` if given, shared without a copy."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**setting.sizes, num_hidden_layers=setting.layers, norm_topk_prob=True, use_cache=False)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=setting.dtype, attn_implementation="sdpa", experts_implementation=way.implementation
        )
        if base is not None:
            model.load_state_dict(base, assign=True)
        base = model.state_dict()
        lora = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=expertune.get_attention_modules(model),
            target_parameters=expertune.get_target_parameters(model) if way.adapt_experts else None,
        )
        peft_model = get_peft_model(model, lora)
    set_adapters(peft_model)
    return peft_model, base


def set_adapters(model: nn.Module) -> None:
    """Random adapters, B too, that depend on nothing but their name and shape."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            std = 0.01 if ".lora_B" in name else parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)


def run_block(way: Way, ways: list[Way], setting: Setting) -> None:
    """Train one block; the first block of a way gives its first-step time, the later ones step times and peak."""
    trainer = way.trainer
    assert trainer is not None
    first = not trainer.step_losses
    trainer.step_times.seconds.clear()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = trainer.step_times.seconds
    way.losses = [loss.item() for loss in trainer.step_losses]
    if first:
        way.first_step_s = seconds[0]
        return
    way.seconds += seconds[UNCOUNTED_STEPS:]
    if setting.device == "cuda":
        others = sum(training_bytes(other.trainer) for other in ways if other is not way)
        way.peak_bytes = max(way.peak_bytes, torch.cuda.max_memory_allocated() - others)


def training_bytes(trainer: MeasuredTrainer | None) -> int:
    """What adapters and optimizer states take between steps (gradients are freed)."""
    if trainer is None:
        return 0
    adapters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    states = [value for parameter in adapters for value in trainer.optimizer.state[parameter].values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*adapters, *states])


def load_axolotl(path: Path | None) -> None:
    """Have Axolotl register its experts and patch PEFT, then give it a name of its own beside our backends.

    Its packages' `__init__` would import all of its trainer; empty modules stand in for those above the kernels.
    """
    kernels = "axolotl.integrations.kernels.libs"
    if path is None or not path.joinpath(*kernels.split("."), "scattermoe_lora").is_dir():
        raise Unavailable(f"--axolotl {path} has no {kernels.replace('.', '/')}/scattermoe_lora")
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.kernels", "axolotl.utils"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(path.joinpath(*name.split(".")))]
    logs = sys.modules["axolotl.utils.logging"] = ModuleType("axolotl.utils.logging")
    logs.get_logger = logging.getLogger  # type: ignore[attr-defined]
    experts, fastpath, runtime = (
        importlib.import_module(f"{kernels}.scattermoe_lora.{name}")
        for name in ("experts", "experts_lora_fastpath", "runtime")
    )
    # What Axolotl's plugin does before it loads a model with `use_scattermoe: true`.
    experts.register_scattermoe_experts()
    runtime.configure_scattermoe_runtime({"use_scattermoe": True, "gradient_checkpointing": True})

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from expertune.integrations.experts import install

    ALL_EXPERTS_FUNCTIONS.register(AXOLOTL, experts.scattermoe_experts_forward)
    fastpath._SCATTERMOE_IMPLS = frozenset({AXOLOTL})  # type: ignore[attr-defined]
    install()


def check_axolotl_ran(model: nn.Module) -> None:
    """Raise unless every experts module went through Axolotl's patch of PEFT, which marks it."""
    experts = [module for module in model.modules() if type(module).__name__.endswith("MoeExperts")]
    if not experts or not all(getattr(module, "_scattermoe_iface_ok", False) for module in experts):
        raise RuntimeError("Axolotl's fused LoRA path did not run on every layer")


def start(ways: list[Way], setting: Setting, axolotl: Path | None) -> dict[str, str]:
    """Build each way and run its first block. Returns the reasons of those that cannot run, by name."""
    skipped: dict[str, str] = {}
    base = None
    for way in ways:
        try:
            if way.implementation == AXOLOTL:
                load_axolotl(axolotl)
            elif way.ours and (reason := unavailable_reason(way.implementation, setting.device)):
                raise Unavailable(reason)
            model, base = build(way, setting, base)
            way.trainer = MeasuredTrainer(model, setting)
            run_block(way, ways, setting)
            if way.implementation == AXOLOTL:
                check_axolotl_ran(model)
        except Exception as error:  # one way that fails must not cost the others
            if not isinstance(error, Unavailable):
                traceback.print_exc()
            skipped[way.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            way.trainer = None
            print(f"{way.name}: skipped, {skipped[way.name]}", flush=True)
            continue
        print(f"{way.name}: first step {way.first_step_s:.1f} s", flush=True)
    return skipped


def loss_differences(way: Way, other: Way | None) -> list[float]:
    """Between two ways, step by step; none for a way that trains something else."""
    if other is None or not way.adapt_experts:
        return []
    return [abs(a - b) for a, b in zip(way.losses, other.losses, strict=False)]


def row(way: Way, pefts: Way | None, setting: Setting) -> dict[str, object]:
    p20, p50, p80 = (1000 * q for q in statistics.quantiles(way.seconds, n=10)[1:8:3])
    peft_p50 = 1000 * statistics.median(pefts.seconds) if pefts and pefts.seconds else None
    differences = loss_differences(way, pefts)
    return {
        "way": way.name, "layers": setting.layers, "tokens": setting.num_tokens, "rank": RANK,
        "num_steps": len(way.seconds), "p20_ms": round(p20, 1), "p50_ms": round(p50, 1), "p80_ms": round(p80, 1),
        "tokens_per_s": round(1000 * setting.num_tokens / p50),
        "ratio_to_peft": f"{peft_p50 / p50:.3f}" if peft_p50 else "",
        "first_step_s": round(way.first_step_s, 2),
        "peak_gib": round(way.peak_bytes / 2**30, 2) if way.peak_bytes else "",
        "first_loss": f"{way.losses[0]:.6f}", "last_loss": f"{way.losses[-1]:.6f}",
        "max_loss_difference": f"{max(differences):.1e}" if differences else "",
        "losses": " ".join(f"{loss:.6f}" for loss in way.losses),
    }  # fmt: skip


def versions(axolotl: Path | None) -> dict[str, str]:
    where = environment()
    triton = sys.modules.get("triton")
    infos = sorted(axolotl.glob("axolotl-*.dist-info")) if axolotl else []
    axolotl_version = infos[0].name.removeprefix("axolotl-").removesuffix(".dist-info") if infos else ""
    return {"triton": getattr(triton, "__version__", ""), "axolotl": axolotl_version} | where


def write(rows: list[dict[str, object]], where: dict[str, str], output: Path) -> None:
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows(row | where for row in rows)


def show(rows: list[dict[str, object]], ways: list[Way], skipped: dict[str, str]) -> None:
    pefts = next((way for way in ways if way.name == PEFTS), None)
    for way in ways:
        if way is not pefts and (differences := loss_differences(way, pefts)):
            print(f"{way.name}, loss differences to PEFT's: {' '.join(f'{d:.0e}' for d in differences)}")
    for name, reason in skipped.items():
        print(f"skipped: {name}, {reason}")
    columns = {
        "way": 24, "p20_ms": 8, "p50_ms": 8, "p80_ms": 8, "tokens_per_s": 13, "ratio_to_peft": 14, "first_step_s": 13,
        "peak_gib": 9, "first_loss": 11, "last_loss": 11, "max_loss_difference": 20,
    }  # fmt: skip
    header: dict[str, object] = {name: name for name in columns}
    for values in [header, *rows]:
        print(*(str(values[name]).ljust(width) for name, width in columns.items()))


def measure(ways: list[Way], setting: Setting, rounds: int, axolotl: Path | None, output: Path) -> None:
    skipped = start(ways, setting, axolotl)
    ways = [way for way in ways if way.trainer is not None]
    if not ways:
        raise SystemExit("no way could run")
    pefts = next((way for way in ways if way.name == PEFTS), None)
    where = versions(axolotl)
    for turn in range(rounds):
        for position in range(len(ways)):
            run_block(ways[(turn + position) % len(ways)], ways, setting)
        rows = [row(way, pefts, setting) for way in ways]
        write(rows, where, output)  # after each round: a run that is cut short keeps what it has
    show(rows, ways, skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole training step, way by way.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--axolotl", type=Path, help="an unpacked wheel of Axolotl")
    parser.add_argument("--ours", nargs="+", metavar="NAME", help="our backends (scattermoe; torch_grouped if tiny)")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU in fp32")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each way that count")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block that count")
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.error("no GPU: only --tiny runs here")
    ours = arguments.ours or ["torch_grouped" if arguments.tiny else "scattermoe"]
    ways = [
        Way(FLOOR, "grouped_mm", adapt_experts=False),
        Way(PEFTS, "grouped_mm"),
        *(Way(f"ours ({name})", name, ours=True) for name in ours),
    ]
    if not arguments.tiny:
        ways.append(Way("Axolotl scattermoe_lora", AXOLOTL))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        steps = UNCOUNTED_STEPS + arguments.steps
        if arguments.tiny:
            torch.set_num_threads(1)  # threads that share cores with another process make a toy's step take seconds
            setting = Setting(TINY, 2, 32, torch.float32, "cpu", steps, folder)
        else:
            setting = Setting(QWEN3_30B_A3B, arguments.layers, 4096, torch.bfloat16, "cuda", steps, folder)
        measure(ways, setting, arguments.rounds, arguments.axolotl, arguments.output)


if __name__ == "__main__":
    main()
