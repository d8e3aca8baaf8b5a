"""PEFT's adapter layout and the flags of experts modules, turned into [experts, out, in] views."""

import pytest
import torch

from expertune.layers.layout import is_experts_module, lora_from_peft, read_projection, sum_loras
from tests.comparing import relative_error
from tests.tiny import tiny_model, with_adapter


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_the_delta_is_pefts(parameter: str) -> None:
    model = with_adapter(tiny_model("eager"))
    wrappers = [m for m in model.modules() if getattr(m, "parameter_name", None) == parameter]
    for wrapper in wrappers:
        lora = lora_from_peft(
            wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight, 8, wrapper.scaling["default"]
        )
        delta = lora.scaling * lora.b_EYR @ lora.a_ERX
        assert relative_error(delta, wrapper.get_delta_weight("default")) < 1e-6


def test_views_share_memory_and_carry_gradients() -> None:
    a, b = torch.randn(6, 5, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    lora = lora_from_peft(a, b, 3, 1.0)
    assert lora.rank == 2
    assert lora.a_ERX.data_ptr() == a.data_ptr()
    assert lora.b_EYR.data_ptr() == b.data_ptr()
    (lora.b_EYR @ lora.a_ERX).sum().backward()
    assert a.grad is not None
    assert b.grad is not None


def test_the_sum_of_adapters_is_one_adapter() -> None:
    loras = [
        lora_from_peft(torch.randn(3 * rank, 5), torch.randn(7, rank * 3), 3, scaling)
        for rank, scaling in ((2, 0.5), (3, 2.0))
    ]
    total = sum_loras(loras)
    want = sum(lora.scaling * lora.b_EYR @ lora.a_ERX for lora in loras)
    assert relative_error(total.scaling * total.b_EYR @ total.a_ERX, want) < 1e-6
    assert sum_loras(loras[:1]) is loras[0]


def test_a_transposed_weight_is_a_view() -> None:
    experts = tiny_model("eager").model.layers[0].mlp.experts
    assert is_experts_module(experts)
    assert read_projection(experts, "down_proj", None).weight_EYX.shape == (8, 64, 32)
    experts.is_transposed = True
    view = read_projection(experts, "down_proj", None).weight_EYX
    assert view.shape == (8, 32, 64)
    assert view.data_ptr() == experts.down_proj.data_ptr()


def test_other_modules_are_no_experts() -> None:
    model = tiny_model("eager")
    assert [name for name, module in model.named_modules() if is_experts_module(module)] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
