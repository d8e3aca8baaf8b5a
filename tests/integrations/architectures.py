"""The architectures of the installed Transformers with the experts decorator, and a tiny random model of each.

They are found in Transformers' sources, so those of a new release are tested the day it is installed.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from expertune.integrations.refusals import experts_outside_of_the_interface
from expertune.layers.layout import is_experts_module

MOST_PARAMETERS = 1_000_000
VOCAB = 64

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.2,
    # attention
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_global_key_value_heads": 2, "head_dim": 16,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "o_lora_rank": 8, "o_groups": 2, "sliding_window": 8, "sliding_window_size": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 16, "d_rel": 4,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8, "index_kpool": 4,
    # linear attention and state spaces
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_dt_rank": 4, "mamba_chunk_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
    # experts
    "num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8, "moe_num_experts": 8, "enable_moe_block": True,
    "num_experts_per_tok": 3, "moe_topk": 3, "moe_k": 3, "top_k_experts": 3, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 16, "moe_hidden_size": 32, "router_hidden_size": 16,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16, "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "dense_intermediate_size": 24,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "mlp_layer_types": ["dense", "sparse"], "mlp_only_layers": [0],
    # the rest
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB, "thinker_hidden_size": 32, "hc_lowrank": 8,
}  # fmt: skip
"""Sizes by the names that configurations use; each applies where a configuration has a field of that name."""

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
EXTRA: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 8], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "glm5_next": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2, "v_head_dim": 16},
    "nemotron_h": {"layers_block_type": ["moe", "attention", "mamba", "moe"]},
    "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 16},
    "qwen4_exp": {
        "layer_types": ["linear_attention", "full_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a model needs beyond SIZES: layers of both kinds, and where sizes depend on each other."""

MODEL_CLASSES = {
    "DiffusionGemmaTextExperts": "DiffusionGemmaEncoderTextModel",
    "OpenAIPrivacyFilterExperts": "OpenAIPrivacyFilterForTokenClassification",
    "Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel",
}
"""The model around an experts class, where its name does not say it."""

EXCEPTIONS: dict[str, str] = {}
"""Experts classes that cannot be tested or do not agree, with the reason; the fewer the better."""


@dataclass(frozen=True)
class Architecture:
    """A model folder of Transformers with a decorated experts class."""

    folder: str
    file: str
    experts_name: str

    def __str__(self) -> str:
        return f"{self.folder}-{self.experts_name}"

    @property
    def module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.folder}.{self.file}")

    @property
    def experts_class(self) -> type[nn.Module]:
        return getattr(self.module, self.experts_name)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The causal LM; else the text model, else the model, whose name is the most like that of the experts."""
        if self.experts_name in MODEL_CLASSES:
            return getattr(self.module, MODEL_CLASSES[self.experts_name])
        return min(self._model_classes(), key=self._distance)

    @property
    def level(self) -> str:
        """How much of the model is run around the experts."""
        name = self.model_class.__name__
        endings = {
            "ForCausalLM": "causal LM",
            "TextModel": "text model",
            "Model": "model",
            "ForTokenClassification": "classifier",
        }
        return next((level for ending, level in endings.items() if name.endswith(ending)), name)

    def _model_classes(self) -> list[type[PreTrainedModel]]:
        return [
            value
            for name, value in vars(self.module).items()
            if inspect.isclass(value)
            and issubclass(value, PreTrainedModel)
            and value.__module__ == self.module.__name__
            if not re.search("PreTrained|Vision|Audio", name)
        ]

    def _distance(self, model_class: type[PreTrainedModel]) -> tuple[int, int, int]:
        name = model_class.__name__
        endings = ("ForCausalLM", "TextModel", "Model")
        kind = next((index for index, ending in enumerate(endings) if name.endswith(ending)), len(endings))
        alike = next((i for i, (a, b) in enumerate(zip(name, self.experts_name, strict=False)) if a != b), 0)
        return kind, -alike, len(name)


@cache
def architectures() -> tuple[Architecture, ...]:
    """All of the installed Transformers, found in its sources: nothing is imported."""
    decorated = re.compile(r"^@use_experts_implementation\b[^\n]*\nclass (\w+)", re.MULTILINE)
    return tuple(
        Architecture(path.parent.name, path.stem, name)
        for path, source in modeling_files()
        for name in decorated.findall(source)
    )


def modeling_files() -> Iterator[tuple[Path, str]]:
    """The files with the models of the installed Transformers, and their text."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        yield path, path.read_text(encoding="utf-8")


def build(architecture: Architecture, implementation: str, *, seed: int = 0) -> PreTrainedModel:
    """The tiny model with random weights: also where a fresh model has zeros or ones (biases, norms, sinks)."""
    model_class = architecture.model_class
    config_class: Any = model_class.config_class
    config_class = next((each for each in get_args(config_class) if "Text" in each.__name__), config_class)
    names = {field.name for field in fields(config_class)}
    sizes = {name: size for name, size in SIZES.items() if name in names}
    config = config_class(**(sizes | EXTRA.get(architecture.folder, {})))
    with torch.device("meta"):
        sketch = model_class._from_config(config)
    largest = max(sketch.named_parameters(), key=lambda item: item[1].numel())
    if sum(parameter.numel() for parameter in sketch.parameters()) > MOST_PARAMETERS:
        raise ValueError(
            f"not tiny: {largest[0]} is {tuple(largest[1].shape)}; SIZES lacks a name of this configuration"
        )
    torch.manual_seed(seed)
    model = model_class._from_config(config, experts_implementation=implementation)
    for module in filter(is_experts_module, model.modules()):
        for parameter in module.parameters():  # not every model initialises its experts (Qwen3-Omni's talker)
            nn.init.normal_(parameter, std=SIZES["initializer_range"])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_constant = tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
        if is_constant and (isinstance(tensor, nn.Parameter) or "bias" in name):
            tensor.data.add_(torch.randn_like(tensor), alpha=0.1)
        if name.endswith("tid2eid"):  # the experts of each token of the vocabulary (DeepSeek-V4's hash routing)
            tensor.copy_(torch.stack([torch.randperm(SIZES["n_routed_experts"])[: tensor.shape[1]] for _ in tensor]))
    return model.train()


def outsiders() -> dict[str, str]:
    """Experts class by folder, of the models with experts outside of the interface; by the words of the sources."""
    named = re.compile(r"^class \w*(?:Experts?|Moe|MoE|MOE)(?:[A-Z]\w*)?\((?:torch\.)?nn\.Module\w*\)", re.MULTILINE)
    decorated = {architecture.folder for architecture in architectures()}
    found = {}
    for path, source in modeling_files():
        if path.parent.name not in decorated and named.search(source):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            models = [
                each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__
            ]
            found[path.parent.name] = str(experts_outside_of_the_interface(models[0]))
    return found
