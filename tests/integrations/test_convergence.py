"""Fifty steps of training for each way of routing: the losses of PEFT's own path on eager, step by step."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import expertune
from tests.integrations.architectures import SIZES, architectures, build

FAMILIES = {
    "softmax": "qwen3_moe",
    "sigmoid with groups": "deepseek_v3",
    "not gated": "nemotron_h",
    "clamped gate with bias": "gpt_oss",
}
STEPS = 50
TOLERANCE = 1e-5
"""Relative, of the loss at each step, fp32. Measured: at most 3.3e-7."""


def losses_of(folder: str, implementation: str) -> torch.Tensor:
    """Memorise one batch with fresh adapters on attention and on every expert."""
    architecture = next(each for each in architectures() if each.folder == folder)
    base = build(architecture, implementation)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=expertune.get_attention_modules(base),
        target_parameters=expertune.get_target_parameters(base),
    )
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_give_pefts_losses(family: str) -> None:
    ours, pefts = (losses_of(FAMILIES[family], implementation) for implementation in ("expertune", "eager"))
    assert pefts[-1] < 0.5 * pefts[0]
    assert ((ours - pefts).abs() / pefts).max() < TOLERANCE
