"""A run from the command line: what it prints and leaves, and every command that puts it to use."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertune.train import generation
from expertune.train import merge as merge_module
from expertune.train.config import load_config
from expertune.train.use import config_of, load_for_use
from tests.cli.calling import MODEL, call, call_alone
from tests.cli.conftest import PROMPT, REPLY_TOKENS, FinishedRun

ADAPTER_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}

# What someone does who has never heard of expertune: argv is base model, adapter, merged checkpoint, ids, output.
WITHOUT_EXPERTUNE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged, ids, output = sys.argv[1:]
ids = torch.tensor([json.loads(ids)])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


with torch.no_grad():
    logits = {
        "adapter": PeftModel.from_pretrained(load(base), adapter)(ids).logits,
        "merged": load(merged)(ids).logits,
        "base": load(base)(ids).logits,
    }
assert AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
assert not [name for name in sys.modules if name.startswith("expertune")]
torch.save(logits, output)
"""


def printed_losses(output: str) -> list[str]:
    """Base and adapter, as `eval` prints them."""
    return re.findall(r"^held-out loss .*model +([\d.]+)\nheld-out loss .*adapter +([\d.]+)$", output, re.M)[0]


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def test_train_says_what_it_did_and_what_to_type_next(finished_run: FinishedRun) -> None:
    printed, report, run = finished_run.printed, finished_run.report, finished_run.folder
    for row in ("experts", "attention"):
        assert re.search(rf"│ {row} +│ 4 +│ 4 +│ [\d,]+ +│ [\d,]+ +│", printed), row
    for row in ("router", "embeddings and head"):
        assert re.search(rf"│ {row} +│ \d+ +│ frozen", printed), row
    assert "experts run on: torch_grouped (the best that runs here)" in printed
    assert "before training  held-out loss" in printed
    assert re.search(r"^step 8/8  loss [\d.]+  [\d,]+ tokens/s  [\d.]+ GiB$", printed, re.M)
    assert f"held-out loss {report['heldout_loss_before']:.4f} → {report['heldout_loss_after']:.4f}\n" in printed
    assert "8 steps in " in printed
    run = min(os.path.relpath(run), str(run), key=len)  # as paths are shown: from here, or in full
    assert f"adapter: {run}/adapter\n" in printed
    assert "expert projections have a finite A and B for every expert\n" in printed
    assert re.search(rf"^next: .*expertune generate '{run}'$", printed, re.M), "the path has a space in it"
    assert re.search(rf"^ .*expertune merge '{run}' --output '{run}/merged'$", printed, re.M)
    assert "\x1b" not in printed


def test_train_leaves_everything_behind(finished_run: FinishedRun) -> None:
    run, report = finished_run.folder, finished_run.report
    assert {path.name for path in run.iterdir()} == {
        "adapter",
        "checkpoint-8",
        "expertune.yaml",
        "kernels.json",
        "report.json",
    }
    assert {path.name for path in (run / "adapter").iterdir()} >= ADAPTER_FILES
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == report["base_model"] == str(MODEL)
    assert (saved["r"], saved["lora_alpha"]) == (4, 8)
    assert set(saved["target_parameters"]) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == report["trainable_parameters"]
    assert report["steps"] == 8
    assert report["experts_backend"].startswith("torch_grouped")
    assert report["heldout_loss_after"] < report["heldout_loss_before"] - 0.2
    assert [prompt for prompt, _ in report["samples_before"] + report["samples_after"]] == [PROMPT, PROMPT]
    assert [entry["step"] for entry in report["log"] if "loss" in entry] == list(range(1, 9))
    assert report["seconds"] > 0
    assert report["peak_memory_gib"] > 0
    assert report["resumed_from"] is None
    audit = report["adapter_audit"]
    assert audit["problems"] == []
    assert audit["num_experts"] == audit["num_projections"] // 2 * 16
    assert audit["without_token"] == {}


def test_the_saved_configuration_is_the_one_that_ran(finished_run: FinishedRun) -> None:
    assert load_config(finished_run.folder / "expertune.yaml").config == load_config(finished_run.config).config


@pytest.mark.parametrize("how", ["run folder", "configuration", "checkpoint"])
def test_eval_gives_the_losses_of_the_report(how: str, finished_run: FinishedRun) -> None:
    arguments = {
        "run folder": [finished_run.folder],
        "configuration": [finished_run.config],
        "checkpoint": [finished_run.folder, "--adapter", finished_run.folder / "checkpoint-8"],
    }[how]
    result = call("eval", *arguments)
    assert result.exit_code == 0, result.output
    report = finished_run.report
    want = (f"{report['heldout_loss_before']:.4f}", f"{report['heldout_loss_after']:.4f}")
    assert printed_losses(result.output) == want


