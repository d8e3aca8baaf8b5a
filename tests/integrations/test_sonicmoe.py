"""Whole models on sonicmoe, both ways; its place in Transformers' registry, which has a function of that name itself.

Without a GPU the kernels run in Triton's interpreter, and only the question whether the backend can run is answered for
them; with a Hopper GPU, everything is as users have it.
"""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sonicmoe import sonicmoe_experts_forward

import expertune
from expertune.errors import BackendError
from expertune.integrations import experts, refusals
from expertune.layers import running
from expertune.layers.moe_block import MoEBlock, MoEConfig
from expertune.ops.experts.sonicmoe import fold
from expertune.ops.experts.sonicmoe import mlp as sonicmoe_mlp
from expertune.ops.routing.types import RoutingRule
from tests.comparing import relative_error
from tests.integrations.gradients import assert_equal, loss_and_gradients
from tests.integrations.test_architectures import build
from tests.tiny import VOCAB, tiny_config, tiny_model, with_adapter

BOTH = ("sonicmoe", "sonicmoe_materialize")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_DEVICE = [pytest.mark.gpu] if DEVICE == "cuda" else []
TOO_OLD = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="a GPU of compute capability 9 is needed"
)


@pytest.fixture
def it_can_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setattr(running, "unavailable_reason", lambda *_, **__: None)
        monkeypatch.setattr(refusals, "unavailable_reason", lambda *_, **__: None)
    running._backend_for.cache_clear()
    yield
    running._backend_for.cache_clear()


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """In the interpreter here, compiled on a Hopper GPU."""
    for mark in (pytest.mark.usefixtures("it_can_run"), TOO_OLD, *ON_DEVICE):
        test = mark(test)
    return test


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each call of the backend applied its adapters."""
    seen: list[str] = []
    run = sonicmoe_mlp.sonicmoe_expert_mlp
    monkeypatch.setattr(sonicmoe_mlp, "sonicmoe_expert_mlp", lambda *a, **k: seen.append(k["adapter"]) or run(*a, **k))
    return seen


@on_device
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_loss_and_gradients_equal_eager(name: str, implementation: str, ways: list[str]) -> None:
    got = loss_and_gradients(with_adapter(build(name, implementation)))
    assert set(ways) == {"low_rank" if implementation == "sonicmoe" else "materialize"}
    assert_equal(got, loss_and_gradients(with_adapter(build(name, "eager"))))


@on_device
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_without_adapters_it_is_the_models_own_gate(name: str, implementation: str) -> None:
    """Every weight trains. Transformers' own computes SwiGLU for gpt-oss, whose gate is another."""
    assert_equal(loss_and_gradients(build(name, implementation)), loss_and_gradients(build(name, "eager")))


@on_device
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_one_sided_adapters(projection: str, implementation: str) -> None:
    def adapted(name: str) -> nn.Module:
        model = tiny_model(name, num_hidden_layers=1)
        targets = [each for each in expertune.get_target_parameters(model) if each.endswith(projection)]
        return with_adapter(model, target_parameters=targets)

    assert_equal(loss_and_gradients(adapted(implementation)), loss_and_gradients(adapted("eager")))


