"""Whole training runs in the crew's processes, on a model so small that thirty steps take seconds."""

import json
import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.distributed.processes import Crew
from tests.train.runs import MODEL, write_config, write_rows

STEPS, ROWS, HELDOUT_ROWS = 30, 45, 7


def make_base_model(folder: Path) -> Path:
    """The first two layers of the shipped model, in several files; each expert is stored by itself.

    A random model would not do: routers that choose between equals turn rounding into other choices.
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL, num_hidden_layers=2)
    model.save_pretrained(folder, max_shard_size="2MB")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def wide_model(folder: Path) -> Path:
    """Two random layers with rows of 256 values, as DeepEP wants them; the shipped model has 192."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MODEL, num_hidden_layers=2, hidden_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def write_run(folder: Path, base_model: Path, *, batches: int, **changes: Any) -> Path:
    """A configuration of `batches` forward passes of a row each, in each process, for a step.

    45 rows an epoch: with four rows a step over all processes, the twelfth has one, and the other processes none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "base_model": str(base_model),
        "datasets": [{"path": str(write_rows(folder / "rows.jsonl", ROWS)), "type": "chat_template"}],
        "test_datasets": [{"path": str(write_rows(folder / "heldout.jsonl", HELDOUT_ROWS, skip=60))}],
        "gradient_accumulation_steps": batches,
        "micro_batch_size": 1,
        "max_steps": STEPS,
        "num_epochs": 9,
        "learning_rate": 2e-3,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,  # below the norms of these runs: clipping does something
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "sample_prompts": ["Give the signature of `Queue.put`, described as: Put an item into the queue."],
        "sample_max_new_tokens": 6,
        "bf16": False,
        "ddp_timeout": 60,
    }
    return write_config(folder, **(options | changes))


def train_here(config: Path, overrides: tuple[str, ...] = (), resume: bool = False) -> str:
    """One process's part of a run; what it printed."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from rich.console import Console

    from expertune.train.config import load_config
    from expertune.train.run import train

    AcceleratorState._reset_state(True)  # a process of the crew trains more than once
    GradientState._reset_state()
    PartialState._reset_state()
    printed = StringIO()
    with redirect_stdout(StringIO()):
        settings = load_config(config, overrides).config
        train(settings, Console(file=printed, width=200), resume=resume, resume_command="RESUME")
    return printed.getvalue()


def run_together(crew: Crew | None, config: Path, *overrides: str, resume: bool = False) -> list[str]:
    """The run in all processes of a crew, or in this one; what each printed."""
    if crew is None:
        assert "RANK" not in os.environ
        return [train_here(config, overrides, resume)]
    return crew.run(train_here, config, overrides, resume, timeout_s=120)


def log_of(folder: Path) -> list[dict[str, float]]:
    """The log of a finished run, without its last line, which sums up."""
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    return [entry for entry in report["log"] if "loss" in entry]


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
