"""MoEBlock against a dense reference in which every expert computes every token and adapters are folded."""

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune.errors import BackendError
from expertune.layers import running
from expertune.layers.activations import ClampedGlu
from expertune.layers.lora import LoraPlaces, LoraSpec
from expertune.layers.moe_block import MoEBlock, MoEConfig
from expertune.ops.experts import torch_grouped
from expertune.ops.routing import fused
from expertune.ops.routing.losses import load_balancing_loss
from expertune.ops.routing.types import RoutingRule
from tests.comparing import FLOOR, assert_agrees, relative_error

H, WIDTH, E = 24, 16, 8
OUTPUT, GRADIENT = 1e-5, 2e-5

ROUTED = LoraPlaces(experts_up=LoraSpec(3, 6), experts_down=LoraSpec(5, 8, rslora=True), router=LoraSpec(2, 3))
SHARED = replace(ROUTED, shared_up=LoraSpec(4, 4), shared_down=LoraSpec(1, 2))


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def clamped(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.5 * gate)


def geglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up


@dataclass(frozen=True)
class Case:
    config: MoEConfig
    activation: Callable[[Tensor], Tensor] = swiglu


def config(rule: RoutingRule, **fields: Any) -> MoEConfig:
    return MoEConfig(**({"hidden": H, "intermediate": WIDTH, "num_experts": E, "rule": rule, "lora": ROUTED} | fields))


CASES = {
    "softmax": Case(config(RoutingRule(2, normalize=True))),
    "not normalised, exact gelu": Case(config(RoutingRule(3), activation="geglu"), geglu),
    "gpt-oss": Case(
        config(
            RoutingRule(2, "softmax_of_chosen"),
            activation=ClampedGlu(1.5, 1.0),
            expert_bias=True,
            router_bias=True,
        ),
        clamped,
    ),
    "groups, correction, two shared": Case(
        config(
            RoutingRule(3, "sigmoid", True, 1e-20, 2.5, num_groups=4, top_groups=2),
            correction_bias=True,
            num_shared=2,
            shared_intermediate=10,
            lora=SHARED,
        )
    ),
    "gated shared": Case(
        config(RoutingRule(2), num_shared=1, shared_gate=True, lora=replace(SHARED, shared_gate=LoraSpec(2, 2)))
    ),
    "relu squared, shared": Case(
        config(RoutingRule(2, "sigmoid"), activation="relu_squared", num_shared=1, lora=SHARED),
        lambda h: torch.where(h > 0, h * h, 0.0),
    ),
    "a function, not gated": Case(config(RoutingRule(E), activation=F.silu, gated=False), F.silu),
    "no adapter": Case(config(RoutingRule(2), num_shared=1, lora=LoraPlaces())),
}


def make(case: Case, seed: int = 0) -> MoEBlock:
    """A block in which nothing is zero or constant."""
    torch.manual_seed(seed)
    block = MoEBlock(case.config)
    with torch.no_grad():
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if name.endswith(("lora_b", "bias")):
                tensor.normal_(std=0.3)
    return block


def dense(
    case: Case, tensors: dict[str, Tensor], x: Tensor, *, dtype: torch.dtype, shared: bool = True
) -> tuple[Tensor, Tensor]:
    """The output and the routing weights [T, E] with zeros; products in `dtype`, the router in fp32 at least."""
    lora = case.config.lora.given()

    def weight(name: str, dtype: torch.dtype = dtype) -> Tensor:
        folded, place = tensors[f"{name}.weight"].to(dtype), name.replace(".", "_")
        if place in lora:
            spec = lora[place]
            scaling = spec.alpha / (spec.rank**0.5 if spec.rslora else spec.rank)
            folded = folded + scaling * tensors[f"{name}.lora_b"].to(dtype) @ tensors[f"{name}.lora_a"].to(dtype)
        return folded

    router_dtype = torch.promote_types(dtype, torch.float32)
    logits = x.to(router_dtype) @ weight("router", router_dtype).T + tensors.get("router.bias", torch.tensor(0.0))
    weights = routing_weights(case.config.rule, logits, tensors.get("router.correction_bias"))
    x = x.to(dtype)
    up, down = weight("experts.up"), weight("experts.down")
    y = torch.zeros(x.shape, dtype=router_dtype)
    for expert in range(E):
        h = x @ up[expert].T
        if case.config.expert_bias:
            h = h + tensors["experts.up.bias"][expert].to(dtype)
        z = case.activation(h) @ down[expert].T
        if case.config.expert_bias:
            z = z + tensors["experts.down.bias"][expert].to(dtype)
        y = y + weights[:, expert, None] * z
    if shared and case.config.num_shared:
        out = case.activation(x @ weight("shared.up").T) @ weight("shared.down").T
        y = y + (torch.sigmoid(x @ weight("shared.gate").T) * out if case.config.shared_gate else out)
    return y, weights


