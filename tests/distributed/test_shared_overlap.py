"""Shared experts that run while tokens travel: every bit as without, in the right order, and nothing left behind.

A CPU has no streams. Its lane here runs everything at once, and hides the result (NaN) until it is waited for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import expertune
from expertune.distributed.collectives import Wire
from expertune.distributed.dispatch import ExpertShard
from expertune.distributed.mesh import EXPERT, join_mesh
from expertune.distributed.sizes import ParallelSizes
from expertune.integrations.experts import SHARD
from expertune.integrations.sharded_model import build_skeleton, spread_model
from expertune.integrations.shared_overlap import EarlyShared, SharedOverlap, Unawaited, overlap_shared_experts
from expertune.layers.layout import is_experts_module, projection_names
from expertune.layers.route import SHARED
from expertune.train.run import overlap_in
from tests.distributed.processes import Crew
from tests.distributed.test_architectures import loss_of, rows
from tests.integrations.architectures import Architecture, architectures, build
from tests.integrations.parity import run
from tests.tiny import randomize_lora_b

AFTER, BEFORE = "hy_v3", "qwen2_moe"  # the shared experts are called after or before the routed ones
NEEDS_WEIGHTS = "inkling"  # its shared experts take weights from the router


@dataclass
class HidingLane:
    """Runs at once; the result is NaN until `wait`."""

    events: list[str] = field(default_factory=list)
    hidden: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def start(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.events.append("start")
        result = function(x)
        self.hidden.append((result, result.detach().clone()))
        result.data.fill_(torch.nan)
        return result

    def wait(self, result: Tensor | None = None) -> None:
        self.events.append("dx goes on" if result is None else "wait")
        while self.hidden:
            hidden, values = self.hidden.pop()
            hidden.data.copy_(values)


@dataclass(frozen=True)
class Alone(Wire):
    """A group of one process, which needs no other."""

    events: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return 1

    def exchange_rows(self, rows_PX: Tensor, send: Any, receive: Any, what: str) -> Tensor:
        self.events.append(what)
        return rows_PX.clone()

    def exchange_counts(self, counts_NC: Tensor, what: str, *, meanwhile: Callable[[], None] | None = None) -> Any:
        self.events.append("sizes leave")
        if meanwhile is not None:
            meanwhile()
        self.events.append("sizes arrive")
        return counts_NC.tolist(), counts_NC.tolist()


def shard_experts(model: nn.Module, events: list[str]) -> None:
    """Let the tokens of every experts module travel, to this process."""
    for module in model.modules():
        if is_experts_module(module):
            num_experts = getattr(module, projection_names(module)[0]).shape[0]
            setattr(module, SHARD, ExpertShard(Alone(None, "a test", 1.0, events), 0, num_experts))


def owners(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The modules with shared experts, and these."""
    found = [(owner, owner._modules.get(name)) for owner in model.modules() for name in SHARED]
    return [(owner, shared) for owner, shared in found if shared is not None]


@contextmanager
def overlapping(model: nn.Module, lane: HidingLane) -> Iterator[SharedOverlap]:
    overlap = overlap_shared_experts(model, lane)
    try:
        yield overlap
    finally:
        overlap.remove()


def named(folder: str) -> Architecture:
    return next(each for each in architectures() if each.folder == folder)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("architecture", architectures(), ids=str)
def test_every_architecture_is_bitwise_the_same(architecture: Architecture) -> None:
    """Whole models in which everything trains; each model's shared experts run once, ahead of the tokens."""
    model = build(architecture, "expertune")
    events: list[str] = []
    shard_experts(model, events)
    found = owners(model)
    if not found:
        pytest.skip("no shared experts")
    without = run(architecture, model)
    want = {name: value.clone() for name, value in without.gradients.items()}
    lane, computed = HidingLane(events), []
    for _, shared in found:
        down = next(module for name, module in shared.named_modules() if name in ("down_proj", "output_linear", ""))
        if down is not shared:
            down.register_forward_hook(lambda *_: computed.append(1))
    events.clear()
    with overlapping(model, lane) as overlap:
        got = run(architecture, model)
    assert torch.equal(got.output, without.output)
    assert_same(got.gradients, want)
    if architecture.folder == NEEDS_WEIGHTS:
        assert not overlap.layers
        assert "start" not in events
        return
    assert len(overlap.layers) == len(found) == events.count("start") == events.count("wait")
    assert len(computed) in (0, len(found)), "computed twice"
    here = events.index("start")
    assert here < events.index("sending tokens") < events.index("returning results") < events.index("wait")
    # Backward: the experts' messages first, then the shared experts, all of which dx waits for.
    assert events.count("dx goes on") == len(found)
    assert events.index("returning gradients of tokens") < events.index("dx goes on")