@on_device
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("implementation", BOTH)
def test_a_layer_in_pieces(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folds: list[int] = []
    run = fold.fold_projection
    monkeypatch.setattr(fold, "fold_projection", lambda p: folds.append(1) or run(p))

    def with_own_parameter(name: str) -> nn.Module:
        model = with_adapter(tiny_model(name, num_hidden_layers=1))
        for module in model.modules():
            if hasattr(module, "gate_up_proj"):
                module.scale = nn.Parameter(torch.tensor(0.7))
                module._apply_gate = lambda h, m=module: torch.tanh(h.chunk(2, dim=-1)[0]) * m.scale
        return model

    got = loss_and_gradients(with_own_parameter(implementation))
    assert len(folds) == (2 if implementation == "sonicmoe_materialize" else 0)
    want = loss_and_gradients(with_own_parameter("torch_grouped"))
    assert any("scale" in key for key in want)
    assert_equal(got, want)


@on_device
@pytest.mark.parametrize("implementation", BOTH)
def test_it_is_part_of_one_graph(implementation: str) -> None:
    torch.compiler.reset()
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    model = with_adapter(tiny_model(implementation, num_hidden_layers=1, num_experts=4)).to(DEVICE)

    def gradients(run: Callable[..., object]) -> dict[str, Tensor]:
        model.zero_grad()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # type: ignore[attr-defined]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    inner = model.get_base_model()
    want = gradients(inner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(inner, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
        got = gradients(compiled)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) < 5e-4, name


@on_device
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("backend", BOTH)
def test_a_block_runs_on_it(backend: str, ways: list[str]) -> None:
    torch.manual_seed(0)
    block = MoEBlock(MoEConfig(16, 16, 4, RoutingRule(2), backend=backend)).to(DEVICE)
    block(torch.randn(9, 16, device=DEVICE)).sum().backward()
    assert len(ways) == 1


# The registry.


def theirs() -> object:
    return ALL_EXPERTS_FUNCTIONS["sonicmoe"]


def test_ours_replaces_theirs_and_unregistering_gives_it_back() -> None:
    assert theirs().func is experts.experts_forward  # type: ignore[attr-defined]
    expertune.register()
    expertune.register()
    assert theirs().expertune_original is sonicmoe_experts_forward  # type: ignore[attr-defined]
    expertune.unregister()
    try:
        assert theirs() is sonicmoe_experts_forward
        assert "sonicmoe_materialize" not in ALL_EXPERTS_FUNCTIONS.valid_keys()
        expertune.unregister()
        assert theirs() is sonicmoe_experts_forward
    finally:
        expertune.register()
    assert theirs().func is experts.experts_forward  # type: ignore[attr-defined]


def test_what_others_registered_since_stays() -> None:
    def somebodys() -> None: ...

    before = ALL_EXPERTS_FUNCTIONS["sonicmoe"]
    ALL_EXPERTS_FUNCTIONS.register("sonicmoe", somebodys)
    expertune.unregister()
    try:
        assert theirs() is somebodys
    finally:
        ALL_EXPERTS_FUNCTIONS.register("sonicmoe", before)
        expertune.register()


TWICE = """
import sys
import transformers.integrations.moe as moe
from transformers.integrations.sonicmoe import sonicmoe_experts_forward as theirs
import expertune
first = moe.ALL_EXPERTS_FUNCTIONS["sonicmoe"]
for name in [name for name in sys.modules if name.split(".")[0] == "expertune"]:
    del sys.modules[name]
import expertune
second = moe.ALL_EXPERTS_FUNCTIONS["sonicmoe"]
assert first is not second and second.func.__module__ == "expertune.integrations.experts"
assert second.expertune_original is theirs
expertune.unregister()
assert moe.ALL_EXPERTS_FUNCTIONS["sonicmoe"] is theirs
"""


def test_importing_it_twice_keeps_theirs() -> None:
    result = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# Refused where it cannot run, before anything is loaded.


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


WHY = r"experts_implementation='{}': .*needs an NVIDIA GPU of compute capability 9.x or newer \(Hopper\); this machine"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", BOTH)
def test_it_is_refused_before_anything_is_loaded(name: str) -> None:
    with pytest.raises(BackendError, match=WHY.format(name)):
        AutoModelForCausalLM.from_config(tiny_config(), experts_implementation=name)
    with pytest.raises(BackendError, match=WHY.format(name)):
        PreTrainedModel.from_pretrained("no/such-model", experts_implementation=name)
    model = tiny_model("eager", num_hidden_layers=1)
    with pytest.raises(BackendError, match=WHY.format(name)):
        model.set_experts_implementation(name)
