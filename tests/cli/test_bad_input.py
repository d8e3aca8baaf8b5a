"""Everything a person can get wrong at the command line, and what they are told: the thing, the reason, the way out.

Each is refused before a step is trained, with the exit code of wrong use, and never with a traceback.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from expertune.train.run import Trainer
from tests.cli.calling import MODEL, call, short_rows, write_config, write_rows

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
CHAT = {"messages": [USER, ANSWER]}


@dataclass(frozen=True)
class Bad:
    """One bad input.

    says: fragments of the message. arguments: of the command, `train config.yaml` unless said otherwise. keys: changes
    to a configuration that works. files: name to text, or to rows of JSON lines, in the current folder beside it.
    make: builds what is neither. code: the exit code.
    """

    says: tuple[str, ...]
    arguments: tuple[str, ...] = ("train", "config.yaml")
    keys: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | list[Any]] = field(default_factory=dict)
    make: Callable[[Path, pytest.MonkeyPatch], object] | None = None
    code: int = 2


def bad(*says: str, **parts: Any) -> Bad:
    return Bad(says, **parts)


def keys(*says: str, **changes: Any) -> Bad:
    """A configuration with these keys."""
    return Bad(says, keys=changes)


def sets(assignment: str, *says: str) -> Bad:
    """The working configuration with `--set`."""
    return Bad(says, ("train", "config.yaml", "--set", assignment))


def text(content: str, *says: str) -> Bad:
    """A configuration of this text."""
    return Bad(says, files={"config.yaml": content})


def rows(content: str | list[Any], *says: str, **changes: Any) -> Bad:
    """The working configuration with these training rows."""
    return Bad(says, keys=changes, files={"train.jsonl": content})


def command(line: str, *says: str, **parts: Any) -> Bad:
    """Another command than train."""
    return Bad(says, tuple(line.split()), **parts)


def model_copy(folder: Path, **changes: Any) -> None:
    """The shipped model without its weights under `model`; `changes` are to its config.json."""
    shutil.copytree(MODEL, folder / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.csv"))
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    (folder / "model" / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def broken_model_config(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    model_copy(folder)
    (folder / "model" / "config.json").write_text('{"model_type": "qwen3_moe",', encoding="utf-8")


def unknown_architecture(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    model_copy(folder, model_type="qwen9_moe", architectures=["Qwen9MoeForCausalLM"])


def no_weights(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    model_copy(folder)


def damaged_weights(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    model_copy(folder)
    (folder / "model" / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:10_000])


def incomplete_weights(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    model_copy(folder)
    weights = load_file(MODEL / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.3." not in name}
    save_file(kept, folder / "model" / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "model").mkdir()
    shutil.copy(MODEL / "config.json", folder / "model")


def dense_model(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    model_copy(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=4096, num_key_value_heads=1, head_dim=16, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def earlier_run(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "run" / "adapter").mkdir(parents=True)


def run_without_adapter(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "run").mkdir()
    shutil.copy(folder / "config.yaml", folder / "run" / "expertune.yaml")


def adapter_folder(folder: Path, *, rank: int = 4) -> None:
    """A folder that PEFT takes for an adapter of the shipped model, without its weights."""
    saved = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "target_modules": ["q_proj"]}
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(saved), encoding="utf-8")


def run_with_damaged_adapter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    run_without_weights(folder, patch)
    (folder / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"")


def run_with_adapter_of_another_model(folder: Path, patch: pytest.MonkeyPatch) -> None:
    run_without_weights(folder, patch)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    weights = {name.format(layer, part): torch.zeros(4, 4) for layer in range(4) for part in "AB"}
    save_file(weights, folder / "run" / "adapter" / "adapter_model.safetensors")


def run_with_a_copied_checkpoint(folder: Path, _patch: pytest.MonkeyPatch) -> None:
    (folder / "run" / "checkpoint-4-copy").mkdir(parents=True)
    (folder / "run" / "checkpoint-4-copy" / "trainer_state.json").write_text("{}", encoding="utf-8")


def run_without_weights(folder: Path, patch: pytest.MonkeyPatch) -> None:
    run_without_adapter(folder, patch)
    adapter_folder(folder / "run")


def full_disk(_folder: Path, patch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=2**20)
    patch.setattr("shutil.disk_usage", lambda _path: usage)


def no_gpu(_folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


def disk_full_while_writing(_folder: Path, patch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr("expertune.train.run.write_whole", fail)


def gpu_out_of_memory(_folder: Path, patch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    patch.setattr("expertune.train.run.load_model", fail)


MODEL_HERE = {"base_model": "model"}
OTHER_FILE = {"datasets": [{"path": "other.jsonl"}]}
TABLE = {
    # the command line
    "no configuration": command("train", "Missing argument 'CONFIG'"),
    "no such command": command("trian config.yaml", "No such command 'trian'", "train"),
    "no such option": command("train config.yaml --lora_r 4", "No such option", "--lora_r"),
    "no such key to explain": command("config lora_rank", "no key contains 'lora_rank'", "the nearest is lora_r"),
    "zero tokens": command("generate run --max-new-tokens 0", "Invalid value for '--max-new-tokens'", "1"),
    # the file
    "missing file": command("train nowhere.yaml", "nowhere.yaml: no such file"),
    "other suffix": command("train config.yml", "config.yml: no such file; there is config.yaml"),
    "folder": command("train .", ".: is a folder; need a YAML file; it holds config.yaml"),
    "empty": text("", "config.yaml: is empty", "base_model and datasets", "expertune config"),
    "no YAML": text("base_model: [a, b\n", "config.yaml: is not valid YAML at line 2"),
    "a tab": text("base_model: x\ndatasets:\n\t- path: y\n", "line 3", "indent with spaces"),
    "a list": text("- base_model: x\n", "holds a list", "key: value"),
    "a key twice": text("seed: 1\nseed: 2\n", "seed: is given twice, in lines 1 and 2"),
    # keys and values
    "unknown key": keys("learing_rate: is not a key; the nearest is learning_rate", "(line 4)", learing_rate=1e-3),
    "unknown key inside": keys("datasets[0].tpye", "the nearest is type", datasets=[{"path": "a", "tpye": "alpaca"}]),
    "unknown --set": sets("lora_rnak=4", "lora_rnak: is not a key; the nearest is lora_r", "(--set)"),
    "--set without value": sets("lora_r", "need key=value"),
    "text for a number": keys("lora_r: got eight; need a whole number of at least 1", "(line 5)", lora_r="eight"),
    "half a rank": sets("lora_r=0.5", "lora_r: got 0.5; need a whole number"),
    "negative": sets("learning_rate=-1", "learning_rate: got -1; need a number above 0"),
    "maybe": sets("sample_packing=maybe", "sample_packing: got maybe; need true or false"),
    "other optimizer": sets("optimizer=adamw_torch_fussed", "the nearest is adamw_torch_fused"),
    "quantised": sets("load_in_4bit=true", "load_in_4bit: is known to Axolotl but not supported"),
    "two problems at once": keys("2 problems", "lora_r: got 0", "sead: is not a key", lora_r=0, sead=1),
    # contradictions
    "two backends": keys(
        "use_scattermoe, use_sonicmoe: both are true", "remove one", use_scattermoe=True, use_sonicmoe=True
    ),
    "flag against name": keys(
        "use_sonicmoe is true and experts_implementation is eager; remove one of them",
        use_sonicmoe=True,
        experts_implementation="eager",
    ),
    "no such backend": sets("experts_implementation=sonic", "got sonic", "the nearest is sonicmoe"),
    "sonicmoe without Hopper": bad(
        "sonicmoe needs an NVIDIA GPU of compute capability 9.x or newer (Hopper)",
        "Use experts_implementation: expertune",
        keys={"use_sonicmoe": True},
        make=no_gpu,
    ),
    "dropout on experts": keys("lora_dropout: got 0.1; need 0", "lora_target_parameters: []", lora_dropout=0.1),
    "nothing trains": keys("nothing would train", lora_target_modules=[], lora_target_parameters=[]),
    "two held-out sets": keys("need one", "val_set_size: 0", val_set_size=2, test_datasets=[{"path": "train.jsonl"}]),
    "evaluation of nothing": keys("no rows are held out", "val_set_size", eval_steps=2),
    "two GPUs": keys("expert_parallel_size", "2 x 1 = 2", "the 1 process", "--nproc 2", expert_parallel_size=2),
    # the model
    "missing model folder": keys(
        "base_model: got ./models/moe", "no such", "hub id (org/name)", base_model="./models/moe"
    ),
    "file for a model": keys("base_model: got config.yaml, which is a file; need the folder", base_model="config.yaml"),
    "no config.json": bad(
        "base_model: ",
        "is no model's folder (no config.json)",
        keys=MODEL_HERE,
        make=lambda folder, _: (folder / "model").mkdir(),
    ),
    "broken config.json": bad("base_model: ", "config.json", keys=MODEL_HERE, make=broken_model_config),
    "unknown architecture": bad("base_model: ", "qwen9_moe", keys=MODEL_HERE, make=unknown_architecture),
    "no weights": bad("base_model: ", "model.safetensors", keys=MODEL_HERE, make=no_weights),
    "damaged weights": bad(
        "base_model: ", "the weights in ", "are damaged", "again", keys=MODEL_HERE, make=damaged_weights
    ),
    "incomplete weights": bad(
        "base_model: ", "incomplete: it has no model.layers.3", "more", keys=MODEL_HERE, make=incomplete_weights
    ),
    "adapter for a model": bad(
        "base_model: ",
        "(no config.json); it holds an adapter, which goes into lora_model_dir",
        keys={"base_model": "adapter"},
        make=lambda folder, _: adapter_folder(folder),
    ),
    "no tokenizer": bad("base_model: ", "has no tokenizer", "tokenizer_config", keys=MODEL_HERE, make=no_tokenizer),
    "no MoE": bad("base_model: ", "has no experts", "lora_target_parameters: []", keys=MODEL_HERE, make=dense_model),
    "no such module": keys(
        "lora_target_modules: ", "no module called query_proj", "q_proj", lora_target_modules=["query_proj"]
    ),
    "one wrong module": keys(
        "no module called v_prj", "the nearest is v_proj", lora_target_modules=["q_proj", "v_prj"]
    ),
    "pattern of nothing": keys("lora_target_modules: ", "matches no module", lora_target_modules=r".*\.attn\..*"),
    "no such parameter": keys(
        "lora_target_parameters: ",
        "no parameter called mlp.experts.up_proj",
        "there are mlp.experts.down_proj, mlp.experts.gate_up_proj",
        lora_target_parameters=["mlp.experts.up_proj"],
    ),
    "nothing of that name to save": keys(
        "lora_modules_to_save: ", "no module called head", "lm_head", lora_modules_to_save=["head"]
    ),
    # tokens and templates
    "broken template": keys("chat_template_jinja: line 1: ", chat_template_jinja="{% for m in messages %}{{ m.content"),
    "template of nothing": keys(
        "mark no token",
        "chat_template: chatml",
        chat_template_jinja="{{ messages[0].content }}{% generation %}{% endgeneration %}",
    ),
    "template without markers": keys(
        "has no {% generation %} markers", "train_on_inputs: true", chat_template_jinja="{{ messages[0].content }}"
    ),
    "unknown special token": keys(
        "special_tokens: ", "has no token '<|pad|>'", "vocabulary", special_tokens={"pad_token": "<|pad|>"}
    ),
    "unknown end token": keys("eot_tokens: ", "has no token '<|over|>'", eot_tokens=["<|over|>"]),
    # the data
    "missing data": bad("other.jsonl: no such file or folder; the nearest name there is train.jsonl", keys=OTHER_FILE),
    "empty data": rows("", "train.jsonl: the file is empty"),
    "empty folder": keys("train-data", datasets=[{"path": "./train-data"}]),
    "bad JSON": rows(f"{json.dumps(CHAT)}\n{{'a': 1}}\n", "train.jsonl:2: invalid JSON", "skip_bad_rows: true"),
    "no answer": rows([CHAT, {"messages": [USER]}], "train.jsonl:2: messages has no assistant message"),
    "row too long": rows([CHAT], "train.jsonl:1: ", "longer than sequence_len 4", "sequence_len: ", sequence_len=4),
    "unknown columns": rows([{"q": "a", "a": "b"}], "has these columns: q, a", "field_messages"),
    "tokenised": rows([{"input_ids": [1, 2]}], "tokenised already", "give the text"),
    "mixed kinds": bad(
        "chat",
        "text",
        keys={"datasets": [{"path": "train.jsonl"}, {"path": "other.jsonl"}]},
        files={"other.jsonl": [{"text": "plain"}]},
    ),
    "wrong type": keys("'instruction'", "field_instruction", datasets=[{"path": "train.jsonl", "type": "alpaca"}]),
    "too much held out": keys("val_set_size", "8", val_set_size=8),
    "held-out row too long": bad(
        "other.jsonl:1",
        "longer than sequence_len",
        keys={"test_datasets": [{"path": "other.jsonl"}]},
        files={"other.jsonl": [{"messages": [USER | {"content": "why " * 500}, ANSWER]}]},
    ),
    "bad held-out file": bad(
        "other.jsonl:1: invalid JSON", keys={"test_datasets": [{"path": "other.jsonl"}]}, files={"other.jsonl": "{\n"}
    ),
    # folders
    "file for output_dir": bad("output_dir: ", "run", "Choose another", files={"run": "a file"}),
    "file above output_dir": bad("output_dir: ", "Not a directory", keys={"output_dir": "train.jsonl/run"}),
    "read-only output_dir": keys("output_dir: /proc/run cannot be written", "Choose another", output_dir="/proc/run"),
    "earlier run": bad("output_dir: ", "holds an earlier run", "--resume", "choose another", make=earlier_run),
    "nothing to resume": command("train config.yaml --resume", "--resume: ", "has no checkpoint"),
    "a copy is no checkpoint": command(
        "train config.yaml --resume", "--resume: ", "has no checkpoint", make=run_with_a_copied_checkpoint
    ),
    "no checkpoint": keys(
        "resume_from_checkpoint: ", "is no checkpoint", "checkpoint-", resume_from_checkpoint="train.jsonl"
    ),
    "missing checkpoint": keys("resume_from_checkpoint: ", "gone", "checkpoint", resume_from_checkpoint="gone"),
    "missing adapter": keys("lora_model_dir: got gone", "folder of a trained adapter", lora_model_dir="gone"),
    "no adapter inside": keys("lora_model_dir: ", "holds no adapter (no adapter_config.json)", lora_model_dir="."),
    "adapter without weights": bad(
        "lora_model_dir: ",
        "no adapter_model.safetensors",
        keys={"lora_model_dir": "adapter"},
        make=lambda folder, _: adapter_folder(folder),
    ),
    "disk full": bad("output_dir: ", "has 1 MiB free", "lower save_total_limit", make=full_disk),
    # machines that give up: failed, not wrong use
    "disk full while writing": bad("the disk is full", "--resume", make=disk_full_while_writing, code=1),
    "GPU out of memory": bad("the GPU ran out of memory", "micro_batch_size", make=gpu_out_of_memory, code=1),
    # runs put to use
    "eval of nothing": command(
        "eval run", "nothing is held out", "--set test_datasets.0.path=FILE", make=run_with_damaged_adapter
    ),
    "eval of no run": command("eval gone", "gone: no such file or folder", "output_dir"),
    "generate without a run": command("generate .", ". is no run folder (no expertune.yaml)", "YAML file"),
    "generate before training": command("generate config.yaml --prompt x", "run holds no adapter", "train first"),
    "generate from a stopped run": command("generate run -p x", "holds no adapter", make=run_without_adapter),
    "generate nothing": command("generate config.yaml --base --prompt=", "--prompt: is empty", "chat"),
    "generate with two wishes": command("generate config.yaml --base --adapter x", "--base, --adapter", "remove one"),
    "generate with an adapter's folder": command(
        "generate adapter", "is an adapter's folder", "--adapter adapter", make=lambda folder, _: adapter_folder(folder)
    ),
    "no such adapter": command("generate config.yaml --adapter gone", "--adapter: gone does not exist"),
    "adapter of nothing": command("generate config.yaml --adapter .", "--adapter: . holds no adapter"),
    "adapter without its weights": command(
        "generate run -p x", "run/adapter", "no adapter_model.safetensors", make=run_without_weights
    ),
    "damaged adapter": command("generate run -p x", "run/adapter are damaged", make=run_with_damaged_adapter),
    "adapter of another model": command(
        "generate run -p x", "run/adapter does not fit the base model", make=run_with_adapter_of_another_model
    ),
    "export without format": command("export run -o out", "Missing option '--format'"),
    "export for another server": command("export run -o out --format tgi", "tgi", "vllm", "sglang"),
    "export without an adapter": command(
        "export config.yaml -o out --format vllm", "run holds no adapter", "train first"
    ),
    "export into a folder": command(
        "export run -o . --format vllm", "--output: . exists", make=run_with_damaged_adapter
    ),
    "export a damaged adapter": command(
        "export run -o out --format sglang", "run/adapter are damaged", make=run_with_damaged_adapter
    ),
    "export an adapter of another model": command(
        "export run -o out --format vllm",
        "does not fit the base model",
        make=run_with_adapter_of_another_model,
    ),
    "audit of no run": command("audit gone", "gone: no such file or folder", "output_dir"),
    "merge without output": command("merge run", "Missing option '--output'"),
    "merge into a folder": command("merge run -o .", "--output: . exists", "delete it", make=run_with_damaged_adapter),
    "merge into nowhere": command("merge run -o /proc/m", "--output: /proc/m cannot be", make=run_with_damaged_adapter),
    "merge into a file": command("merge run -o train.jsonl/m", "Not a directory", make=run_with_damaged_adapter),
    "merge on a full disk": command(
        "merge run -o merged",
        "--output: the disk of merged has 1 MiB free",
        "takes 7 MiB",
        make=lambda folder, patch: (run_with_damaged_adapter(folder, patch), full_disk(folder, patch)),
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with eight good rows; training would be an error."""

    def train(*_args: object, **_options: object) -> None:
        raise AssertionError("training started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "train", train)
    write_rows(tmp_path / "train.jsonl", short_rows("train.jsonl", 8))
    return tmp_path


@pytest.mark.parametrize("name", TABLE)
def test_wrong_input_is_refused_with_a_reason_and_a_way_out(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TABLE[name]
    write_config(folder / "config.yaml", **case.keys)
    for file, content in case.files.items():
        if isinstance(content, str):
            (folder / file).write_text(content, encoding="utf-8")
        else:
            write_rows(folder / file, content)
    if case.make is not None:
        case.make(folder, monkeypatch)
    result = call(*case.arguments)
    assert isinstance(result.exception, SystemExit), f"{result.exception!r}\n{result.output}"
    assert result.exit_code == case.code, result.output
    for fragment in case.says:
        assert fragment in result.output
    assert "Traceback" not in result.output
    assert not list(folder.rglob(".partial-*"))
