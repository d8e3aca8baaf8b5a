"""MoEBlock beside Transformers' eager blocks: outputs and every gradient, both ways, and exact round trips."""

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from expertune.layers.activations import ClampedGlu
from expertune.layers.convert import (
    ModelType,
    from_transformers,
    from_transformers_state_dict,
    to_transformers_state_dict,
)
from expertune.layers.lora import LoraPlaces
from expertune.layers.moe_block import MoEBlock, MoEConfig
from expertune.ops.routing.types import RoutingRule
from tests.comparing import relative_error
from tests.integrations.architectures import SIZES, architectures, build

TYPES = get_args(ModelType)
H = SIZES["hidden_size"]
OUTPUT, GRADIENT = 1e-5, 2e-5


@cache
def model(model_type: str) -> nn.Module:
    return build(next(each for each in architectures() if each.folder == model_type), "eager")


def block_of(model_type: str, seed: int = 0) -> nn.Module:
    """A new block of Transformers, every tensor of it random."""
    theirs = next(module for module in model(model_type).modules() if hasattr(module, "experts"))
    fresh = type(theirs)(theirs.experts.config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in fresh.state_dict().items():
        scale = 0.2 if "bias" in name else 1.5 * tensor.shape[-1] ** -0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return fresh


def output(block: nn.Module, hidden: Tensor) -> Tensor:
    result = block(hidden)
    return result[0] if isinstance(result, tuple) else result


def everything(block: nn.Module, hidden: Tensor, dy: Tensor) -> dict[str, Tensor]:
    hidden = hidden.clone().requires_grad_()
    y = output(block, hidden)
    y.backward(dy)
    block_grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    block.zero_grad(set_to_none=True)
    assert hidden.grad is not None
    return {"y": y.detach(), "hidden": hidden.grad, **block_grads}


def hidden_and_dy(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 13, H, generator=generator) * scale, torch.randn(2, 13, H, generator=generator)


def assert_same(ours: MoEBlock, theirs: nn.Module, model_type: ModelType, scale: float = 1.0) -> None:
    """Output, gradient of the input, and gradients of weights, which convert as the weights do."""
    got = everything(ours, *hidden_and_dy(scale))
    want = everything(theirs, *hidden_and_dy(scale))
    y, dhidden = want.pop("y"), want.pop("hidden")
    assert relative_error(got.pop("y"), y) < OUTPUT
    assert relative_error(got.pop("hidden"), dhidden) < GRADIENT
    buffers = dict(theirs.named_buffers())
    wanted = from_transformers_state_dict(want | buffers, model_type)
    assert got.keys() == wanted.keys() - {"router.correction_bias"}
    for name, gradient in got.items():
        assert wanted[name].norm() > 0, name
        assert relative_error(gradient, wanted[name]) < GRADIENT, name


@pytest.mark.parametrize("model_type", TYPES)
def test_from_transformers(model_type: ModelType) -> None:
    theirs = block_of(model_type)
    ours = from_transformers(theirs)
    assert_same(ours, theirs, model_type)


def test_gpt_oss_where_its_gate_clamps() -> None:
    theirs = block_of("gpt_oss")
    ours = from_transformers(theirs)
    hidden, _ = hidden_and_dy(5.0)
    h = torch.einsum("bth,ejh->btej", hidden, ours.experts.up.weight)
    assert (h.abs() > 7).float().mean() > 0.1
    assert_same(ours, theirs, "gpt_oss", 5.0)


@pytest.mark.parametrize("model_type", TYPES)
def test_to_transformers(model_type: ModelType) -> None:
    """A block of ours with weights of its own, in a block of Transformers."""
    theirs = block_of(model_type, seed=1)
    ours = MoEBlock(from_transformers(theirs).config)
    for tensor in ours.state_dict().values():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())), alpha=0.1)
    theirs.load_state_dict(to_transformers_state_dict(ours, model_type))
    assert_same(ours, theirs, model_type)


@pytest.mark.parametrize("model_type", TYPES)
def test_round_trips_are_exact(model_type: ModelType) -> None:
    theirs = block_of(model_type)
    ours = from_transformers(theirs)
    state = to_transformers_state_dict(ours, model_type)
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    back = from_transformers_state_dict(state, model_type)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
    assert len(save(state)) > 0  # contiguous, and no two share memory


