"""Tiny random MoE models for tests: real architectures of Transformers, a few thousand parameters."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import expertune

VOCAB = 128


def tiny_config(**changes: Any) -> Qwen3MoeConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    return Qwen3MoeConfig(**(sizes | changes))


def tiny_model(implementation: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(**changes), experts_implementation=implementation)


def with_adapter(model: PreTrainedModel, *, rank: int = 4, seed: int = 1, **changes: Any) -> PeftModel:
    """Adapt attention and every expert; lora_B is random, so that the adapter does something."""
    options: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": expertune.get_attention_modules(model),
        "target_parameters": expertune.get_target_parameters(model),
    }
    peft_model = get_peft_model(model, LoraConfig(**(options | changes)))
    randomize_lora_b(peft_model, seed)
    return peft_model


def randomize_lora_b(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            scale = 0.2 if ".lora_B" in name else parameter.shape[-1] ** -0.5
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
