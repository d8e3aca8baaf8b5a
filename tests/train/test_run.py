"""Training end to end: it learns, it resumes exactly, it says what it does and refuses what it cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from expertune.errors import ConfigError, ExpertuneError
from expertune.train import model as model_module
from expertune.train import run as run_module
from expertune.train.config import load_config
from tests.train.runs import losses, run, write_config, write_rows


def adapter_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "adapter" / "adapter_model.safetensors")


def test_it_learns_and_leaves_everything_behind(tmp_path: Path) -> None:
    heldout = write_rows(tmp_path / "heldout.jsonl", 12, skip=60)
    config = write_config(
        tmp_path,
        test_datasets=[{"path": str(heldout)}],
        max_steps=12,
        sample_prompts=["Give the signature of `Queue.put`, described as: Put an item into the queue."],
        report_to="tensorboard",
    )
    report, printed = run(config)
    run_dir = tmp_path / "run"
    assert report.heldout_loss_before is not None
    assert report.heldout_loss_after is not None
    assert report.heldout_loss_after < report.heldout_loss_before - 0.2
    assert report.samples_before[0][1] != report.samples_after[0][1]
    weights = adapter_weights(run_dir)
    assert {name.split(".")[6] for name in weights} == {"experts", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name), "an adapter never moved"
    for text in ("what trains", "experts", "frozen", "torch_grouped", "tokens/s", "GiB", "held-out loss"):
        assert text in printed
    logged = next(entry for entry in report.log if "loss" in entry)
    assert logged["tokens_per_second"] > 0
    assert logged["peak_memory_gib"] > 0
    assert list(run_dir.rglob("events.out.tfevents.*")), "report_to: tensorboard wrote nothing"
    assert (run_dir / "expertune.yaml").is_file()
    assert not list(run_dir.glob(".partial-*"))


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(packing: bool, tmp_path: Path) -> None:
    options = {"max_steps": 8, "save_steps": 4, "sample_packing": packing, "num_epochs": 3}
    run(write_config(tmp_path / "whole", **options))
    config = write_config(tmp_path / "resumed", **options)
    run(config)
    resumed = tmp_path / "resumed" / "run"
    shutil.rmtree(resumed / "adapter")
    shutil.rmtree(resumed / "checkpoint-8")  # as if the run had been killed after step 4
    _, printed = run(config, resume=True)
    assert "step 5/8" in printed
    assert "step 4/8" not in printed
    whole = tmp_path / "whole" / "run"
    assert losses(resumed) == losses(whole)
    got, want = adapter_weights(resumed), adapter_weights(whole)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_packing_does_not_change_the_held_out_loss(tmp_path: Path) -> None:
    heldout = [{"path": str(write_rows(tmp_path / "heldout.jsonl", 20, skip=60))}]
    before = []
    for name, options in {
        "rows": {"sample_packing": False, "eval_batch_size": 4},
        "single": {"sample_packing": False, "eval_batch_size": 1},
        "packed": {"sample_packing": True},
    }.items():
        report, _ = run(write_config(tmp_path / name, test_datasets=heldout, max_steps=1, **options))
        before.append(report.heldout_loss_before)
    assert before[1] == pytest.approx(before[0], rel=1e-5)
    assert before[2] == pytest.approx(before[0], rel=1e-5)


def test_gradient_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    run(write_config(tmp_path / "batch", micro_batch_size=4, max_steps=3))
    run(write_config(tmp_path / "accumulated", micro_batch_size=1, gradient_accumulation_steps=4, max_steps=3))
    got, want = losses(tmp_path / "accumulated" / "run"), losses(tmp_path / "batch" / "run")
    assert got == pytest.approx(want, rel=2e-3)  # the balance loss is a mean over micro-batches, not over tokens


def test_going_on_from_an_adapter(tmp_path: Path) -> None:
    run(write_config(tmp_path / "first", max_steps=4))
    first = tmp_path / "first" / "run"
    second = write_config(tmp_path / "second", lora_model_dir=str(first), max_steps=1, learning_rate=1e-12)
    run(second)
    got, want = adapter_weights(tmp_path / "second" / "run"), adapter_weights(first)
    assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)


def test_attention_only_leaves_the_experts_alone(tmp_path: Path) -> None:
    run(write_config(tmp_path, lora_target_parameters=[], lora_dropout=0.1, max_steps=2))
    assert not any("experts" in name for name in adapter_weights(tmp_path / "run"))


def test_experts_without_an_adapter_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_module.get_peft_model

    def forgetting(model: torch.nn.Module, lora: object, **kwargs: object) -> torch.nn.Module:
        lora.target_parameters = ["mlp.experts.down_proj"]  # what a version of PEFT with other matching might do
        return real(model, lora, **kwargs)

    monkeypatch.setattr(model_module, "get_peft_model", forgetting)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts\.gate_up_proj was asked for and has no adapter"):
        run(write_config(tmp_path))
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_that_is_not_whole_is_not_called_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_module.PeftModel.save_pretrained

    def losing(self: object, folder: str, **kwargs: object) -> None:
        real(self, folder, **kwargs)
        path = Path(folder) / "adapter_model.safetensors"
        weights = load_file(path)
        del weights["base_model.model.model.layers.0.mlp.experts.lora_B.weight"]
        weights["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"][0] = torch.inf
        save_file(weights, path)

    monkeypatch.setattr(run_module.PeftModel, "save_pretrained", losing)
    with pytest.raises(ExpertuneError) as caught:
        run(write_config(tmp_path, max_steps=2))
    assert str(caught.value).splitlines() == [
        f"the trained adapter is not whole, so it was not saved (what was trained is in {tmp_path}/run/checkpoint-2):",
        "  model.layers.0.mlp.experts.down_proj: B is missing",
        "  model.layers.1.mlp.experts.gate_up_proj: A has values that are not finite in expert 0",
    ]
    assert not (tmp_path / "run" / "adapter").exists()
    assert not list((tmp_path / "run").glob(".partial-*"))


def test_a_second_start_does_not_overwrite(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=1)
    run(config)
    before = adapter_weights(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds an earlier run\. Continue it with --resume"):
        run(config)
    assert before.keys() == adapter_weights(tmp_path / "run").keys()


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    run(write_config(tmp_path, max_steps=6, save_steps=2, save_total_limit=1))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_failing_save_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_module.Trainer._save_rng_state
    saves = []

    def failing(self: object, folder: str) -> None:
        saves.append(folder)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        real(self, folder)

    monkeypatch.setattr(run_module.Trainer, "_save_rng_state", failing)
    config = write_config(tmp_path, max_steps=4, save_steps=2)
    with pytest.raises(OSError, match="No space left"):
        run(config)
    left = [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]
    assert left == ["checkpoint-2"]
    monkeypatch.undo()
    report, _ = run(config, resume=True)
    assert report.steps == 4


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr("expertune.train.saving.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(ConfigError, match="has 1 MiB free, and the checkpoints to be kept need about"):
        run(write_config(tmp_path))


def test_the_report_is_complete(tmp_path: Path) -> None:
    run(write_config(tmp_path, max_steps=2))
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 2
    assert report["experts_backend"].startswith("torch_grouped")
    assert report["trainable_parameters"] > 0


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = load_config(write_config(tmp_path)).config
    with pytest.raises(ConfigError, match=r"2 GPUs are visible.*launch CONFIG --nproc 2.*CUDA_VISIBLE_DEVICES=0"):
        run_module.train(config, Console(), resume_command="RESUME")
    assert not (tmp_path / "run").exists()
