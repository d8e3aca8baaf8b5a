"""Training by `use_sonicmoe: true` in the YAML, both ways of applying the adapter."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from expertune.integrations import refusals
from expertune.layers import running
from expertune.ops.experts.sonicmoe import mlp
from expertune.ops.triton_launch import is_hopper
from expertune.train.config import rules
from tests.train.runs import MODEL, losses, run, write_config

BOTH = ("low_rank", "materialize")
ON_HOPPER = torch.cuda.is_available() and is_hopper(torch.device("cuda"))


def assert_the_adapters_moved(output_dir: Path) -> None:
    weights = load_file(output_dir / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[6] for name in weights} >= {"experts", "q_proj"}
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name), "an adapter never moved"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off beside a GPU")
@pytest.mark.parametrize("way", BOTH)
def test_the_key_decides_the_way(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (running, refusals):
        monkeypatch.setattr(module, "unavailable_reason", lambda *_, **__: None)
    monkeypatch.setattr(rules, "experts_backend_problem", lambda _: None)
    running._backend_for.cache_clear()
    seen: set[str] = set()
    run_mlp = mlp.sonicmoe_expert_mlp
    monkeypatch.setattr(mlp, "sonicmoe_expert_mlp", lambda *a, **k: seen.add(k["adapter"]) or run_mlp(*a, **k))
    options = {
        "sequence_len": 32,
        "micro_batch_size": 1,
        "excess_length_strategy": "truncate",
        "max_steps": 1,
        "warmup_steps": 0,
    }
    _, printed = run(write_config(tmp_path, use_sonicmoe=True, sonicmoe_lora=way, **options))
    running._backend_for.cache_clear()
    assert seen == {way}
    assert f"experts run on: sonicmoe, sonicmoe_lora: {way}" in printed
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert_the_adapters_moved(tmp_path / "run")


def wide_model(folder: Path) -> Path:
    """The shipped model with random experts as wide as Hopper's kernel takes them, and its tokenizer."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MODEL, hidden_size=256, moe_intermediate_size=256)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="a GPU of compute capability 9 is needed")
class TestOnHopper:
    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    @pytest.mark.parametrize("way", BOTH)
    def test_it_learns(self, way: str, precision: str, tmp_path: Path) -> None:
        options = {
            "max_steps": 30,
            "num_epochs": 10,
            "learning_rate": 3e-3,
            "gradient_checkpointing": True,
            precision: True,
        }
        model = wide_model(tmp_path / "model")
        run(write_config(tmp_path, base_model=str(model), use_sonicmoe=True, sonicmoe_lora=way, **options))
        curve = losses(tmp_path / "run")
        assert all(math.isfinite(loss) for loss in curve)
        assert sum(curve[-5:]) / 5 < sum(curve[:5]) / 5 - 0.2
        assert_the_adapters_moved(tmp_path / "run")
        kernels = json.loads((tmp_path / "run" / "kernels.json").read_text(encoding="utf-8"))["kernels"]
        assert "hopper_linear" in {kernel["name"] for kernel in kernels}

    @pytest.mark.parametrize("way", BOTH)
    def test_it_follows_pefts_curve(self, way: str, tmp_path: Path) -> None:
        options = {"max_steps": 50, "num_epochs": 10, "learning_rate": 2e-3, "lora_r": 8}
        run(write_config(tmp_path / "ours", use_sonicmoe=True, sonicmoe_lora=way, **options))
        run(write_config(tmp_path / "pefts", experts_implementation="grouped_mm", **options))
        ours, pefts = losses(tmp_path / "ours" / "run"), losses(tmp_path / "pefts" / "run")
        assert pefts[-1] < 0.7 * pefts[0]
        assert sum(ours[-10:]) == pytest.approx(sum(pefts[-10:]), rel=1e-2)
