"""Other architectures than Qwen3-MoE run on paper with their own code: other attention, gates, routers, hybrids."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from expertune.errors import ExpertuneError
from expertune.estimate.ledger import EXCHANGE, EXPERT_GRADIENTS, EXPERTS, KEPT
from expertune.estimate.model import adapt_on_meta, count
from expertune.estimate.step import Paper, Step
from tests.estimate.settings import config_of
from tests.integrations.architectures import EXTRA, SIZES, architectures
from tests.tiny import tiny_config

FAMILIES = (
    "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "mixtral",
    "nemotron_h", "olmoe", "phimoe", "qwen3_5_moe", "qwen3_next",
)  # fmt: skip
STEP = Step(2, 32, torch.bfloat16)


def tiny_of(folder: str) -> Any:
    """A tiny configuration of the architecture in a folder of Transformers."""
    architecture = next(each for each in architectures() if each.folder == folder and each.level == "causal LM")
    kind: Any = architecture.model_class.config_class
    kind = next((each for each in get_args(kind) if "Text" in each.__name__), kind)
    names = {field.name for field in fields(kind)}
    return kind(**({name: size for name, size in SIZES.items() if name in names} | EXTRA.get(folder, {})))


@pytest.mark.parametrize("folder", FAMILIES)
def test_a_step_runs_on_paper(tmp_path: Path, folder: str) -> None:
    built = adapt_on_meta(tiny_of(folder), config_of(tmp_path, tiny_config()))
    model, paper = count(built), Paper(built)
    assert model.num_experts == 8
    assert model.expert_adapters > 0
    plain, checkpointed, together = (
        paper.run(step) for step in (STEP, replace(STEP, checkpointing=True), replace(STEP, expert_parallel=2))
    )
    assert checkpointed.after_forward[KEPT] < plain.after_forward[KEPT]
    assert together.after_forward[EXCHANGE] > 0
    kinds = {kind for moment in plain.moments for kind, size in moment.items() if size}
    assert {EXPERTS, EXPERT_GRADIENTS} & kinds


def test_a_model_that_asks_for_values_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertune.estimate.step.fused_loss_on_paper", lambda _, hidden, __: hidden.sum().item())
    paper = Paper(adapt_on_meta(tiny_config(), config_of(tmp_path, tiny_config())))
    with pytest.raises(ExpertuneError, match="Qwen3MoeForCausalLM: its step cannot be run on tensors without data"):
        paper.run(STEP)