def test_eval_on_other_rows(finished_run: FinishedRun) -> None:
    rows = finished_run.folder.parents[1] / "train.jsonl"
    result = call("eval", finished_run.folder, "--set", f"test_datasets.0.path={rows}")
    assert result.exit_code == 0, result.output
    base, adapted = printed_losses(result.output)
    assert float(adapted) < float(base)
    assert float(base) != pytest.approx(finished_run.report["heldout_loss_before"], abs=1e-3)


def test_a_run_can_be_moved(finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy's own adapter counts, not the one in the place that its saved configuration names."""
    shutil.copytree(finished_run.folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(weights).items()}, weights)
    monkeypatch.chdir(tmp_path)
    base, adapted = printed_losses(call("eval", "copy").output)
    assert base == adapted


def test_a_run_can_be_used_without_what_only_training_needs(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_run.folder, tmp_path / "run")
    saved = tmp_path / "run" / "expertune.yaml"
    text = saved.read_text(encoding="utf-8")
    for name, value in {
        "report_to": "[wandb]",
        "optimizer": "paged_adamw_8bit",
        "lora_model_dir": "/gone",
        "lora_dropout": 0.1,
    }.items():
        text, count = re.subn(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.M)
        assert count == 1, name
    saved.write_text(text, encoding="utf-8")
    monkeypatch.setattr("expertune.train.config.rules.package_missing", lambda _name: True)
    result = call("generate", tmp_path / "run", "-p", "Hello", "--max-new-tokens", "1")
    assert result.exit_code == 0, result.output


def test_generate_answers_as_the_report_says(finished_run: FinishedRun) -> None:
    prompt = ("--prompt", PROMPT, "--max-new-tokens", str(REPLY_TOKENS))
    adapted, base = (
        call("generate", finished_run.folder, *prompt),
        call("generate", finished_run.config, "--base", *prompt),
    )
    assert adapted.exit_code == base.exit_code == 0
    assert adapted.output == finished_run.report["samples_after"][0][1] + "\n"
    assert base.output == finished_run.report["samples_before"][0][1] + "\n"
    assert adapted.output != base.output


