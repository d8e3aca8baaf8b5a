"""What `export` writes is the same adapter: a plain reader of its per-expert matrices gets the PEFT model's outputs.

The reader knows nothing of PEFT's layout: it adds scaling * B @ A to the weights of the base checkpoint, by the names
that the checkpoint itself has.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import expertune
from expertune.errors import ConfigError
from expertune.integrations.export import SERVERS, convert
from expertune.integrations.saved_adapter import open_adapter
from tests.comparing import relative_error
from tests.tiny import VOCAB, with_adapter

TOLERANCE = 2e-5  # fp32, relative
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 48,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "num_key_value_heads": 2,
}
_GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2_moe": Qwen2MoeConfig(
        **_SIZES, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=24, decoder_sparse_step=1
    ),
    "qwen3_moe": Qwen3MoeConfig(**_SIZES, num_experts=4, moe_intermediate_size=32),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4),
    "olmoe": OlmoeConfig(**(_SIZES | {"num_key_value_heads": 2}), num_experts=4),
    "deepseek_v2": DeepseekV2Config(**(_SIZES | _MLA), **_GROUPS, moe_intermediate_size=32),
    "deepseek_v3": DeepseekV3Config(**(_SIZES | _MLA), **_GROUPS, moe_intermediate_size=32),
    "glm4_moe": Glm4MoeConfig(**_SIZES, **_GROUPS, moe_intermediate_size=32),
    "gpt_oss": GptOssConfig(**_SIZES, num_local_experts=4, sliding_window=64),
}


def build(name: str, implementation: str = "expertune") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], experts_implementation=implementation).eval()


def save(name: str, folder: Path, **changes: Any) -> PeftModel:
    """A base checkpoint and an adapter that does something, in folder/base and folder/adapter."""
    base = build(name)
    base.save_pretrained(folder / "base")
    if "target_modules" not in changes:
        changes["target_modules"] = [each for each in expertune.get_attention_modules(base) if each != "kv_b_proj"]
    model = with_adapter(base, **changes).eval()
    model.save_pretrained(folder / "adapter")
    return model


def exported(folder: Path, server: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    result = convert(open_adapter(folder / "adapter", str(folder / "base")), server)
    (folder / "out").mkdir()
    save_file(result.tensors, folder / "out" / "adapter_model.safetensors")  # as any reader gets it
    return load_file(folder / "out" / "adapter_model.safetensors"), json.loads(json.dumps(result.config))


def read_plainly(name: str, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """The base model with every pair of matrices added to the checkpoint's weight of that name."""
    checkpoint = load_file(folder / "base" / "model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    prefix, tail = "base_model.model.", ".lora_A.weight"
    modules = [key.removeprefix(prefix).removesuffix(tail) for key in tensors if key.endswith(tail)]
    assert len(tensors) == 2 * len(modules)
    for module in modules:
        a, b = (tensors[f"{prefix}{module}.lora_{side}.weight"] for side in "AB")
        if ".experts" in module and name == "gpt_oss":
            _add_gpt_oss(checkpoint, module, a, b, scaling)
            continue
        assert a.shape[0] == b.shape[1] == config["r"]
        if name == "mixtral":  # SGLang's loader calls its w1, w3, w2 so
            for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                module = module.replace(ours, theirs)
        assert module.rpartition(".")[2] in config["target_modules"] or name == "mixtral"
        checkpoint[f"{module}.weight"] += scaling * b @ a
    save_file(checkpoint, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder / "base", experts_implementation="eager").eval()


def _add_gpt_oss(checkpoint: dict[str, Tensor], module: str, a: Tensor, b: Tensor, scaling: float) -> None:
    """gpt-oss keeps [experts, in, out], gate in the even columns and up in the odd ones."""
    block = module[: module.index(".experts") + len(".experts")]
    up, down = checkpoint[f"{block}.gate_up_proj"], checkpoint[f"{block}.down_proj"]
    one = re.fullmatch(r"\.(\d+)\.(\w+)", module.removeprefix(block))
    if one:  # SGLang: one expert, one projection
        expert = int(one[1])
        columns = {"gate_proj": up[expert, :, 0::2], "up_proj": up[expert, :, 1::2], "down_proj": down[expert]}[one[2]]
        columns += (scaling * b @ a).T
        return
    num_experts = up.shape[0]  # vLLM: all experts, expert slowest in A and fastest in B
    rank = a.shape[0] // num_experts
    weight = up if module.endswith(".base_layer") else down
    for expert in range(num_experts):
        weight[expert] += (scaling * b[:, expert::num_experts] @ a[expert * rank : (expert + 1) * rank]).T


def assert_same_model(name: str, server: str, folder: Path, model: PeftModel) -> tuple[dict[str, Tensor], Any]:
    ids = torch.randint(1, VOCAB, (3, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        tensors, config = exported(folder, server)
        got = read_plainly(name, folder, tensors, config)(input_ids=ids).logits
    assert relative_error(base, want) > 0.02, "the adapter does nothing, so nothing is tested"
    assert relative_error(got, want) < TOLERANCE
    return tensors, config


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_plain_reader_gets_the_same_model(name: str, server: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    tensors, config = assert_same_model(name, server, tmp_path, model)
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    num_layers = 1 if name in ("deepseek_v2", "deepseek_v3", "glm4_moe") else 2  # with experts
    if (name, server) == ("gpt_oss", "vllm"):
        want = {f"experts{wrapped}.lora_{side}": num_layers for wrapped in ("", ".base_layer") for side in "AB"}
    else:
        leaves = ("w1", "w3", "w2") if (name, server) == ("mixtral", "vllm") else ("gate_proj", "up_proj", "down_proj")
        want = {
            f"experts.{expert}.{leaf}.lora_{side}": num_layers
            for expert in range(4)
            for leaf in leaves
            for side in "AB"
        }
    found = Counter(re.sub(r".*\.(experts.*)\.weight", r"\1", key) for key in tensors if ".experts" in key)
    assert found == want


ADAPTERS: dict[str, dict[str, Any]] = {
    "experts only": {"target_modules": []},
    "gate_up only": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "down only": {"target_parameters": ["mlp.experts.down_proj"]},
    "attention only": {"target_parameters": None},
    "rsLoRA": {"use_rslora": True},
    "rank and alpha by module": {"rank_pattern": {"q_proj": 2, "v_proj": 6}, "alpha_pattern": {"o_proj": 3}},
    "rank and alpha by projection": {
        "rank_pattern": {"mlp.experts.down_proj": 8},
        "alpha_pattern": {"mlp.experts.gate_up_proj": 3},
    },
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_adapters(adapter: str, name: str, server: str, tmp_path: Path) -> None:
    model = save(name, tmp_path, **ADAPTERS[adapter])
    tensors, config = assert_same_model(name, server, tmp_path, model)
    if adapter == "rank and alpha by module":
        assert config["r"] == 6
    if adapter == "rank and alpha by projection":
        assert config["r"] == 8
    stacked = (name, server) == ("gpt_oss", "vllm")
    if not stacked:
        ranks = {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
        assert ranks == {config["r"]}, "SGLang copies exactly r rows"


def test_shared_experts_go_to_vllm_under_their_own_names(tmp_path: Path) -> None:
    model = save("qwen2_moe", tmp_path, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    tensors, config = assert_same_model("qwen2_moe", "vllm", tmp_path, model)
    assert "base_model.model.model.layers.0.mlp.shared_expert.up_proj.lora_B.weight" in tensors
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]


def test_values_are_the_saved_ones_where_nothing_has_to_fit(tmp_path: Path) -> None:
    model = save("qwen3_moe", tmp_path)
    tensors, _ = exported(tmp_path, "vllm")
    weights = dict(model.named_parameters())
    layer = "base_model.model.model.layers.1"
    for side in "AB":
        saved = weights[f"{layer}.self_attn.q_proj.lora_{side}.default.weight"]
        assert torch.equal(tensors[f"{layer}.self_attn.q_proj.lora_{side}.weight"], saved)
    a = weights[f"{layer}.mlp.experts.base_layer.lora_A.default.weight"]
    b = weights[f"{layer}.mlp.experts.base_layer.lora_B.default.weight"]
    assert torch.equal(tensors[f"{layer}.mlp.experts.3.up_proj.lora_A.weight"], a[12:16])
    assert torch.equal(tensors[f"{layer}.mlp.experts.3.up_proj.lora_B.weight"], b[32:, 3::4])


@pytest.mark.parametrize(
    ("name", "server", "changes", "words"),
    [
        ("qwen3_moe", "sglang", {"target_modules": ["q_proj"]}, "v_proj together"),
        ("qwen3_moe", "sglang", {"target_modules": ["k_proj"]}, "k_proj without q_proj"),
        ("deepseek_v3", "vllm", {"target_modules": ["kv_b_proj"]}, "takes that weight apart"),
        ("deepseek_v3", "sglang", {"target_modules": ["q_a_proj"]}, "kv_a_proj_with_mqa and q_a_proj together"),
        ("qwen2_moe", "sglang", {"target_modules": ["down_proj"]}, "mlp.shared_expert.down_proj has an adapter"),
        ("qwen3_moe", "vllm", {"target_modules": ["lm_head"]}, "base_model.model.lm_head"),
        ("qwen3_moe", "vllm", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("qwen3_moe", "vllm", {"target_parameters": ["mlp.gate.weight"]}, "mlp.gate.weight has an adapter"),
        ("qwen3_moe", "vllm", {"target_parameters": None, "use_dora": True}, "use_dora=True"),
        ("qwen3_moe", "vllm", {"r": 600, "target_parameters": None}, "rank 600 is more than vllm 0.33.0 takes"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_a_server_would_not_apply_is_refused(
    name: str, server: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save(name, tmp_path, **changes)
    with pytest.raises(ConfigError, match=re.escape(words)):
        exported(tmp_path, server)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("server", SERVERS)
def test_an_unknown_model_is_not_guessed(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("qwen3_moe", tmp_path)
    monkeypatch.delitem(SERVERS[server].models, "qwen3_moe")
    with pytest.raises(ConfigError, match=r"experts of qwen3_moe is not known .* it knows deepseek_v2, .*merge"):
        exported(tmp_path, server)
