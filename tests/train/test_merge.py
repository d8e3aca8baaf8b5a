"""A merged checkpoint keeps the base's dtype, is W + s B A rounded once, and is plain Transformers' own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertune.errors import ConfigError
from expertune.train.config import load_config
from expertune.train.merge import merge
from tests.cli.calling import call_alone
from tests.comparing import relative_error
from tests.tiny import with_adapter
from tests.train.runs import MODEL, write_config

DTYPES = [torch.bfloat16, torch.float32]

# argv: merged checkpoint, ids, output.
PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM

merged, ids, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
with torch.no_grad():
    logits = model(torch.load(ids)).logits
assert "expertune" not in sys.modules
assert "peft" not in sys.modules
torch.save(logits, output)
"""


def base_in(folder: Path, dtype: torch.dtype) -> Path:
    """The shipped model with its weights in another dtype; norms are made uneven, so that no weight is trivial."""
    shutil.copytree(MODEL, folder)
    tensors = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def adapted(base: Path, folder: Path, **changes: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", experts_implementation="expertune")
    peft_model = with_adapter(model, rank=4, **changes).eval()
    for name, weight in peft_model.named_parameters():
        if ".lora_B" in name:
            weight.data *= 0.1  # as large as a trained one, so that bf16 does not flip the choice of experts everywhere
    peft_model.save_pretrained(folder)
    return peft_model


def merged_by_hand(base: Path, model: PeftModel) -> dict[str, Tensor]:
    """W + s B A of every adapted weight in fp64, by the names of the loaded model, unrounded."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    weights = {name: weight.detach() for name, weight in plain.named_parameters()}
    for name, layer in model.named_modules():
        if not getattr(layer, "lora_A", None):
            continue
        target = name.replace(".base_layer", "").removeprefix("base_model.model.")
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        if hasattr(layer, "parameter_name"):
            num_experts = layer.num_experts
            for expert in range(num_experts):
                delta = b[:, expert::num_experts] @ a.view(num_experts, -1, a.shape[1])[expert]
                weights[f"{target}.{layer.parameter_name}"][expert] += layer.scaling["default"] * delta
        else:
            weights[f"{target}.weight"] += layer.scaling["default"] * b @ a
    return weights


@pytest.mark.parametrize("trained_in", ["the base's dtype", "another dtype"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_merged_model_is_the_unmerged_one_in_the_dtype_of_its_base(
    dtype: torch.dtype, trained_in: str, tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", dtype)
    model = adapted(base, tmp_path / "adapter")
    config = load_config(
        write_config(
            tmp_path / "run",
            base_model=str(base),
            bf16=(dtype == torch.bfloat16) == (trained_in == "the base's dtype"),
        )
    ).config
    report = merge(config, tmp_path / "adapter", tmp_path / "merged")
    assert report.adapter_effect > 0.1
    assert report.relative_error < (2e-2 if dtype == torch.bfloat16 else 2e-5)

    files = list((tmp_path / "merged").glob("*.safetensors"))
    written = {name: weight for file in files for name, weight in load_file(file).items()}
    assert {weight.dtype for weight in written.values()} == {dtype}
    assert written.keys() == load_file(base / "model.safetensors").keys(), "the names of the base checkpoint"
    saved = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert saved["dtype"] == str(dtype).removeprefix("torch.")

    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    exact = merged_by_hand(base, model)
    for name, weight in got.named_parameters():
        rounding = torch.finfo(dtype).eps / 2
        error = (weight.double() - exact[name]).abs()
        bound = rounding * exact[name].abs() * 1.01 + 4e-7 * exact[name].abs().max()
        assert bool((error <= bound).all()), f"{name} was rounded more than once"

    ids = torch.randint(1, 4096, (2, 40), generator=torch.Generator().manual_seed(5))
    torch.save(ids, tmp_path / "ids.pt")
    done = call_alone("-c", PLAIN, tmp_path / "merged", tmp_path / "ids.pt", tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        unmerged = model(ids).logits
    assert relative_error(torch.load(tmp_path / "logits.pt"), unmerged) < (2e-2 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},  # tied to the embeddings in the base
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]},
    ],
    ids=["a whole module", "the router"],
)
def test_what_is_not_attention_or_experts_is_merged_too(changes: dict[str, Any], tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", torch.bfloat16)
    model = adapted(base, tmp_path / "adapter", **changes)
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path / "adapter")
    config = load_config(write_config(tmp_path / "run", base_model=str(base))).config
    report = merge(config, tmp_path / "adapter", tmp_path / "merged")
    assert report.relative_error < 2e-2 < report.adapter_effect / 2
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert {weight.dtype for file in files for weight in load_file(file).values()} == {torch.bfloat16}


def test_pefts_own_merge_rounds_twice(tmp_path: Path) -> None:
    """The canary: the bound above is tight enough to see it."""
    base = base_in(tmp_path / "base", torch.bfloat16)
    model = adapted(base, tmp_path / "adapter")
    exact = merged_by_hand(base, model)
    merged = model.merge_and_unload()
    errors = [
        (weight.double() - exact[name]).abs()
        > torch.finfo(torch.bfloat16).eps / 2 * exact[name].abs() * 1.01 + 4e-7 * exact[name].abs().max()
        for name, weight in merged.named_parameters()
    ]
    assert any(bool(error.any()) for error in errors)


def test_a_dtype_that_cannot_hold_a_merged_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_in(tmp_path / "base", torch.float32)
    adapted(base, tmp_path / "adapter")
    monkeypatch.setattr("expertune.train.merge.TOLERANCE", {torch.bfloat16: 6e-2})
    config = load_config(write_config(tmp_path / "run", base_model=str(base))).config
    with pytest.raises(ConfigError, match=r"stored as torch\.float32.*it takes bfloat16"):
        merge(config, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
