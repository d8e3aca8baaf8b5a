"""Loading, settling, describing and saving a configuration; Axolotl's files."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from expertune.errors import ConfigError
from expertune.train.config import (
    SECTIONS,
    LoadedConfig,
    TrainConfig,
    iter_keys,
    json_schema,
    load_config,
    render_markdown,
    resolved_yaml,
    rules,
    settle,
    training_arguments,
    wandb_environment,
)
from expertune.train.config.axolotl_names import DATASET_KEYS, KEYS
from expertune.train.config.axolotl_table import REASONS, SAME_AS_HERE, TAKEN_WITH_NOTE
from expertune.train.config.model_keys import DatasetConfig, DatasetType

GOOD = "base_model: org/moe\ndatasets:\n  - path: org/rows\n"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every backend can run and every package is installed, unless a test says otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, "experts_backend_problem", lambda name: None)
    monkeypatch.setattr(rules, "package_missing", lambda name: False)


def _load(text: str = GOOD, *sets: str) -> LoadedConfig:
    path = Path("run.yaml")
    path.write_text(text, encoding="utf-8")
    return load_config(path, sets)


def _config(text: str = GOOD, *sets: str) -> TrainConfig:
    return _load(text, *sets).config


# ----- values


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("learning_rate=2e-4", 2e-4),
        ("learning_rate='2e-4'", 2e-4),
        ("learning_rate=1", 1.0),
        ("lora_r='2'", 2),
        ("lora_r=0x10", None),
        ("bf16='false'", False),
        ("bf16=no", False),
        ("bf16=auto", "auto"),
        ("bf16=On", True),
        ("train_on_inputs='yes'", True),
        ("max_steps=none", None),
        ("max_steps=null", None),
        ("max_steps=", None),
        ("seed=", 42),
        ("val_set_size=0.1", 0.1),
        ("val_set_size=100", 100),
        ("save_steps=0.25", 0.25),
        ("save_steps=50", 50),
        ("wandb_name=2", "2"),
        ("wandb_name=1e3", "1e3"),
        ("wandb_name=007", "007"),
        ("wandb_name=2024-01-01", "2024-01-01"),
        ("wandb_name=on", "on"),
        ("wandb_name='a: b'", "a: b"),
        ("wandb_watch=false", "false"),
        ("save_strategy=no", "no"),
        ("save_strategy='no'", "no"),
        ("report_to=none", []),
        ("report_to=tensorboard", ["tensorboard"]),
        ("report_to=[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("gradient_checkpointing_kwargs={use_reentrant: 'no', preserve: 1}", {"use_reentrant": False, "preserve": 1}),
        ("lr_scheduler_kwargs={min_lr_rate: 1e-1}", {"min_lr_rate": 0.1}),
        ("lora_target_modules=all-linear", "all-linear"),
        ("lora_target_modules=[q_proj]", ["q_proj"]),
        ("lora_target_parameters=mlp.experts.down_proj", ["mlp.experts.down_proj"]),
        ("special_tokens={pad_token: <pad>}", {"pad_token": "<pad>"}),
        ("eot_tokens=['1', on]", ["1", "on"]),
        ("chat_template_jinja={{ messages }}", "{{ messages }}"),
    ],
)
def test_a_value_is_read_by_the_type_of_its_key(assignment: str, expected: object) -> None:
    name = assignment.partition("=")[0]
    extra = ("gradient_checkpointing=true",) if name == "gradient_checkpointing_kwargs" else ()
    if assignment == "lora_r=0x10":
        with pytest.raises(ConfigError, match="lora_r: got 0x10"):
            _config(GOOD, assignment)
        return
    value = getattr(_config(GOOD, *extra, assignment), name)
    assert value == expected
    assert type(value) is type(expected)


def test_the_same_text_means_the_same_in_the_file() -> None:
    config = _config(GOOD + "learning_rate: 2e-4\nbf16: 'false'\nwandb_name: 1e3\nmax_steps: none\nlora_r: '2'\n")
    assert (config.learning_rate, config.bf16, config.wandb_name, config.max_steps, config.lora_r) == (
        2e-4, False, "1e3", None, 2,
    )  # fmt: skip


def test_nothing_after_a_key_is_its_default() -> None:
    loaded = _load(GOOD + "lora_r:\nval_set_size: ~\nwandb_project:\ntokens:\nload_in_4bit:\nplugins:\n")
    assert (loaded.config.lora_r, loaded.config.val_set_size, loaded.config.wandb_project) == (16, 0, None)
    assert loaded.given == {"base_model", "datasets"}
    assert loaded.notes == ()


def test_command_line_over_file_over_default() -> None:
    loaded = _load(GOOD + "lora_r: 4\nlora_alpha: 8\n", "lora_r=64", "datasets.0.split=train[:10]")
    assert (loaded.config.lora_r, loaded.config.lora_alpha, loaded.config.seed) == (64, 8, 42)
    assert loaded.config.datasets[0].split == "train[:10]"
    assert loaded.given == {"base_model", "datasets", "lora_r", "lora_alpha"}


def test_set_reaches_inside_and_appends() -> None:
    config = _config(
        GOOD, "datasets[0].message_property_mappings.role=from", "datasets.1.path=more/rows", "datasets.1.type=alpaca"
    )
    assert config.datasets[0].message_property_mappings is not None
    assert config.datasets[0].message_property_mappings.role == "from"
    assert (config.datasets[1].path, config.datasets[1].type) == ("more/rows", "alpaca")


def test_without_a_file() -> None:
    config = load_config(None, ["base_model=org/moe", "datasets.0.path=org/rows"]).config
    assert (config.base_model, config.datasets[0].path) == ("org/moe", "org/rows")


def test_merge_keys_and_byte_order_mark() -> None:
    text = "\ufeffbase_model: x\ndatasets:\n  - &one {path: a/b, type: alpaca}\n  - {<<: *one, path: c/d}\n"
    config = _config(text, "datasets.0.type=completion")
    assert [(entry.path, entry.type) for entry in config.datasets] == [("a/b", "completion"), ("c/d", "alpaca")]


def test_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        _config().lora_r = 3  # type: ignore[misc]


# ----- settling


def test_shorthands_go_into_the_keys_they_stand_for() -> None:
    config = _config(
        GOOD + "flash_attention: true\nuse_scattermoe: true\nuse_tensorboard: true\nwandb_project: p\nfp16: true\n"
        "chat_template_jinja: '{{ x }}'\nmicro_batch_size: 3\nsample_packing: true\n",
        "datasets.0.message_field_role=from",
        "datasets.0.message_field_content=value",
    )
    assert config.attn_implementation == "flash_attention_2"
    assert config.experts_implementation == "scattermoe"
    assert config.report_to == ["tensorboard", "wandb"]
    assert (config.bf16, config.chat_template, config.eval_batch_size) == (False, "jinja", 3)
    assert config.eval_sample_packing is True
    mappings = config.datasets[0].message_property_mappings
    assert mappings is not None
    assert (mappings.role, mappings.content) == ("from", "value")
    assert (config.flash_attention, config.use_scattermoe, config.use_tensorboard) == (None, None, None)


@pytest.mark.parametrize("chosen", ["use_sonicmoe: true", "experts_implementation: sonicmoe"])
@pytest.mark.parametrize("way", [None, "low_rank", "materialize"])
def test_how_sonicmoe_applies_adapters(way: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "experts_backend_problem", lambda name: None)
    config = _config(GOOD + f"{chosen}\n" + (f"sonicmoe_lora: {way}\n" if way else ""))
    assert (config.experts_implementation, config.sonicmoe_lora) == ("sonicmoe", way or "low_rank")
    assert _config(resolved_yaml(config)) == config
    assert _config(GOOD).sonicmoe_lora is None


@pytest.mark.parametrize(
    ("text", "save", "evaluate"),
    [
        ("", "epoch", "no"),
        ("val_set_size: 5\n", "epoch", "epoch"),
        ("val_set_size: 5\nevals_per_epoch: 2\nsave_steps: 10\n", "steps", "steps"),
        ("test_datasets: [{path: a/b}]\neval_strategy: no\nsave_strategy: no\n", "no", "no"),
    ],
)
def test_strategies_are_decided(text: str, save: str, evaluate: str) -> None:
    config = _config(GOOD + text)
    assert (config.save_strategy, config.eval_strategy) == (save, evaluate)
    assert config.eval_on_start is ("val_set_size" in text or "test_datasets" in text)


def test_warm_up_is_decided() -> None:
    assert _config().warmup_ratio == 0.03
    config = _config(GOOD + "warmup_steps: 0\n")
    assert (config.warmup_steps, config.warmup_ratio) == (0, None)


@pytest.mark.parametrize("text", ["use_wandb: false\nwandb_project: p\n", "wandb_project: p\nwandb_mode: disabled\n"])
def test_wandb_can_be_off(text: str) -> None:
    assert _config(GOOD + text).report_to == []


FULL = """
base_model: org/moe
datasets:
  - path: a/b
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
    roles: {assistant: [gpt, model], user: human}
  - path: c/d
    data_files: x.jsonl
