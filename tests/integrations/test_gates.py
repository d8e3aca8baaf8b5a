"""A gate is known to a kernel only where the module computes exactly it."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from expertune.integrations.gates import activation_of
from expertune.ops.experts.gates import SWIGLU
from tests.tiny import tiny_model


def experts_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "gate_up_proj"))


def test_swiglu_is_known_and_computes_what_the_module_computes() -> None:
    experts = experts_of(tiny_model("eager"))
    assert activation_of(experts) is SWIGLU
    h_SJ = torch.randn(7, 2 * experts.intermediate_dim)
    torch.testing.assert_close(SWIGLU(h_SJ), experts._apply_gate(h_SJ), rtol=0, atol=0)
    del experts.act_fn
    experts.act_fn = torch.nn.functional.silu  # as LFM2 has it
    assert activation_of(experts) is SWIGLU


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "relu2", "sigmoid"])
def test_another_activation_is_the_modules_own(name: str) -> None:
    experts = experts_of(tiny_model("eager"))
    experts.act_fn = ACT2FN[name]
    h_SJ = torch.randn(3, 2 * experts.intermediate_dim)
    assert activation_of(experts) is not SWIGLU
    torch.testing.assert_close(activation_of(experts)(h_SJ), experts._apply_gate(h_SJ))


def test_a_gate_of_its_own_and_an_interleaved_one_are_not_guessed() -> None:
    experts = experts_of(tiny_model("eager"))
    experts.is_concatenated = False
    assert activation_of(experts) is not SWIGLU
    experts.is_concatenated = True
    experts._apply_gate = lambda h_SJ: h_SJ[..., ::2]
    assert activation_of(experts)(torch.ones(1, 4)).shape == (1, 2)


def test_without_a_gate_it_is_the_activation() -> None:
    experts = experts_of(tiny_model("eager"))
    experts.has_gate = False
    assert activation_of(experts) is experts.act_fn
