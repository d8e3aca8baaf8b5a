"""The audit of a saved adapter finds every way in which its file can be broken, and the experts without a token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import expertune
from tests.tiny import VOCAB, tiny_model, with_adapter

LAYER = "base_model.model.model.layers.1"
UP, DOWN = f"{LAYER}.mlp.experts.base_layer", f"{LAYER}.mlp.experts"
RANK, NUM_EXPERTS = 4, 8


def saved(folder: Path, *, base: Path | None = None, **changes: object) -> PeftModel:
    model = with_adapter(tiny_model("expertune"), **changes)
    model.get_base_model().config.save_pretrained(folder / "base")  # no weights
    model.peft_config["default"].base_model_name_or_path = str(base or folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


def change(folder: Path, how: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def test_a_whole_adapter(tmp_path: Path) -> None:
    saved(tmp_path)
    audit = expertune.audit_adapter(tmp_path / "adapter")
    assert audit.problems == []
    assert (audit.num_projections, audit.num_experts) == (4, 16)
    assert audit.without_token == {}
    assert audit.half_trained == {}
    assert audit.in_words() == [
        "all 4 expert projections have a finite A and B for every expert",
        "every expert received a token",
    ]


def remove(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(key)


def a_of(key: str, expert: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[f"{key}.lora_A.weight"][expert * RANK : (expert + 1) * RANK].fill_(value)


def one_b_of(key: str, expert: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[f"{key}.lora_B.weight"][3, NUM_EXPERTS + expert].fill_(value)


def shorter(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: tensors[key][:-RANK].clone()})


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (remove(f"{UP}.lora_A.weight"), "model.layers.1.mlp.experts.gate_up_proj: A is missing"),
        (remove(f"{DOWN}.lora_B.weight"), "model.layers.1.mlp.experts.down_proj: B is missing"),
        (remove(f"{LAYER}.self_attn.q_proj.lora_B.weight"), "model.layers.1.self_attn.q_proj: B is missing"),
        (
            a_of(UP, 5, torch.nan),
            "model.layers.1.mlp.experts.gate_up_proj: A has values that are not finite in expert 5",
        ),
        (
            one_b_of(DOWN, 2, torch.inf),
            "model.layers.1.mlp.experts.down_proj: B has values that are not finite in expert 2",
        ),
        (a_of(DOWN, 7, 0), "model.layers.1.mlp.experts.down_proj: A is all zeros in expert 7, so it cannot learn"),
        (
            shorter(f"{DOWN}.lora_A.weight"),
            "model.layers.1.mlp.experts.down_proj: A is [28, 32]; the base model needs [32, 32]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file(how: Callable[[dict[str, Tensor]], None], problem: str, tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, how)
    audit = expertune.audit_adapter(tmp_path / "adapter")
    assert audit.problems == [problem]
    assert audit.in_words() == [problem]


def test_experts_without_a_token_are_named(tmp_path: Path) -> None:
    """Trained with a router that cannot choose two of the experts: theirs and only theirs are still zero."""
    model = with_adapter(tiny_model("expertune"))
    for name, weight in model.named_parameters():
        if ".lora_B" in name:
            nn.init.zeros_(weight)
    model.train()
    barred = [2, 5]
    free = torch.tensor([expert for expert in range(NUM_EXPERTS) if expert not in barred])

    def forbid(_router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> object:
        logits, weights, chosen = output
        return logits, weights, free[chosen % len(free)]

    model.get_base_model().model.layers[1].mlp.gate.register_forward_hook(forbid)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(1, VOCAB, (8, 64), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.get_base_model().config.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    audit = expertune.audit_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert audit.problems == []
    assert audit.without_token == {"model.layers.1.mlp.experts": barred}
    assert audit.half_trained == {}
    assert audit.in_words()[1:] == [
        "2 of 16 experts never received a token:",
        "  model.layers.1.mlp.experts: experts 2, 5",
    ]


def test_one_projection_that_did_not_learn(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, lambda tensors: tensors[f"{UP}.lora_B.weight"][:, 6::NUM_EXPERTS].zero_())
    audit = expertune.audit_adapter(tmp_path / "adapter")
    assert audit.problems == []
    assert audit.without_token == {}
    assert audit.half_trained == {"model.layers.1.mlp.experts.gate_up_proj": [6]}
    assert "gate_up_proj: B is still zero for expert 6, whose other projection learned" in audit.in_words()[1]


def test_nothing_learned(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    assert expertune.audit_adapter(tmp_path / "adapter").in_words()[1:] == [
        "no expert has learned anything: B is zero in all 16"
    ]


def test_a_random_start_tells_nothing(tmp_path: Path) -> None:
    saved(tmp_path, init_lora_weights=False)
    audit = expertune.audit_adapter(tmp_path / "adapter")
    assert audit.without_token is None
    assert "cannot be told" in audit.in_words()[1]


def test_attention_only_and_one_projection_only(tmp_path: Path) -> None:
    saved(tmp_path / "attention", target_parameters=None)
    audit = expertune.audit_adapter(tmp_path / "attention" / "adapter")
    assert (audit.num_projections, audit.without_token) == (0, {})
    assert audit.in_words() == ["no expert is adapted; every adapter is there and finite"]
    saved(tmp_path / "down", target_parameters=["mlp.experts.down_proj"], rank=2)
    change(tmp_path / "down", lambda tensors: tensors[f"{DOWN}.lora_B.weight"][:, 1::NUM_EXPERTS].zero_())
    audit = expertune.audit_adapter(tmp_path / "down" / "adapter")
    assert audit.num_projections == 2
    assert audit.without_token == {"model.layers.1.mlp.experts": [1]}