test_datasets: [{path: e/f, split: test}]
special_tokens: {pad_token: "<pad>", eos_token: "null"}
eot_tokens: ["<|im_end|>", "1"]
chat_template_jinja: |
  {% for message in messages %}
  {{ message['content'] }}: "quoted" # not a comment
  {% endfor %}
lora_target_modules: [q_proj, v_proj]
lora_target_parameters: []
lora_dropout: 0.05
learning_rate: 1e-5
warmup_steps: 10
save_steps: 0.1
eval_steps: 25
wandb_name: 1e3
wandb_run_id: "0123"
wandb_watch: false
sample_prompts: ["Hello: you", "null", "- x"]
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false, context: null}
use_sonicmoe: true
flash_attention: true
report_to: tensorboard
"""


@pytest.mark.parametrize("text", [GOOD, GOOD + "val_set_size: 200\nfp16: yes\n", FULL])
def test_resolved_yaml_loads_back_to_an_equal_configuration(text: str) -> None:
    config = _config(text)
    resolved = resolved_yaml(config)
    again = _load(resolved)
    assert again.config == config
    assert again.notes == ()
    assert resolved_yaml(again.config) == resolved
    for section in SECTIONS:
        assert f"# {section.__doc__}\n" in resolved
    assert set(yaml.safe_load(resolved)) == set(TrainConfig.model_fields)
    assert settle(config) == config


# ----- paths


def test_paths_from_here_then_from_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, here = tmp_path / "configs", tmp_path / "here"
    for path in (folder / "model", folder / "data", here / "data"):
        path.mkdir(parents=True)
    (folder / "data/a.jsonl").touch()
    (folder / "data/b.jsonl").touch()
    (here / "data/b.jsonl").touch()
    (folder / "chat.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "run.yaml").write_text(
        "base_model: model\nchat_template_jinja: chat.jinja\noutput_dir: out\ndatasets:\n  - path: data/a.jsonl\n"
        "  - path: data/b.jsonl\n  - path: data/*.jsonl\n  - path: data/missing.jsonl\n  - path: org/rows\n"
        "  - path: json\n    data_files: [data/a.jsonl]\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(here)
    loaded = load_config(folder / "run.yaml")
    assert loaded.config.base_model == str(folder / "model")
    assert [entry.path for entry in loaded.config.datasets] == [
        str(folder / "data/a.jsonl"),
        str(here / "data/b.jsonl"),
        str(here / "data/*.jsonl"),
        str(here / "data/missing.jsonl"),
        "org/rows",
        "json",
    ]
    assert loaded.config.datasets[5].data_files == [str(folder / "data/a.jsonl")]
    assert loaded.config.chat_template_jinja == "{{ messages }}"
    assert loaded.config.output_dir == str(here / "out")
    assert [note.split(":")[0] for note in loaded.notes] == [
        "base_model", "chat_template_jinja", "datasets[0].path", "datasets[5].data_files",
    ]  # fmt: skip
    assert all("beside the configuration" in note for note in loaded.notes)


def test_a_saved_run_loads_after_its_checkpoint_is_gone() -> None:
    config = _config(GOOD, "resume_from_checkpoint=out/checkpoint-5")
    assert config.resume_from_checkpoint == str(Path.cwd() / "out/checkpoint-5")


# ----- Axolotl's files

QWEN3_MOE = """
base_model: Qwen/Qwen3-30B-A3B
model_type: AutoModelForCausalLM
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
  - axolotl.integrations.kernels.KernelsPlugin
  - axolotl.integrations.liger.LigerPlugin