@pytest.mark.parametrize("model_type", TYPES)
def test_a_trained_adapter_goes_back_merged(model_type: ModelType) -> None:
    theirs = block_of(model_type)
    ours = from_transformers(theirs).add_lora(LoraPlaces.on_experts(rank=4, alpha=8))
    for parameter in ours.lora_parameters():
        nn.init.normal_(parameter, std=0.1)
    with pytest.raises(ValueError, match=re.escape("has adapters (experts_up, experts_down)")):
        to_transformers_state_dict(ours, model_type)
    hidden, _ = hidden_and_dy()
    before, want = output(theirs, hidden), ours(hidden)
    theirs.load_state_dict(to_transformers_state_dict(ours.merge_lora(), model_type))
    assert relative_error(output(theirs, hidden), want) < OUTPUT
    assert relative_error(before, want) > 1e-2


@pytest.mark.parametrize("model_type", TYPES)
def test_nothing_is_shared_and_settings_are_taken_over(model_type: ModelType) -> None:
    theirs = block_of(model_type).to(torch.bfloat16).eval().requires_grad_(False)
    theirs.experts.down_proj.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = from_transformers(theirs)
    assert not ours.training
    assert [name for name, parameter in ours.named_parameters() if parameter.requires_grad] == ["experts.down.weight"]
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == torch.bfloat16, name
        assert tensor.is_contiguous(), name
        tensor.fill_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "minimax_m2"])
def test_in_bf16(model_type: ModelType) -> None:
    """Routing weights are fp32 here, and the logits too, so that a few tokens may go to other experts."""
    theirs = block_of(model_type).to(torch.bfloat16)
    hidden, _ = hidden_and_dy()
    got = from_transformers(theirs)(hidden.bfloat16()).float().flatten(0, 1)
    want = output(theirs, hidden.bfloat16()).float().flatten(0, 1)
    close = (got - want).norm(dim=-1) < 2e-2 * want.norm(dim=-1)
    assert close.float().mean() > 0.8


def test_another_activation_and_normalisation() -> None:
    theirs = block_of("qwen3_moe")
    theirs.experts.act_fn = nn.GELU()
    theirs.gate.norm_topk_prob = True
    ours = from_transformers(theirs)
    assert ours.config.rule.normalize
    assert_same(ours, theirs, "qwen3_moe")


def test_a_block_of_another_name() -> None:
    class Mine(type(block_of("qwen3_moe"))):  # type: ignore[misc]
        pass

    theirs = block_of("qwen3_moe")
    theirs.__class__ = Mine
    with pytest.raises(ValueError, match=r"block: got a Mine, need one of .*MixtralSparseMoeBlock.* model_type"):
        from_transformers(theirs)
    assert_same(from_transformers(theirs, "qwen3_moe"), theirs, "qwen3_moe")


def qwen(**fields: Any) -> MoEBlock:
    options = {"hidden": 8, "intermediate": 4, "num_experts": 4, "rule": RoutingRule(2, normalize=True)}
    return MoEBlock(MoEConfig(**(options | fields)))


@pytest.mark.parametrize(
    ("block", "model_type", "message"),
    [
        (lambda: qwen(), "deepseek_v3", "rule.score is 'softmax', deepseek_v3 computes 'sigmoid'"),
        (lambda: qwen(rule=RoutingRule(2)), "mixtral", "rule.normalize is False, mixtral has True"),
        (lambda: qwen(activation=ClampedGlu()), "mixtral", "is not mixtral's"),
        (lambda: qwen(rule=RoutingRule(2, "softmax_of_chosen")), "gpt_oss", "activation 'swiglu' is not gpt_oss's"),
        (lambda: qwen(), "qwen2_moe", "block: lacks shared.down.weight, shared.gate.weight, shared.up.weight"),
        (lambda: qwen(num_shared=1), "mixtral", "has shared.down.weight, shared.up.weight, which .* mixtral has no"),
        (lambda: qwen(expert_bias=True), "mixtral", "has experts.down.bias, experts.up.bias"),
        (lambda: qwen(), "llama4", "model_type: got 'llama4', need one of qwen2_moe, "),
    ],
)
def test_a_block_that_the_architecture_cannot_be(block: Callable[[], MoEBlock], model_type: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_transformers_state_dict(block(), model_type)


def test_what_cannot_be_read() -> None:
    theirs = block_of("mixtral")
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"state: lacks experts\.down_proj, which a block of mixtral has"):
        from_transformers_state_dict({k: v for k, v in state.items() if "down" not in k}, "mixtral")
    with pytest.raises(ValueError, match=r"state: has more, which a block of mixtral has no place for"):
        from_transformers_state_dict({**state, "more": torch.ones(1)}, "mixtral")
    theirs.jitter_noise = 0.1
    with pytest.raises(ValueError, match=r"router_jitter_noise is 0\.1, need 0"):
        from_transformers(theirs)


def test_the_default_of_gpt_oss_is_the_named_gate() -> None:
    activation = from_transformers(block_of("gpt_oss")).config.activation
    assert activation == ClampedGlu()
    assert math.isclose(activation.alpha, 1.702)
