"""Help, version, `config` and `doctor`: the commands that answer at once."""

import json
import re
from pathlib import Path

import pytest

import expertune
from expertune.layers.backends import AUTO, BACKENDS, pick_backend, unavailable_reason
from expertune.train.config import iter_keys
from tests.cli.calling import call, call_alone

COMMANDS = {
    "train": "Fine-tune as CONFIG says; leaves the adapter, checkpoints and a report in its output_dir.",
    "eval": "Compute the held-out loss of the base model and of the adapter.",
    "generate": "Answer one prompt, or hold a chat (an empty line or Ctrl-D ends it).",
    "merge": "Merge the adapter into a full checkpoint, and check it against the unmerged model.",
    "export": "Write the adapter as per-expert LoRA for vLLM or SGLang (docs/export.md).",
    "audit": "Look for missing or broken expert adapters, and for experts that never received a token.",
    "doctor": "Show versions, the GPU, and which expert backends can run here, or why not.",
    "config": "List every key of a configuration with its type, default and meaning.",
}
OPTIONS = {
    "train": ("CONFIG", "--set", "KEY=VALUE", "--resume"),
    "eval": ("CONFIG", "--set", "--adapter"),
    "generate": ("CONFIG", "--set", "--adapter", "--prompt", "--base", "--max-new-tokens", "--temperature"),
    "merge": ("CONFIG", "--set", "--adapter", "--output"),
    "export": ("CONFIG", "--set", "--adapter", "--output", "--format", "vllm", "sglang"),
    "audit": ("CONFIG", "--set", "--adapter"),
    "doctor": (),
    "config": ("KEY", "--json-schema"),
}
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "safetensors"}


def test_help_lists_every_command() -> None:
    result = call("--help", columns=140)
    assert result.exit_code == 0
    assert "Fast, exact LoRA fine-tuning of Mixture-of-Experts language models." in result.output
    for name, meaning in COMMANDS.items():
        assert re.search(rf"│ {name} +{re.escape(meaning)}", result.output), name
    assert call("-h", columns=140).output == result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str) -> None:
    result = call(name, "--help", columns=140)
    assert result.exit_code == 0
    for text in (COMMANDS[name], *OPTIONS[name]):
        assert text in result.output
    assert "Traceback" not in result.output


def test_without_a_command_the_help_is_shown() -> None:
    result = call()
    assert result.exit_code == 2
    assert all(name in result.output for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), (["config", "lora_r"], 0), (["train", "nowhere.yaml"], 2)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_needs_no_model_imports_no_torch(arguments: list[str], code: int) -> None:
    done = call_alone("-X", "importtime", "-m", "expertune", *arguments)
    assert done.returncode == code, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in imported
    assert not imported & HEAVY


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.output) == (0, f"expertune {expertune.__version__}\n")


def test_config_lists_every_key_with_its_meaning() -> None:
    result = call("config", columns=500)
    assert result.exit_code == 0
    for key in iter_keys():
        assert re.search(rf"│ {re.escape(key.path)} +│", result.output), key.path
        assert key.meaning in result.output, key.path


def test_config_shows_one_key_with_what_is_inside_it() -> None:
    result = call("config", "lora_r", columns=150)
    assert result.exit_code == 0
    assert "a whole number of at least 1" in result.output
    assert "rank of the adapter" in result.output
    assert "lora_router" not in result.output, "a key that only contains the name"
    inside = call("config", "datasets", columns=150).output
    assert "datasets[].field_messages" in inside
    assert "test_datasets" not in inside


def test_config_searches_where_no_key_has_the_name() -> None:
    shown = call("config", "WANDB", columns=150).output
    assert "wandb_project" in shown
    assert "use_wandb" in shown
    assert "lora_r" not in shown


def test_config_does_not_know_nonsense() -> None:
    result = call("config", "nonsense")
    assert result.exit_code == 2
    assert result.output == "error: no key contains 'nonsense'; `expertune config` lists them all\n"


def test_the_json_schema_is_json() -> None:
    result = call("config", "--json-schema")
    assert result.exit_code == 0
    schema = json.loads(result.output)
    assert schema["properties"]["lora_r"]["description"] == "rank of the adapter"
    assert {key.path for key in iter_keys() if "." not in key.path} == set(schema["properties"])


def test_doctor_says_what_sonicmoe_runs_off_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    import expertune.cli.doctor as doctor

    monkeypatch.setattr(doctor, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(doctor, "note_about", lambda name: "a note" if name == "sonicmoe" else None)
    output = call("doctor", columns=300).output
    assert re.search(r"│ sonicmoe +│ yes +│ kernels for Hopper, adapters in their accumulator; a note", output)
    assert output.count("a note") == 1


def test_doctor_knows_a_package_that_is_installed_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.search(r"│ deep_ep +│ not installed", call("doctor", columns=300).output)
    info = tmp_path / "sgl_deep_ep-0.1.0.dist-info"
    for path, text in {
        info / "METADATA": "Metadata-Version: 2.1\nName: sgl-deep-ep\nVersion: 0.1.0\n",
        info / "top_level.txt": "deep_ep\n",
        tmp_path / "deep_ep" / "__init__.py": "",
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert re.search(r"│ deep_ep +│ sgl-deep-ep 0.1.0", call("doctor", columns=300).output)


def test_doctor_names_every_backend_and_why_one_cannot_run() -> None:
    result = call("doctor", columns=300)
    assert result.exit_code == 0
    for package in ("expertune", "python", "torch", "triton", "transformers", "peft", "trl"):
        assert re.search(rf"│ {package} +│ \S+", result.output), package
    assert re.search(r"│ cpu +│ \d+ cores", result.output)
    assert f"picks the best that runs: here {pick_backend()}" in result.output
    for backend in BACKENDS:
        reason = unavailable_reason(backend.name)
        row = rf"│ {backend.name} +│ {'no' if reason else 'yes'} +│ {re.escape(reason or backend.summary)}"
        assert re.search(row, result.output), backend.name
        assert reason is None or AUTO in reason, "a backend that cannot run names the way out"