use_kernels: true
liger_rope: true
liger_rms_norm: true
liger_fused_linear_cross_entropy: true
strict: false
chat_template: tokenizer_default
datasets:
  - path: org/chats
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
    roles_to_train: [assistant]
    train_on_eos: turn
val_set_size: 0.0
output_dir: ./outputs/out
dataset_prepared_path: last_run_prepared
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
load_in_8bit: false
load_in_4bit: false
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0
lora_target_linear: true
lora_model_dir:
lora_mlp_kernel: false
lora_qkv_kernel: true
wandb_project:
wandb_entity:
wandb_watch:
gradient_accumulation_steps: 2
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: true
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
deepspeed:
fsdp:
fsdp_config:
"""


def test_a_qwen3_moe_file_of_axolotl_loads() -> None:
    loaded = _load(QWEN3_MOE)
    assert loaded.config.sample_packing
    assert loaded.config.attn_implementation == "flash_attention_2"
    assert loaded.config.lora_target_modules is None
    named = [note.split(": ")[0] for note in loaded.notes]
    assert named == [
        "model_type",
        "plugins (CutCrossEntropyPlugin), liger_fused_linear_cross_entropy",
        "plugins (KernelsPlugin), use_kernels, liger_rope, liger_rms_norm, lora_qkv_kernel",
        "plugins (LigerPlugin)",
        "dataset_prepared_path",
        "lora_target_linear",
    ]
    assert all(": not used: " in note for note in loaded.notes)


def test_scattermoe_file_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "experts_backend_problem", lambda name: f"{name} needs an NVIDIA GPU")
    with pytest.raises(ConfigError) as caught:
        _load(QWEN3_MOE + "use_scattermoe: true\n")
    assert str(caught.value).splitlines()[1:] == ["  use_scattermoe: scattermoe needs an NVIDIA GPU (line 65)"]


def test_qlora_fsdp_file_is_refused_by_its_keys() -> None:
    text = QWEN3_MOE.replace("load_in_4bit: false", "load_in_4bit: true").replace("adapter: lora", "adapter: qlora")
    text = text.replace("lora_dropout: 0", "lora_dropout: 0.05").replace(
        "fsdp_config:\n", "fsdp_config:\n  fsdp_version: 2\n  offload_params: true\n"
    )
    with pytest.raises(ConfigError) as caught:
        _load(text)
    keys = [line.strip().split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert keys == ["load_in_4bit", "adapter", "lora_dropout", "fsdp_config"]


def test_attention_flags_of_axolotl() -> None:
    loaded = _load(GOOD + "sdp_attention: true\neager_attention: false\n")
    assert loaded.config.attn_implementation == "sdpa"
    assert loaded.notes == ("sdp_attention: read as attn_implementation: sdpa",)


def test_a_key_switched_off_is_how_it_is_here() -> None:
    text = "load_in_4bit: false\ngroup_by_length: 'no'\nrl:\nunfrozen_parameters: []\nsave_safetensors: true\n"
    assert _load(GOOD + text).notes == ()


def test_tables_name_keys_of_axolotl() -> None:
    def is_known(name: str) -> bool:
        return name.removeprefix("datasets[].") in DATASET_KEYS if name.startswith("datasets[]") else name in KEYS

    for table in (TAKEN_WITH_NOTE, SAME_AS_HERE, REASONS):
        assert [name for name in table if not is_known(name)] == []
        assert [name for name in table if name in TrainConfig.model_fields] == []
        assert not set(table) & {f"datasets[].{name}" for name in DatasetConfig.model_fields}


# ----- descriptions


def test_every_key_is_described() -> None:
    keys = list(iter_keys())
    paths = [info.path for info in keys]
    assert len(set(paths)) == len(paths)
    assert set(TrainConfig.model_fields) <= set(paths)
    assert {"datasets[].type", "datasets[].message_property_mappings.role"} <= set(paths)
    for info in keys:
        assert info.meaning
        assert "any value" not in info.needs, info
        assert info.section
        assert "`" not in info.default
    assert next(info for info in keys if info.path == "lora_r").needs == "a whole number of at least 1"
    assert next(info for info in keys if info.path == "base_model").default == "required"
    assert next(info for info in keys if info.path == "output_dir").default == "./model-out"


def test_json_schema_has_every_key_in_reading_order() -> None:
    schema = json_schema()
    assert list(schema["properties"]) == [name for section in SECTIONS for name in section.model_fields]
    assert schema["required"] == ["base_model", "datasets"]
    assert schema["additionalProperties"] is False
    assert "argument" not in schema["properties"]["lora_r"]


def test_docs_are_up_to_date() -> None:
    page = ROOT / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == render_markdown(), (
        "run: python -c 'from expertune.train.config import render_markdown; print(render_markdown(), end=str())' "
        "> docs/config.md"
    )


def test_types_of_data_sets_are_those_the_data_reader_has() -> None:
    from typing import get_args

    from expertune.train.data import SUPPORTED_TYPES

    assert set(get_args(DatasetType)) == set(SUPPORTED_TYPES)


# ----- what goes on to TRL


def test_training_arguments_exist_in_trl() -> None:
    trl = pytest.importorskip("trl")
    config = _config(FULL)
    arguments = training_arguments(config)
    assert set(arguments) <= set(trl.SFTConfig.__dataclass_fields__)
    assert arguments["per_device_train_batch_size"] == 1
    assert arguments["max_length"] == 2048
    assert "max_steps" not in arguments


def test_optimizers_and_schedulers_exist_in_transformers() -> None:
    from typing import get_args

    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    from expertune.train.config.run_keys import Optimizer, Scheduler

    assert set(get_args(Optimizer)) <= {name.value for name in OptimizerNames}
    assert set(get_args(Scheduler)) <= {name.value for name in SchedulerType}


def test_wandb_environment() -> None:
    config = _config(GOOD + "wandb_project: p\nwandb_run_id: 7\n")
    assert wandb_environment(config) == {"WANDB_PROJECT": "p", "WANDB_RUN_ID": "7", "WANDB_RESUME": "allow"}


def test_backends_are_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert rules.experts_backend_problem("expertune") is None
    assert rules.experts_backend_problem("torch_grouped") is None


def test_imports_stay_light() -> None:
    code = (
        "import sys, expertune.train.config as c; list(c.iter_keys()); c.json_schema(); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