def routing_weights(rule: RoutingRule, logits: Tensor, correction: Tensor | None) -> Tensor:
    """[T, E], zero where an expert is not chosen."""
    of_chosen = rule.score == "softmax_of_chosen"
    scores = logits if of_chosen else logits.softmax(-1) if rule.score == "softmax" else logits.sigmoid()
    choice = scores if correction is None else scores + correction
    if rule.num_groups > 1:
        groups = choice.unflatten(1, (rule.num_groups, -1))
        best = groups.sort(dim=-1, descending=True).values[..., :2].sum(-1).topk(rule.top_groups).indices
        out = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, best, False)
        choice = groups.masked_fill(out[..., None], -torch.inf).flatten(1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, choice.topk(rule.top_k).indices, True)
    if of_chosen:
        return scores.masked_fill(~chosen, -torch.inf).softmax(-1)
    weights = scores * chosen
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + rule.epsilon)
    return weights * rule.scaling


def everything(block: MoEBlock, x: Tensor, dy: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """The output and every gradient; autocast is for the forward, as torch says to use it."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = block(x)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad(set_to_none=True)
    return {"y": y.detach(), "x": x.grad, **grads}


def everything_dense(case: Case, block: MoEBlock, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {
        name: t.detach().clone().requires_grad_("correction" not in name) for name, t in block.state_dict().items()
    }
    x = x.detach().clone().requires_grad_()
    y, _ = dense(case, tensors, x, dtype=dtype)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: t.grad for name, t in tensors.items() if t.grad is not None}}


def tokens(count: int, *, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, H, generator=generator), torch.randn(count, H, generator=generator)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("count", [1, 37])
@pytest.mark.parametrize("name", CASES)
def test_the_output_and_every_gradient(name: str, count: int) -> None:
    case = CASES[name]
    block, (x, dy) = make(case), tokens(count)
    got, want = everything(block, x, dy), everything_dense(case, block, x, dy, torch.float32)
    assert got.keys() == want.keys() == {"y", "x", *dict(block.named_parameters())}
    for key, value in want.items():
        # one token leaves experts without rows, whose gradients are exact zeros
        error = relative_error(got[key], value) if value.norm() > 0 else float(got[key].abs().sum())
        assert error < (OUTPUT if key == "y" else GRADIENT), (key, error)


@pytest.mark.parametrize("name", CASES)
def test_in_fp64(name: str) -> None:
    case = CASES[name]
    block, (x, dy) = make(case).double(), tokens(11)
    got, want = everything(block, x.double(), dy), everything_dense(case, block, x.double(), dy, torch.float64)
    for key, value in want.items():
        assert relative_error(got[key], value) < 1e-11, key


@pytest.mark.parametrize("name", ["softmax", "gpt-oss", "gated shared"])
def test_in_bf16_as_close_to_fp32_as_plain_torch(name: str) -> None:
    """Adapters and the correction bias stay in fp32, and get fp32 gradients."""
    case = CASES[name]
    block, (x, dy) = make(case).to(torch.bfloat16), tokens(64)
    x, dy = x.bfloat16(), dy.bfloat16()
    got = everything(block, x, dy)
    want = everything_dense(case, block, x, dy, torch.float32)
    plain = everything_dense(case, block, x, dy, torch.bfloat16)
    for key, value in want.items():
        assert got[key].dtype == (torch.float32 if "lora_" in key else torch.bfloat16), key
        if value.numel() > 2:
            assert_agrees(key, got[key], value, dtype=torch.bfloat16, same_dtype=plain[key])
        else:  # how two numbers round is luck
            assert relative_error(got[key], value) < 2 * FLOOR[torch.bfloat16], key


def test_what_keeps_fp32() -> None:
    block = make(CASES["groups, correction, two shared"])
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block.experts.up.lora_a.grad = torch.ones_like(block.experts.up.lora_a)
    parameter = block.experts.up.lora_a
    for change in (lambda: block.to(torch.bfloat16), lambda: block.half()):
        change()
        for name, tensor in block.state_dict().items():
            keeps = "lora_" in name or name == "router.correction_bias"
            assert (tensor.dtype == torch.float32) == keeps, name
            assert not keeps or torch.equal(tensor, before[name]), name
    assert block.experts.up.lora_a is parameter
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32
    assert block.double().experts.up.lora_a.dtype == torch.float64


@pytest.mark.parametrize("name", ["softmax", "gated shared"])
def test_autocast_does_not_reach_in(name: str) -> None:
    block, (x, dy) = make(CASES[name]), tokens(9)
    want = everything(block, x, dy)
    got = everything(block, x, dy, autocast=True)
    assert all(torch.equal(got[key], value) for key, value in want.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(0, H), (2, 0, H)])
def test_no_token(name: str, shape: tuple[int, ...]) -> None:
    block = make(CASES[name])
    x = torch.randn(shape, requires_grad=True)
    y, routing = block(x, return_routing=True)
    y.sum().backward()
    assert y.shape == shape
    assert routing.expert_ids_TK.shape == (0, block.config.rule.top_k)
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_any_leading_dimensions_and_strides() -> None:
    block, (x, _) = make(CASES["groups, correction, two shared"]), tokens(30)
    want = block(x)
    assert torch.equal(block(x.view(2, 3, 5, H)), want.view(2, 3, 5, H))
    strided = x.view(5, 6, H).transpose(0, 1)
    assert relative_error(block(strided), want.view(5, 6, H).transpose(0, 1)) < 1e-6
    assert block(x[0]).shape == (H,)


def test_shared_experts_alone_and_left_out() -> None:
    case = CASES["gated shared"]
    block, (x, _) = make(case), tokens(7)
    alone, without = block.shared(x), block(x, shared=False)
    assert torch.equal(without + alone, block(x))
    want, _ = dense(case, block.state_dict(), x, dtype=torch.float32, shared=False)
    assert relative_error(without, want) < OUTPUT
    assert block.shared(x.view(1, 7, H)).shape == (1, 7, H)
    assert make(CASES["softmax"]).shared is None


def test_the_routing_for_losses_and_metrics() -> None:
    case = CASES["groups, correction, two shared"]
    block, (x, _) = make(case), tokens(12)
    y, routing = block(x.view(3, 4, H), return_routing=True)
    _, weights = dense(case, block.state_dict(), x, dtype=torch.float32)
    got = torch.zeros(12, E).scatter(1, routing.expert_ids_TK, routing.weights_TK)
    assert relative_error(got, weights) < 1e-6
    assert torch.equal(block.route(x).expert_ids_TK, routing.expert_ids_TK)
    assert torch.equal(block(x), y.view(12, H))
    assert routing.load_E(E).sum() == 12 * 3
    load_balancing_loss(routing).backward()
    assert block.router.weight.grad.norm() > 0
    assert block.experts.up.weight.grad is None


def test_a_new_adapter_changes_nothing() -> None:
    case = CASES["gated shared"]
    places = case.config.lora
    torch.manual_seed(0)
    block, (x, _) = MoEBlock(replace(case.config, lora=LoraPlaces())), tokens(8)
    before = block(x)
    assert block.add_lora(places) is block
    assert torch.equal(block(x), before)
    assert block.config == case.config
    for name, parameter in block.named_parameters():
        if name.endswith("lora_a"):
            bound = parameter.shape[-1] ** -0.5  # Kaiming uniform with a = sqrt(5), as PEFT
            assert 0.5 * bound < parameter.abs().max() <= bound, name
        assert parameter.any() != name.endswith("lora_b"), name
    assert block.experts.up.lora_a.shape == (E, 3, H)
    assert block.experts.up.lora_b.shape == (E, 2 * WIDTH, 3)
    assert block.router.lora_a.shape == (2, H)


def test_a_frozen_base_gets_no_gradient_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["gated shared"]
    block, (x, dy) = make(case), tokens(20)
    want = everything(block, x, dy)
    outer, shapes = torch_grouped.grouped_outer, []

    def noting(left: Tensor, right: Tensor, plan: Any) -> Tensor:
        out = outer(left, right, plan)
        shapes.append(out.shape[1:])
        return out

    monkeypatch.setattr(torch_grouped, "grouped_outer", noting)
    assert block.freeze_base() is block
    got = everything(block, x, dy)
    adapters = [name for name, _ in block.named_parameters() if "lora_" in name]
    assert got.keys() == {"y", "x", *adapters}
    assert len(list(block.lora_parameters())) == len(adapters) == 12
    assert all(torch.equal(got[key], want[key]) for key in got)
    assert len(shapes) == 4  # A and B of two projections; ranks are padded to 16 bytes
    assert all(min(shape) <= 8 for shape in shapes)


def test_merging() -> None:
    for dtype, bound in ((torch.float32, OUTPUT), (torch.bfloat16, 1e-2)):
        block, (x, _) = make(CASES["gated shared"]).to(dtype), tokens(16)
        x = x.to(dtype)
        want = block(x)
        assert block.merge_lora() is block
        assert not any("lora_" in name for name in block.state_dict())
        assert relative_error(block(x), want) < bound
        assert block.config.lora == LoraPlaces()


def test_the_same_after_saving_copying_and_pickling() -> None:
    case = CASES["groups, correction, two shared"]
    block, (x, _) = make(case), tokens(6)
    other = MoEBlock(case.config)
    other.load_state_dict(block.state_dict())
    for each in (other, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(each(x), block(x))
        assert each.config == block.config


def test_made_on_meta_and_filled_later() -> None:
    with torch.device("meta"):
        block = MoEBlock(CASES["groups, correction, two shared"].config)
    block.to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.isfinite(block(tokens(4)[0])).all()
    assert not block.router.correction_bias.any()


def test_adapters_learn() -> None:
    teacher, student = make(CASES["gated shared"], seed=1), make(CASES["gated shared"], seed=1)
    with torch.no_grad():
        for parameter in student.lora_parameters():
            parameter.mul_(0 if parameter.shape[-1] < 8 else 1)
    student.freeze_base()
    base = {name: p.clone() for name, p in student.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(student.lora_parameters(), lr=3e-3, weight_decay=0.0)
    x, _ = tokens(256)
    want, losses = teacher(x).detach(), []
    for _ in range(80):
        loss = F.mse_loss(student(x), want)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(student.get_parameter(name), value) for name, value in base.items())


@pytest.mark.parametrize("name", ["gpt-oss", "groups, correction, two shared"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_scattermoe(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton's routing; on the CPU in its interpreter, which is off where there is a GPU."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("compiled kernels do not run on the CPU")
    case = CASES[name]
    block, (x, dy) = make(case), tokens(7)
    want = everything(block, x, dy)
    block = make(replace(case, config=replace(case.config, backend="scattermoe"))).to(device)
    if device == "cpu":
        monkeypatch.setattr(running, "unavailable_reason", lambda *_, **__: None)
    running._backend_for.cache_clear()
    calls, run = [], fused.fused_select_experts
    monkeypatch.setattr(fused, "fused_select_experts", lambda *a, **k: calls.append(1) or run(*a, **k))
    got = everything(block, x.to(device), dy.to(device))
    running._backend_for.cache_clear()
    assert calls == [1]
    for key, value in want.items():
        assert relative_error(got[key].cpu(), value) < (GRADIENT if device == "cpu" else 1e-4), key


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in the interpreter: inf - inf
@pytest.mark.parametrize("name", ["gpt-oss", "groups, correction, two shared"])
@pytest.mark.parametrize("backend", ["torch_grouped", "scattermoe", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_token_that_is_not_finite_is_alone_in_it(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN or infinite hidden states: ids in range, NaN in that token's output, and every other token as it was."""
    device = "cuda" if backend == "cuda" else "cpu"  # cuda: scattermoe, compiled
    if backend == "scattermoe" and torch.cuda.is_available():
        pytest.skip("compiled kernels do not run on the CPU")
    case, (x, _) = CASES[name], tokens(7)
    want = make(case)(x)
    backend = "scattermoe" if backend == "cuda" else backend
    block = make(replace(case, config=replace(case.config, backend=backend))).to(device)
    if device == "cpu":
        monkeypatch.setattr(running, "unavailable_reason", lambda *_, **__: None)
    running._backend_for.cache_clear()
    spoiled = x.clone()
    spoiled[2], spoiled[5] = float("nan"), float("inf")
    y, routing = block(spoiled.to(device), return_routing=True)
    running._backend_for.cache_clear()
    assert all(set(row) <= set(range(E)) and len(set(row)) == len(row) for row in routing.expert_ids_TK.tolist())
    is_bad = torch.tensor([token in (2, 5) for token in range(7)])
    assert torch.equal(routing.weights_TK.isnan().all(dim=1).cpu(), is_bad)
    assert y.cpu()[is_bad].isnan().all()
    assert relative_error(y.cpu()[~is_bad], want[~is_bad]) < (GRADIENT if device == "cpu" else 1e-4)


def test_a_backend_that_cannot_run_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("it can run")
    block = MoEBlock(config(RoutingRule(2), backend="scattermoe"))
    with pytest.raises(BackendError, match=r"backend='scattermoe': .* Use backend: expertune"):
        block(tokens(2)[0])


def test_transformers_is_not_imported() -> None:
    code = "import sys, expertune.layers.convert; assert not {'transformers', 'peft'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, h: Tensor) -> Tensor:
        return swiglu(h) * self.scale


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 0}, "hidden: got 0, need at least 1"),
        ({"intermediate": -1}, "intermediate: got -1"),
        ({"num_experts": 0}, "num_experts: got 0"),
        ({"rule": RoutingRule(9)}, "top_k: got 9, need 1 to 8"),
        ({"rule": RoutingRule(2, num_groups=3)}, "num_groups: got 3, need a divisor of 8"),
        ({"rule": RoutingRule(2, num_groups=2, top_groups=3)}, "top_groups: got 3"),
        ({"rule": RoutingRule(5, num_groups=2)}, "top_k: got 5"),
        ({"activation": "swish"}, "activation: got 'swish', need one of swiglu, "),
        ({"activation": "relu_squared", "gated": True}, "gated: got True, relu_squared is not gated"),
        ({"activation": "swiglu", "gated": False}, "gated: got False, swiglu is gated"),
        ({"activation": F.silu}, r"activation: \[1, 32\] became \[1, 32\], need \[1, 16\] \(gated=False"),
        ({"activation": swiglu, "gated": False}, r"activation: \[1, 16\] became \[1, 8\]"),
        ({"activation": Scaled()}, "activation: a module with parameters"),
        ({"num_shared": -1}, "num_shared: got -1"),
        ({"shared_intermediate": 4}, "shared_intermediate: got 4, need None where num_shared is 0"),
        ({"num_shared": 1, "shared_intermediate": 0}, "shared_intermediate: got 0"),
        ({"shared_gate": True}, "shared_gate: got True, need False where num_shared is 0"),
        ({"backend": "sonic"}, "backend: got 'sonic', need one of expertune, "),
        ({"lora": LoraPlaces(shared_up=LoraSpec(2, 2))}, "lora.shared_up: .* need None where num_shared is 0"),
        (
            {"num_shared": 1, "lora": LoraPlaces(shared_gate=LoraSpec(2, 2))},
            "lora.shared_gate: .* need None where shared_gate is False",
        ),
    ],
)
def test_a_configuration_that_contradicts_itself(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**({"rule": RoutingRule(2)} | fields))


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="rank: got 0"):
        LoraSpec(0, 1)
    block = make(CASES["softmax"])
    with pytest.raises(ValueError, match=r"hidden: got shape \(2, 23\), need \[\.\.\., 24\]"):
        block(torch.randn(2, 23))
    with pytest.raises(ValueError, match=r"hidden: got shape \(\)"):
        block.route(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"lora\.experts_down: there is an adapter already"):
        block.add_lora(LoraPlaces(experts_down=LoraSpec(2, 2)))
    with pytest.raises(ValueError, match=r"lora\.shared_up: .* need None where num_shared is 0"):
        block.add_lora(LoraPlaces(shared_up=LoraSpec(2, 2)))
    assert block.config == CASES["softmax"].config