def with_adapters(model: nn.Module) -> nn.Module:
    """Adapters on attention, experts and the shared experts' linears; B is random."""
    modules = r".*\.(self_attn|shared_experts?)\.(q|k|v|o|gate|up|down)\w*_proj"
    torch.manual_seed(0)
    parameters = expertune.get_target_parameters(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=modules, target_parameters=parameters))
    randomize_lora_b(adapted)
    return adapted


def losses_and_gradients(
    model: nn.Module, batches: int = 2, ids: Tensor | None = None, autocast: bool = False
) -> dict[str, Tensor]:
    """Of several micro-batches, whose gradients add up.

    autocast: of the forward, to bf16. Not of the backward: a recomputation would take weights that the first forward
    cast, whose gradients then arrive after FSDP2 has sent those of the layer.
    """
    model.zero_grad()
    losses = []
    for batch in (rows() if ids is None else ids).chunk(batches):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: grad.to_local() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    return {"losses": torch.stack(losses), **gradients}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "checkpointed, reentrant"])
@pytest.mark.parametrize("kind", [AFTER, BEFORE])
def test_adapters_are_bitwise_the_same(kind: str, checkpointing: bool | None) -> None:
    events: list[str] = []
    base = build(named(kind), "expertune")
    shard_experts(base, events)
    model = with_adapters(base)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    want = losses_and_gradients(model)
    shared = [name for name in want if ".shared_expert" in name]
    assert len(shared) == 6
    assert all(want[name].norm() > 0 for name in shared)
    events.clear()
    with overlapping(model, HidingLane(events)) as overlap:
        got = losses_and_gradients(model)
    assert_same(got, want)
    passes = 2 * len(overlap.layers) * (1 if checkpointing is None else 2)  # the recomputation overlaps as well
    assert events.count("start") == passes > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("kind", [AFTER, BEFORE])
def test_without_gradients(kind: str, mode: Any) -> None:
    events: list[str] = []
    model = build(named(kind), "expertune").eval()
    shard_experts(model, events)
    with mode():
        want = model(input_ids=rows()).logits
        with overlapping(model, HidingLane(events)):
            assert torch.equal(model(input_ids=rows()).logits, want)
    # tensors of inference mode do not count writes, so nothing could be compared
    assert ("start" in events) is (kind == BEFORE or mode is torch.no_grad)


# One block, whose shared experts are called in every way that they may be.


class ToyExperts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        shard: ExpertShard = vars(self)[SHARD]
        shard.wire.exchange_counts(torch.zeros(1, 2), "", meanwhile=shard.meanwhile)
        return shard.wire.exchange_rows(x, (), (), "sending tokens") * 2


class ToyShared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class ToyBlock(nn.Module):
    """call: how it calls its shared experts, given those and x."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], shared: nn.Module | None = None) -> None:
        super().__init__()
        self.call, self.events = call, []
        self.gate, self.experts, self.shared_experts = nn.Linear(4, 4), ToyExperts(), shared or ToyShared()
        self.gate.requires_grad_(False)
        setattr(self.experts, SHARD, ExpertShard(Alone(None, "a test", 1.0, self.events), 0, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.clone()  # it may be written to: no gradient here needs its numbers
        weights = self.gate(x).sum()
        routed = self.experts(x) * weights
        return routed + self.call(self.shared_experts, x)


def toy(call: Callable[[nn.Module, Tensor], Tensor], shared: nn.Module | None = None) -> ToyBlock:
    torch.manual_seed(0)
    return ToyBlock(call, shared)


def toy_results(block: nn.Module) -> dict[str, Tensor]:
    block.zero_grad()
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = block(hidden)
    (out * torch.arange(24.0).view_as(out)).sum().backward()
    assert hidden.grad is not None
    return {"out": out.detach(), "dx": hidden.grad} | {
        n: p.grad for n, p in block.named_parameters() if p.grad is not None
    }


class Halved(torch.autograd.Function):
    """The same numbers, another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy / 2


def written_to(shared: nn.Module, x: Tensor) -> Tensor:
    return shared(x.mul_(3))