def test_generate_prints_the_answer_as_it_is(finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "[bold]x[/] = d[1:smile:] " + "a long line " * 20 + "/\n\tend"
    monkeypatch.setattr(generation, "reply", lambda *_args, **_options: answer)
    assert call("generate", finished_run.folder, "-p", "Why?").output == answer + "\n"


def test_a_chat_remembers_its_turns(finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []
    answers: list[str] = []
    real = generation.reply

    def recording(model: Any, tokenizer: Any, messages: Any, **options: Any) -> str:
        asked.append([dict(message) for message in messages])
        answers.append(real(model, tokenizer, messages, **options))
        return answers[-1]

    monkeypatch.setattr(generation, "reply", recording)
    result = call("generate", finished_run.folder, "--max-new-tokens", "8", typed="Hello\nWhat is a queue?\n")
    assert result.exit_code == 0, result.output
    assert result.output == "".join(f"{answer}\n" for answer in answers), "no prompt where nobody types"
    first, second = {"role": "user", "content": "Hello"}, {"role": "user", "content": "What is a queue?"}
    assert asked == [[first], [first, {"role": "assistant", "content": answers[0]}, second]]


def test_an_empty_line_ends_a_chat(finished_run: FinishedRun) -> None:
    result = call("generate", finished_run.folder, typed="\nHello\n")
    assert (result.exit_code, result.output) == (0, "")


def test_a_stopped_run_is_used_from_its_newest_checkpoint(finished_run: FinishedRun, tmp_path: Path) -> None:
    shutil.copytree(finished_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    result = call("generate", tmp_path / "run", "-p", PROMPT, "--max-new-tokens", str(REPLY_TOKENS))
    assert result.exit_code == 0, result.output
    assert f"note: the run is not finished; using its newest checkpoint, {tmp_path}/run/checkpoint-8\n" in result.output
    assert finished_run.report["samples_after"][0][1] in result.output


def test_merge_says_what_it_checked(merged: tuple[Path, str]) -> None:
    folder, printed = merged
    numbers = re.search(
        r"differ from the unmerged model's by (\S+) \(allowed: (\S+); .* changes them by (\S+)\)", printed
    )
    assert numbers is not None, printed
    error, allowed, effect = map(float, numbers.groups())
    assert error < 2e-2 < allowed == 6e-2 < effect, "the shipped model is in bf16"
    assert f"merged into {folder}; read back" in printed
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert not [name for name in names if "adapter" in name]


def test_peft_and_transformers_alone_get_the_same_model(
    finished_run: FinishedRun, merged: tuple[Path, str], tmp_path: Path
) -> None:
    ids = torch.randint(4096, (48,), generator=torch.Generator().manual_seed(3)).tolist()
    adapter, output = finished_run.folder / "adapter", tmp_path / "logits.pt"
    done = call_alone("-c", WITHOUT_EXPERTUNE, MODEL, adapter, merged[0], json.dumps(ids), output)
    assert done.returncode == 0, done.stderr
    logits = torch.load(output)
    with torch.no_grad():
        model = load_for_use(config_of(finished_run.folder, []), adapter=adapter).model
        want = model(torch.tensor([ids], device=model.device)).logits.cpu()
    assert distance(logits["adapter"], want) < 1e-4
    assert distance(logits["merged"], want) < 2e-2  # its weights are rounded to bf16, as the base's are
    assert distance(logits["base"], want) > 1e-2


def test_merge_does_not_overwrite(finished_run: FinishedRun, merged: tuple[Path, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in merged[0].iterdir()}
    result = call("merge", finished_run.folder, "-o", merged[0])
    assert result.exit_code == 2
    assert f"--output: {merged[0]} exists; choose another folder or delete it" in result.output
    assert before == {path: path.stat().st_mtime_ns for path in merged[0].iterdir()}


@pytest.mark.parametrize("wrong", ["another model", "not a number", "tolerance"])
def test_a_merge_that_is_another_model_leaves_nothing(
    wrong: str, finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merge_module.AutoModelForCausalLM

    class Reread:
        @staticmethod
        def from_pretrained(folder: str, **options: Any) -> Any:
            model = real.from_pretrained(str(MODEL) if wrong == "another model" else folder, **options)
            if wrong == "not a number":
                next(model.parameters()).data.fill_(torch.nan)
            return model

    monkeypatch.setattr(merge_module, "AutoModelForCausalLM", Reread)
    if wrong == "tolerance":
        monkeypatch.setattr(merge_module, "TOLERANCE", {torch.bfloat16: 1e-12})
    result = call("merge", finished_run.folder, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "the merged model differs from the unmerged one" in result.output
    assert "nothing was written" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_export_writes_what_the_server_reads(server: str, finished_run: FinishedRun, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    result = call("export", finished_run.folder, "--format", server, "-o", folder)
    assert result.exit_code == 0, result.output
    assert f"wrote {folder} in the format that {server} " in result.output
    assert re.search(r" reads: \d+ tensors, rank 4\n", result.output)
    assert re.search(rf"^next: .*{server}.* --enable-lora .*NAME={folder}$", result.output, re.M)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert f"{len(tensors)} tensors" in result.output
    assert tensors["base_model.model.model.layers.0.mlp.experts.15.down_proj.lora_A.weight"].shape == (4, 64)
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["base_model_name_or_path"]) == (4, 8, str(MODEL))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = call("export", finished_run.folder, "--format", server, "-o", folder)
    assert again.exit_code == 2
    assert f"--output: {folder} exists; choose another folder or delete it" in again.output
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("wrong", ["missing", "not a number", "another model"])
def test_a_broken_adapter_is_named_and_not_exported(wrong: str, finished_run: FinishedRun, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(finished_run.folder / "adapter", adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
    if wrong == "missing":
        del weights[key]
    elif wrong == "not a number":
        weights[key][4 * 3] = torch.nan  # rank 4: expert 3
    else:
        weights = {name: weight[..., :-4].clone() for name, weight in weights.items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    words = {
        "missing": "model.layers.1.mlp.experts.gate_up_proj: A is missing",
        "not a number": "model.layers.1.mlp.experts.gate_up_proj: A has values that are not finite in expert 3",
        "another model": "the base model needs [",
    }[wrong]
    audit = call("audit", finished_run.folder, "--adapter", adapter)
    assert audit.exit_code == 1
    assert words in audit.output
    export = call("export", finished_run.folder, "--adapter", adapter, "--format", "vllm", "-o", tmp_path / "out")
    assert export.exit_code == 2
    assert words in export.output
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_audit_says_that_the_adapter_is_whole(finished_run: FinishedRun) -> None:
    result = call("audit", finished_run.folder)
    assert result.exit_code == 0, result.output
    assert "expert projections have a finite A and B for every expert\n" in result.output
    assert "every expert received a token\n" in result.output
