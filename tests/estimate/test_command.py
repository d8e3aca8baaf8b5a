"""`expertune estimate` from the command line: the table, JSON, what is assumed, and every refusal."""

import json
from pathlib import Path

import pytest

from expertune.estimate.gpus import GIB, GPU_GIB, memory_of
from tests.cli.calling import call
from tests.estimate.settings import settings_of, write_config
from tests.tiny import tiny_config


def test_the_table_needs_neither_weights_nor_gpu_nor_data(tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_config(), micro_batch_size=2)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json"]
    result = call("estimate", config, "--gpu", "h200", "--gpus", "4", columns=120)
    assert result.exit_code == 0, result.output
    for words in (
        "expert weights",
        "optimizer states",
        "activations kept for the backward",
        "LM head and loss",
        "CUDA context",
        "allowance",
        "allocated by torch",
        "with gradient checkpointing",
        "assumed: every batch is 2 x 64 tokens, shorter rows padded",
        "smallest layout that fits 139.0 GiB a GPU: expert_parallel_size: 1, dp_shard_size: 1",
        "on all 4: the same with dp_replicate_size: 4",
    ):
        assert words in result.output


def test_json_has_the_same_numbers(tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_config())
    result = call("estimate", config, "--memory-gib", "80", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["gpu_bytes"] == 80 * GIB
    assert found["configured"] == found["smallest"]
    items = found["configured"]["items"]
    assert sum(item["bytes"] for item in items) == found["configured"]["total_bytes"]
    assert sum(item["bytes"] for item in items if not item["allowance"]) == found["configured"]["allocated_bytes"]
    assert found["num_trainable"] > 0


def test_what_does_not_fit_says_the_ways_out(tmp_path: Path) -> None:
    result = call("estimate", write_config(tmp_path, tiny_config()), "--memory-gib", "0.01", "--gpus", "2")
    assert result.exit_code == 0
    assert "no layout of up to 2 GPUs fits 0.0 GiB each; the least is" in result.output
    assert "ways out: gradient_checkpointing: true" in result.output


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--gpu", "H20O"], {}, "--gpu: there is no 'H20O'; the nearest is H20"),
        (["--gpu", "H200", "--memory-gib", "80"], {}, "--gpu, --memory-gib: both say"),
        (["--memory-gib", "-1"], {}, "--memory-gib: got -1, need more than 0"),
        ([], {"activation_offloading": True}, "activation_offloading: the estimate does not know it"),
        ([], {"experts_implementation": "grouped_mm"}, "experts_implementation: got grouped_mm; the estimate knows"),
        ([], {"optimizer": "adamx"}, "optimizer"),
        ([], {"lora_rank": 8}, "lora_rank"),
        ([], {"lora_target_parameters": ["mlp.experts.gate_proj"]}, "the model has no parameter called"),
    ],
)
def test_refusals_name_the_thing(
    tmp_path: Path, arguments: list[str], changes: dict[str, object], message: str
) -> None:
    result = call("estimate", write_config(tmp_path, tiny_config(), **changes), *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_configuration_for_another_machine_is_read(tmp_path: Path) -> None:
    changes = {"use_scattermoe": True, "optimizer": "paged_adamw_8bit", "report_to": ["wandb"]}
    settings = settings_of(tmp_path, tiny_config(), **changes)
    assert settings.backend == "scattermoe"
    assert settings.config.optimizer == "paged_adamw_8bit"
    assert settings_of(tmp_path, tiny_config(), experts_implementation="torch_grouped").backend == "torch_grouped"
    assert settings_of(tmp_path, tiny_config()).backend == "scattermoe", "what expertune picks on a GPU"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample_packing": True}, "one row of 128 packed tokens"),
        ({"sample_packing": True, "attn_implementation": "flash_attention_2"}, "attention needs no mask"),
        ({"micro_batch_size": 1}, "attention needs no mask"),
        ({"attn_implementation": "eager"}, "eager attention keeps the probabilities"),
        ({"torch_compile": True}, "torch_compile is not modelled"),
    ],
)
def test_assumptions_are_said(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    assert any(words in note for note in settings_of(tmp_path, tiny_config(), **changes).notes)


def test_gpus_are_found_in_any_case() -> None:
    assert memory_of("nvidia h200") == memory_of("H200") == int(GPU_GIB["H200"] * GIB)
    assert memory_of("rtx4090") == memory_of("RTX 4090")