def without_gradient(shared: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return shared(x)


def in_bf16(shared: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return shared(x)


CALLS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "with x": (lambda shared, x: shared(x), True),
    "with x in another shape": (lambda shared, x: shared(x.view(-1, 4)).view(x.shape), True),
    "twice": (lambda shared, x: shared(x) + shared(x.detach()), True),
    "with a copy": (lambda shared, x: shared(x.clone()), False),
    "with a part": (lambda shared, x: shared(x[:1]), False),
    "with x detached": (lambda shared, x: shared(x.detach()), False),
    "with x, its gradient halved": (lambda shared, x: shared(Halved.apply(x)), False),
    "with x, written to since": (written_to, False),
    "without a gradient": (without_gradient, False),
    "under autocast": (in_bf16, False),
    "by a name": (lambda shared, x: shared(x=x), False),
    "not at all": (lambda shared, x: x, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_used_for_the_very_tensor_alone(name: str) -> None:
    call, is_used = CALLS[name]
    block = toy(call)
    want = toy_results(block)
    calls: list[int] = []
    block.shared_experts.linear.register_forward_hook(lambda *_: calls.append(1))
    lane = HidingLane(block.events)
    with overlapping(block, lane):
        assert_same(toy_results(block), want)
        assert_same(toy_results(block), want)  # nothing of the first is left
    asked = {"twice": 2, "not at all": 0}.get(name, 1)
    assert len(calls) == 2 * (asked + (not is_used))
    assert lane.events.count("wait") == 2, "what was started is waited for, used or not"


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "of other numbers": lambda x: x + 1,
    "a part": lambda x: x[:, :2],
    "of another dtype": lambda x: x.double().float(),
    "in another order": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_tensor_without_a_gradient(name: str) -> None:
    def call(shared: nn.Module, x: Tensor) -> Tensor:
        out = shared(OTHERS[name](x)).flatten()
        return out @ torch.arange(float(out.numel()))

    block, hidden = toy(call), torch.arange(24.0).view(2, 3, 4) / 24
    with torch.no_grad():
        want = block(hidden)
        with overlapping(block, HidingLane(block.events)):
            assert torch.equal(block(hidden), want)
    assert "start" in block.events


def test_the_order_of_events() -> None:
    block = toy(CALLS["with x"][0])
    block.shared_experts.register_forward_hook(lambda *_: block.events.append("the block has it"))
    with overlapping(block, HidingLane(block.events)):
        toy_results(block)
    order = ["sizes leave", "start", "sizes arrive", "sending tokens", "wait", "the block has it", "dx goes on"]
    assert block.events == order


class FailingExperts(ToyExperts):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("out of luck")


def test_nothing_is_left_after_an_exception() -> None:
    block = toy(CALLS["with x"][0])
    want = toy_results(block)
    lane = HidingLane(block.events)
    with overlapping(block, lane) as overlap:
        working, failing = block.experts, FailingExperts()
        vars(failing)[SHARD] = vars(working)[SHARD]
        block.experts = failing
        with pytest.raises(RuntimeError, match="out of luck"):
            toy_results(block)
        assert not lane.hidden, "still running"
        assert vars(overlap.layers[0]._block) == {"is_open": False, "noted": None, "run": None, "handed_over": False}
        block.experts = working
        x = torch.ones(2, 4)
        assert not isinstance(block.shared_experts(x), Unawaited), "called outside of the block"
        assert_same(toy_results(block), want)


def test_shared_experts_that_wait_for_a_hook_of_their_own() -> None:
    """FSDP2, say, gathers weights in a hook before the forward: it must have run."""
    block = toy(CALLS["with x"][0])
    block.shared_experts.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    want = toy_results(block)
    lane = HidingLane()
    with overlapping(block, lane):
        assert_same(toy_results(block), want)
    assert "start" not in lane.events


class TwoInputs(ToyShared):
    def forward(self, x: Tensor, gammas: Tensor) -> Tensor:
        return super().forward(x) * gammas


class Gathered(ToyShared, FSDPModule):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__new__(cls)


@pytest.mark.parametrize("kind", [TwoInputs, Gathered])
def test_shared_experts_that_are_left_alone(kind: type[nn.Module]) -> None:
    assert not overlap_shared_experts(toy(CALLS["with x"][0], kind()), HidingLane()).layers


def test_without_travelling_tokens_there_is_nothing_to_overlap() -> None:
    block = toy(CALLS["with x"][0])
    delattr(block.experts, SHARD)
    assert not overlap_shared_experts(block, HidingLane()).layers


def test_on_a_cpu_nothing_is_changed() -> None:
    block = toy(CALLS["with x"][0])
    before = state_of(block)
    assert overlap_in(block, torch.device("cpu"), Console(quiet=True)) == 0
    assert state_of(block) == before


def state_of(model: nn.Module) -> list[Any]:
    """What makes a module what it is, besides its values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return [
        (name, {key: list(value) if key in hooks else value for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("kind", [AFTER, BEFORE, "granitemoehybrid"])
def test_names_stay_and_removal_leaves_no_trace(kind: str) -> None:
    model = build(named(kind), "expertune")
    shard_experts(model, [])
    before, keys = state_of(model), list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    lane = HidingLane()
    first = overlap_shared_experts(model, lane)
    during = state_of(model)
    assert during != before
    again = overlap_shared_experts(model, lane)
    assert again == first
    assert state_of(model) == during
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    again.remove()
    again.remove()
    assert state_of(model) == before


def test_a_forward_that_someone_else_put_there_stays() -> None:
    block = toy(CALLS["with x"][0])
    theirs = partial(type(block.shared_experts).forward, block.shared_experts)
    block.shared_experts.forward = theirs
    with overlapping(block, HidingLane()):
        assert isinstance(block.shared_experts.forward, EarlyShared)
    assert block.shared_experts.forward is theirs


def test_whatever_reads_an_unawaited_result_waits() -> None:
    reads: dict[str, Callable[[Tensor], Any]] = {
        "on the left": lambda y: y + 1,
        "on the right": lambda y: torch.ones(2, 3) + y,
        "in a list": lambda y: torch.cat([y.new_zeros(2, 3), y]),
        "in place": lambda y: torch.ones(2, 3).add_(y),
        "a linear": lambda y: nn.functional.linear(y, torch.ones(4, 3)),
        "its numbers": lambda y: y.tolist(),
        "its address": lambda y: y.data_ptr(),
        "a part": lambda y: y[0],
        "a view of it": lambda y: y.view(6) + 0,
        "a function of autograd": lambda y: Halved.apply(y) + 0,
    }
    for name, read in reads.items():
        block = toy(lambda shared, x: x)
        lane = HidingLane()
        with overlapping(block, lane) as overlap:
            overlap.layers[0]._begin(block, ())
            y = block.shared_experts(torch.ones(2, 4))[:, :3]  # a read as well
            assert lane.events == ["start", "wait"]
            overlap.layers[0]._begin(block, ())
            y = block.shared_experts(torch.ones(2, 4))
            assert isinstance(y.view(8), Unawaited)
            assert lane.events == ["start", "wait", "start"], name
            y = Unawaited.of(y.result.view(8)[:6].view(2, 3), y.run)
            value = read(y)
            assert lane.events[-1] == "wait", name
            assert not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


# Real processes.


def in_two_processes(folder: str) -> tuple[int, list[str], list[str]]:
    """The layers that overlap, the names that differ, and the order of events."""
    mesh = join_mesh(ParallelSizes(expert=2), "cpu", timeout_s=30)
    settings = {"experts_implementation": "expertune"}
    model = with_adapters(build_skeleton(folder, torch.float32, **settings))
    spread_model(model, folder, torch.float32, mesh, torch.device("cpu"), **settings)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    want = losses_and_gradients(model, batches=4)
    lane = HidingLane()
    with overlapping(model, lane) as overlap:
        got = losses_and_gradients(model, batches=4)
    differ = [name for name in want if not torch.equal(got[name], want[name])]
    return len(overlap.layers), differ, lane.events


@pytest.mark.parametrize("kind", [AFTER, BEFORE])
def test_two_processes_are_bitwise_the_same(kind: str, tmp_path: Path, two: Crew) -> None:
    build(named(kind), "eager").save_pretrained(tmp_path)
    for layers, differ, events in two.run(in_two_processes, str(tmp_path)):
        assert layers == 1
        assert not differ
        assert events.count("start") == 2 * 4


def failing_meanwhile(_: None) -> str:
    mesh = join_mesh(ParallelSizes(expert=2), "cpu", timeout_s=30)

    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError) as caught:
        mesh.wire(EXPERT, "a layer").exchange_counts(torch.ones(2, 2), "sizes", meanwhile=fail)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_an_error_meanwhile_is_not_one_of_messages(two: Crew) -> None:
    assert two.run(failing_meanwhile, None) == ["RuntimeError: out of memory"] * 2
