"""An adapter trained through our path leaves the house: PEFT alone loads the same bits and gets the same outputs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.comparing import relative_error
from tests.tiny import VOCAB, randomize_lora_b, tiny_model, with_adapter

TOLERANCE = 2e-5  # fp32, two layers, relative

# argv: base model, adapter, ids, where to save the adapter again, where to put outputs.
WITHOUT_EXPERTUNE = """
import sys
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

base, adapter, ids, again, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, experts_implementation="eager", dtype="auto")
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    logits = model(input_ids=torch.load(ids)).logits
model.save_pretrained(again)
assert "expertune" not in sys.modules
torch.save((logits, get_peft_model_state_dict(model)), output)
"""

ADAPTERS = {
    "attention and experts": {},
    "experts only, rsLoRA": {"target_modules": [], "use_rslora": True},
    "down only": {"target_parameters": ["mlp.experts.down_proj"]},
    "two ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 1}},
}


def without_expertune(*arguments: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXPERTUNE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def trained(name: str) -> PeftModel:
    """Three steps of AdamW on our backend, from an adapter that does something."""
    model = with_adapter(tiny_model("expertune"), **ADAPTERS[name])
    randomize_lora_b(model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(1, VOCAB, (4, 32), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(weight, before[n]) for n, weight in model.named_parameters() if n in before)
    return model.eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_here_loaded_by_peft_alone_and_back(name: str, tmp_path: Path) -> None:
    tiny_model("eager").save_pretrained(tmp_path / "base")
    model = trained(name)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(1, VOCAB, (3, 19), generator=torch.Generator().manual_seed(7))
    torch.save(ids, tmp_path / "ids.pt")
    without_expertune(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "ids.pt", tmp_path / "again", tmp_path / "out.pt"
    )
    logits, state = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        want = model(input_ids=ids).logits
    assert relative_error(logits, want) < TOLERANCE
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    live = {n.replace(".default", ""): weight for n, weight in model.named_parameters() if ".lora_" in n}
    assert ours.keys() == state.keys() == live.keys()
    assert all(torch.equal(ours[key], live[key]) and torch.equal(state[key], live[key]) for key in live)
    again = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert again == (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    back = PeftModel.from_pretrained(tiny_model("expertune"), tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, want)
