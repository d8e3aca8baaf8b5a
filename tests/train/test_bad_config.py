"""Every kind of wrong configuration, and what its message must say: the key, the reason, the way out."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from expertune.errors import ConfigError
from expertune.train.config import load_config, rules

GOOD = "base_model: org/moe\ndatasets:\n  - path: org/rows\n"
HELDOUT = GOOD + "val_set_size: 0.1\n"


@dataclass(frozen=True)
class Bad:
    """yaml: the file; sets: --set values; says: fragments that the message must contain."""

    yaml: str
    says: tuple[str, ...]
    sets: tuple[str, ...] = ()


def _bad(yaml: str, *says: str, sets: tuple[str, ...] = ()) -> Bad:
    return Bad(yaml, says, sets)


def _set(assignment: str, *says: str, base: str = GOOD) -> Bad:
    return Bad(base, says, (assignment,))


TABLE = {
    # the file itself
    "empty file": _bad("", "is empty", "base_model and datasets"),
    "only a comment": _bad("# nothing\n", "is empty"),
    "a list": _bad("- a\n- b\n", "holds a list", "key: value"),
    "plain text": _bad("hello\n", "holds plain text", "key: value"),
    "tab": _bad("base_model: x\ndatasets:\n\t- path: y\n", "not valid YAML at line 3", "spaces"),
    "unclosed bracket": _bad("base_model: [a, b\n", "not valid YAML at line 2"),
    "colon in a value": _bad("base_model: a: b\n", "not valid YAML at line 1", "quotes"),
    "two documents": _bad(GOOD + "---\nlora_r: 4\n", "not valid YAML at line 4", "second document"),
    "python tag": _bad(GOOD + "seed: !!python/name:os.system x\n", "line 4", "a tag (!…)", "plain values"),
    "undefined alias": _bad(GOOD + "seed: *nobody\n", "line 4", "nobody"),
    "alias of itself": _bad(GOOD + "sample_prompts: &a [*a]\n", "sample_prompts[0]", "refers to itself"),
    "duplicate key": _bad(
        GOOD + "lora_r: 4\nseed: 1\nlora_r: 8\n", "lora_r: is given twice, in lines 4 and 6", "keep one"
    ),
    "duplicate nested key": _bad(
        "base_model: x\ndatasets:\n  - path: a\n    type: alpaca\n    path: b\n",
        "datasets[0].path: is given twice, in lines 3 and 5",
    ),
    "list as a key": _bad(GOOD + "? [a, b]\n: 1\n", "line 4 has a list or a mapping as a key"),
    # --set
    "set without value": _set("lora_r", "--set lora_r: need key=value"),
    "set without key": _set("=3", "--set =3: need key=value"),
    "set beyond a list": _set("datasets.3.path=x", "datasets has 1 entries", "an index from 0 to 1"),
    "set a name in a list": _set("datasets.path=x", "datasets is a list", "datasets.0"),
    "set inside a scalar": _set("base_model.path=x", "base_model is org/moe, which has no part 'path'"),
    "set a wrong value": _set("lora_r=abc", "lora_r: got abc; need a whole number of at least 1", "(--set)"),
    "set a wrong key": _set("datasets.0.tpye=alpaca", "datasets[0].tpye", "the nearest is type", "(--set)"),
    # what must be there
    "no base_model": _bad("datasets: [{path: org/rows}]\n", "base_model: is missing", "need text", "hub id"),
    "null base_model": _bad("base_model:\ndatasets: [{path: org/rows}]\n", "base_model: is missing"),
    "no datasets": _bad("base_model: x\n", "datasets: is missing", "rows.jsonl"),
    "empty datasets": _bad("base_model: x\ndatasets: []\n", "datasets: got an empty list", "at least one"),
    "datasets as text": _bad("base_model: x\ndatasets: rows.jsonl\n", "datasets: got rows.jsonl", "{path: rows.jsonl}"),
    "dataset as text": _bad(
        "base_model: x\ndatasets: [rows.jsonl]\n", "datasets[0]: got rows.jsonl", "- path: rows.jsonl"
    ),
    "dataset without path": _bad(
        "base_model: x\ndatasets: [{type: alpaca}]\n", "datasets[0].path: is missing", "folder"
    ),
    "base_model nowhere": _bad(
        "base_model: ./no/model\ndatasets: [{path: org/rows}]\n", "base_model: got ./no/model", "no such", "org/name"
    ),
    "no adapter to go on from": _set(
        "lora_model_dir=nowhere", "lora_model_dir: got nowhere", "folder of a trained adapter"
    ),
    "resume: true": _set(
        "resume_from_checkpoint=true", "resume_from_checkpoint: got true", "auto_resume_from_checkpoints: true"
    ),
    "no template file": _set("chat_template_jinja=no.jinja", "chat_template_jinja: got no.jinja", "Jinja template"),
    # misspelt and foreign keys
    "misspelt key": _bad(
        GOOD + "learing_rate: 1\n", "learing_rate: is not a key; the nearest is learning_rate", "(line 4)"
    ),
    "misspelt nested key": _bad(
        "base_model: x\ndatasets:\n  - path: a/b\n  - path: c/d\n    tpye: alpaca\n",
        "datasets[1].tpye: is not a key; the nearest is type",
        "(line 5)",
    ),
    "misspelt deep key": _bad(
        "base_model: x\ndatasets:\n  - path: a/b\n    message_property_mappings: {rol: from}\n",
        "datasets[0].message_property_mappings.rol",
        "the nearest is role",
    ),
    "nested key at the top": _set("field_messages=x", "field_messages", "belongs to datasets[].field_messages"),
    "top key in a dataset": _set("datasets.0.lora_r=4", "datasets[0].lora_r", "belongs to the top level"),
    "no such key at all": _set("qqqq=1", "qqqq: is not a key", "expertune config"),
    "Trainer's name": _set("per_device_train_batch_size=4", "it is spelt micro_batch_size here"),
    "other trainers' name": _set("max_seq_length=4", "it is spelt sequence_len here"),
    "special token name": _set("special_tokens.pad=x", "special_tokens.pad", "pad_token"),
    # Axolotl's keys that are not supported
    "load_in_4bit": _set(
        "load_in_4bit=true", "load_in_4bit: is known to Axolotl but not supported", "quantised", "bf16"
    ),
    "load_in_8bit": _set("load_in_8bit=true", "load_in_8bit: is known to Axolotl but not supported"),
    "qlora": _set("adapter=qlora", "adapter: got qlora; need lora", "quantised", "bf16: true"),
    "no adapter": _bad(GOOD + "adapter:\n", "adapter: got nothing, which asks for full fine-tuning; need lora"),
    "adapter none": _set("adapter=none", "adapter: got none; need lora", "LoRA adapters only"),
    "deepspeed": _set("deepspeed=zero3.json", "deepspeed: is known to Axolotl but not supported", "several GPUs"),
    "old fsdp": _bad(GOOD + "fsdp: [full_shard]\n", "fsdp: is known to Axolotl but not supported", "dp_shard_size"),
    "rl": _set("rl=dpo", "rl: is known to Axolotl but not supported", "supervised"),
    "reward_model": _set("reward_model=true", "reward_model: is known to Axolotl", "supervised"),
    "unfrozen_parameters": _bad(
        GOOD + "unfrozen_parameters: [lm_head]\n", "unfrozen_parameters", "lora_modules_to_save"
    ),
    "relora": _set("relora=true", "relora: is known to Axolotl", "not merged while they train"),
    "dora": _set("peft_use_dora=true", "peft_use_dora", "peft_use_rslora"),
    "sequence parallel": _set("context_parallel_size=2", "context_parallel_size: is known to Axolotl", "several GPUs"),
    "hub upload": _set("hub_model_id=me/x", "hub_model_id: is known to Axolotl", "hf upload"),
    "new tokens": _bad(GOOD + "tokens: ['<x>']\n", "tokens: is known to Axolotl", "embeddings"),
    "key of no reason": _set("dion_lr=0.1", "dion_lr: is known to Axolotl but not supported by expertune: remove it"),
    "unshuffled": _set(
        "shuffle_merged_datasets=false", "shuffle_merged_datasets: got false; need true", "shuffled with seed"
    ),
    "roles_to_train": _set("datasets.0.roles_to_train=[user]", "datasets[0].roles_to_train", "train_on_inputs: true"),
    "template of one dataset": _set("datasets.0.chat_template=chatml", "datasets[0].chat_template", "beside datasets"),
    "plugin that trains otherwise": _set(
        "plugins=[axolotl.integrations.kd.KDPlugin]", "plugins[0]", "KDPlugin", "teacher"
    ),
    "unknown plugin": _set(
        "plugins=[my.own.Plugin]", "plugins[0]: got my.own.Plugin", "not a plugin that expertune knows"
    ),
    "unknown Axolotl plugin": _set(
        "plugins=[axolotl.integrations.new.NewPlugin]", "plugins[0]", "NewPlugin", "remove it"
    ),
    # values
    "rank 0": _set("lora_r=0", "lora_r: got 0; need a whole number of at least 1"),
    "rank 8.5": _set("lora_r=8.5", "lora_r: got 8.5; need a whole number"),
    "learning rate 0": _set("learning_rate=0", "learning_rate: got 0; need a number above 0", "2e-4"),
    "learning rate below 0": _set("learning_rate=-1e-4", "learning_rate: got -1e-4; need a number above 0"),
    "learning rate nan": _set("learning_rate=nan", "learning_rate: got nan; need a number above 0"),
    "sequence_len 0": _set("sequence_len=0", "sequence_len: got 0; need a whole number of at least 1"),
    "dropout of 1": _set("lora_dropout=1", "lora_dropout: got 1; need a number of at least 0 and below 1"),
    "bool as text": _set("train_on_inputs=maybe", "train_on_inputs: got maybe; need true or false"),
    "bf16 full": _set("bf16=full", "bf16: got full; need true, false or auto", "bf16: true"),
    "val_set_size 1.5": _set("val_set_size=1.5", "val_set_size: got 1.5; need a share from 0 to below 1"),
    "val_set_size 1.0": _set("val_set_size=1.0", "val_set_size: got 1.0; need a share", "200 holds out 200 rows"),
    "max_steps 0": _set("max_steps=0", "max_steps: got 0", "leave it out"),
    "save_steps 1.5": _set("save_steps=1.5", "save_steps: got 1.5", "share of all steps"),
    "optimizer": _set(
        "optimizer=adamw_torch_fusd", "optimizer: got adamw_torch_fusd", "the nearest is adamw_torch_fused"
    ),
    "Axolotl's optimizer": _set("optimizer=polora", "optimizer: got polora", "Axolotl's own"),
    "scheduler": _set("lr_scheduler=cosin", "lr_scheduler: got cosin", "the nearest is cosine"),
    "chat_template": _set(
        "chat_template=llama3", "chat_template: got llama3", "tokenizer_default", "chat_template_jinja"
    ),
    "checkpointing offload": _set(
        "gradient_checkpointing=offload", "gradient_checkpointing: got offload", "activation_offloading: true"
    ),
    "offloading to disk": _set("activation_offloading=disk", "activation_offloading: got disk; need true or false"),
    "compile auto": _set("torch_compile=auto", "torch_compile: got auto; need true or false"),
    "sharegpt": _set("datasets.0.type=sharegpt", "datasets[0].type: got sharegpt", "type: chat_template"),
    "prompt format": _set("datasets.0.type={format: x}", "datasets[0].type: got a mapping (format)", "leave it out"),
    "excess": _set("excess_length_strategy=cut", "excess_length_strategy: got cut; need one of raise, drop, truncate"),
    "report_to": _set("report_to=tensorbord", "report_to", "the nearest is tensorboard"),
    "attention": _set(
        "attn_implementation=flash", "attn_implementation: got flash", "the nearest is flash_attention_2"
    ),
    "experts": _set("experts_implementation=grouped", "experts_implementation: got grouped", "expertune"),
    "mapping for text": _set("output_dir={a: b}", "output_dir: got a mapping (a); need text"),
    "mapping in a list": _set(
        "lora_target_modules=[q_proj, {a: b}]", "lora_target_modules[1]: got a mapping (a); need text"
    ),
    # contradictions
    "both backends": _bad(
        GOOD + "use_scattermoe: true\nuse_sonicmoe: 'true'\n",
        "use_scattermoe, use_sonicmoe: both are true",
        "(line 4, line 5)",
    ),
    "flag against key": _bad(
        GOOD + "use_scattermoe: true\nexperts_implementation: eager\n",
        "use_scattermoe, experts_implementation",
        "is eager",
        "remove one",
    ),
    "false flag against key": _bad(
        GOOD + "use_sonicmoe: false\nexperts_implementation: sonicmoe\n", "use_sonicmoe is false"
    ),
    "no Hopper": _set("use_sonicmoe=true", "use_sonicmoe: sonicmoe needs Hopper", "experts_implementation: expertune"),
    "no Hopper by name": _set("experts_implementation=sonicmoe", "experts_implementation: sonicmoe needs Hopper"),
    "a way of sonicmoe's": _set("sonicmoe_lora=fold", "sonicmoe_lora: got fold; need one of low_rank, materialize"),
    "sonicmoe_lora elsewhere": _set(
        "sonicmoe_lora=materialize",
        "sonicmoe_lora: got materialize; it is how sonicmoe applies adapters, and experts_implementation is expertune",
        "say use_sonicmoe: true, or remove it",
    ),
    "sonicmoe_lora with eager": _bad(
        GOOD + "experts_implementation: eager\nsonicmoe_lora: low_rank\n", "experts_implementation is eager"
    ),
    "dropout on experts": _set("lora_dropout=0.05", "lora_dropout: got 0.05; need 0", "lora_target_parameters: []"),
    "nothing to train": _bad(GOOD + "lora_target_modules: []\nlora_target_parameters: []\n", "nothing would train"),
    "bf16 and fp16": _bad(GOOD + "bf16: true\nfp16: true\n", "bf16, fp16: both are true; need one"),
    "two warm-ups": _bad(GOOD + "warmup_steps: 10\nwarmup_ratio: 0.1\n", "warmup_steps, warmup_ratio: both are given"),
    "two save intervals": _bad(
        GOOD + "save_steps: 10\nsaves_per_epoch: 2\n", "save_steps, saves_per_epoch: both are given"
    ),
    "two eval intervals": _bad(
        HELDOUT + "eval_steps: 10\nevals_per_epoch: 2\n", "eval_steps, evals_per_epoch: both are given"
    ),
    "save strategy": _bad(
        GOOD + "save_strategy: epoch\nsave_steps: 10\n", "save_strategy is epoch", "save_strategy: steps"
    ),
    "save strategy no": _bad(GOOD + "save_strategy: no\nsave_steps: 10\n", "save_strategy is no"),
    "steps of what": _set("save_strategy=steps", "save_strategy: got steps; need save_steps or saves_per_epoch"),
    "evals of nothing": _set(
        "evals_per_epoch=2", "evals_per_epoch: no rows are held out", "val_set_size", "test_datasets"
    ),
    "first eval of nothing": _set("eval_on_start=true", "eval_on_start: no rows are held out"),
    "two held-out sets": _bad(
        HELDOUT + "test_datasets: [{path: a/b}]\n", "val_set_size, test_datasets", "val_set_size: 0"
    ),
    "eval packing": _set("eval_sample_packing=true", "eval_sample_packing, sample_packing", "sample_packing: true"),
    "two starts": _bad(
        GOOD + "resume_from_checkpoint: here\nlora_model_dir: here\n", "resume_from_checkpoint, lora_model_dir: both"
    ),
    "two checkpoints": _bad(
        GOOD + "resume_from_checkpoint: here\nauto_resume_from_checkpoints: true\n", "asks for the newest"
    ),
    "jinja without template": _set(
        "chat_template=jinja", "chat_template: got jinja, and chat_template_jinja is missing"
    ),
    "template without jinja": _bad(
        GOOD + "chat_template: chatml\nchat_template_jinja: '{{ x }}'\n",
        "chat_template is chatml",
        "chat_template: jinja",
    ),
    "two attentions": _bad(
        GOOD + "flash_attention: true\nattn_implementation: sdpa\n", "flash_attention is true", "is sdpa"
    ),
    "two attention flags": _bad(
        GOOD + "flash_attention: true\nsdp_attention: true\n", "sdp_attention: is set together with flash_attention"
    ),
    "optimizer of whole parameters": _bad(
        GOOD + "dp_shard_size: 2\noptimizer: adafactor\n",
        "optimizer, dp_shard_size: got adafactor",
        "each value by itself",
    ),
    "compiled in several processes": _bad(
        GOOD + "expert_parallel_size: 2\ntorch_compile: true\n", "torch_compile is not supported in several processes"
    ),
    "deep_ep": _bad(
        GOOD + "expert_parallel_backend: deep_ep\nexpert_parallel_size: 2\n",
        "the package deep_ep is not installed",
        "NCCL's all-to-all",
    ),
    "no such backend": _set("expert_parallel_backend=mpi", "expert_parallel_backend: got mpi"),
    "fsdp_config": _set(
        "fsdp_config={offload_params: true}", "fsdp_config: FSDP2 has no options here", "dp_shard_size"
    ),
    "prefetch without workers": _set("dataloader_prefetch_factor=4", "needs dataloader_num_workers of at least 1"),
    "compile mode alone": _set(
        "torch_compile_mode=default", "torch_compile_mode: counts only with torch_compile: true"
    ),
    "reporters disagree": _bad(
        GOOD + "use_tensorboard: true\nreport_to: none\n", "use_tensorboard, report_to", "add tensorboard"
    ),
    "reporter not installed": _set("report_to=mlflow", "report_to: mlflow is not installed", "pip install mlflow"),
    "optimizer not installed": _set(
        "optimizer=paged_adamw_8bit", "optimizer: paged_adamw_8bit needs bitsandbytes", "adamw_torch_fused"
    ),
    "column of another type": _bad(
        "base_model: x\ndatasets: [{path: a/b, type: alpaca, field: text}]\n",
        "datasets[0].field, datasets[0].type: field belongs to type completion and type is alpaca",
    ),
    "role twice": _bad(
        "base_model: x\ndatasets: [{path: a/b, message_field_role: a, message_property_mappings: {role: b}}]\n",
        "datasets[0].message_field_role",
        "remove the older",
    ),
}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a GPU and without optional packages, and an empty current directory with a folder `here`."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    reasons = {
        name: f"{name} needs Hopper. Use experts_implementation: expertune" for name in ("sonicmoe", "scattermoe")
    }
    monkeypatch.setattr(rules, "experts_backend_problem", reasons.get)
    monkeypatch.setattr(rules, "package_missing", lambda name: True)


def _message(yaml: str, sets: tuple[str, ...] = ()) -> str:
    path = Path("run.yaml")
    path.write_text(yaml, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, sets)
    return str(caught.value)


@pytest.mark.parametrize("bad", TABLE.values(), ids=TABLE.keys())
def test_bad_config(bad: Bad) -> None:
    message = _message(bad.yaml, bad.sets)
    assert message.startswith("run.yaml: ")
    for fragment in bad.says:
        assert fragment in message
    for leak in ("pydantic", "Traceback", "Input should be", "yaml.", "Literal", "NoneType", "Extra inputs"):
        assert leak not in message
    if "1 problem" in message:
        assert len(message.splitlines()) == 2


def test_table_is_large_enough() -> None:
    assert len(TABLE) >= 45


def test_good_base_loads() -> None:
    for text in (GOOD, HELDOUT):
        Path("run.yaml").write_text(text, encoding="utf-8")
        load_config(Path("run.yaml"))


def test_all_problems_at_once_in_the_order_of_the_file() -> None:
    yaml = GOOD + "lora_r: 0\nuse_scattermoe: true\nuse_sonicmoe: true\nlearing_rate: 1\nload_in_4bit: true\n"
    lines = _message(yaml, ("sequence_len=-1",)).splitlines()
    assert lines[0] == "run.yaml: 5 problems"
    starts = ("lora_r", "use_scattermoe, use_sonicmoe", "learing_rate", "load_in_4bit", "sequence_len")
    problems = [line.strip() for line in lines[1:]]
    assert [line.split(":")[0] for line in problems] == list(starts)


def test_rules_are_silent_about_a_key_that_is_wrong_anyway() -> None:
    assert "no rows are held out" not in _message(GOOD + "val_set_size: x\neval_steps: 5\n")
    assert "lora_dropout" not in _message(GOOD + "lora_dropout: 0.1\nlora_target_parameters: {a: b}\n")


def test_missing_file_names_the_one_that_is_there() -> None:
    Path("run.yml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml: no such file; there is run\.yml"):
        load_config(Path("run.yaml"))


def test_folder() -> None:
    Path("configs").mkdir()
    Path("configs/a.yaml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"configs: is a folder; need a YAML file; it holds a\.yaml"):
        load_config(Path("configs"))


def test_not_utf8() -> None:
    Path("run.yaml").write_bytes("base_model: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(Path("run.yaml"))


def test_base_model_is_a_file() -> None:
    Path("model.gguf").write_text("x", encoding="utf-8")
    assert "base_model: got ./model.gguf, which is a file; need the folder" in _message(
        "base_model: ./model.gguf\ndatasets: [{path: a/b}]\n"
    )


def test_only_overrides() -> None:
    with pytest.raises(ConfigError, match="datasets: is missing"):
        load_config(None, ["base_model=x"])
