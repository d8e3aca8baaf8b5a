"""Shapes of experts beyond SwiGLU: transposed with bias and interleaved gates, not gated, with a norm of their own."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.comparing import relative_error
from tests.tiny import VOCAB, with_adapter

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MODELS = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 32, "sliding_window": 64},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
        "n_shared_experts": 1, "head_dim": 16,
    },
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "nemotron_h": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_latent_size": None, "hybrid_override_pattern": "E*",
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
        "moe_shared_expert_intermediate_size": 32,
    },
}  # fmt: skip


def build(name: str, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(COMMON | MODELS[name]))
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    for parameter_name, parameter in model.named_parameters():
        if "bias" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_eager_with_adapters(name: str, ids: Tensor) -> None:
    losses, grads = [], []
    for implementation in ("eager", "expertune"):
        model = with_adapter(build(name, implementation))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert relative_error(losses[1], losses[0]) < 5e-6
    assert grads[1].keys() == grads[0].keys()
    assert any("experts" in key for key in grads[0])
    for key, want in grads[0].items():
        assert relative_error(grads[1][key], want) < 2e-5, key
