"""Whole models with adapters on scattermoe, against Transformers' eager experts and PEFT's own fold.

Without a GPU the kernels run in Triton's interpreter, and only the question whether the backend can run is answered for
them; with one, everything is as users have it.
"""

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import moe

from expertune.integrations import experts
from expertune.layers import running
from expertune.layers.moe_block import MoEBlock, MoEConfig
from expertune.ops import counting_sort, plan, triton_launch
from expertune.ops.experts.scattermoe import mlp, pieces, products, tiles
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.routing.types import RoutingRule
from tests.integrations.gradients import assert_equal, loss_and_gradients
from tests.integrations.test_architectures import MODELS, build
from tests.tiny import VOCAB, tiny_model, with_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def _it_can_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setattr(running, "unavailable_reason", lambda *_, **__: None)
    running._backend_for.cache_clear()
    yield
    running._backend_for.cache_clear()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_loss_and_gradients_equal_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in MODELS
    calls = []
    run = mlp.scattermoe_expert_mlp
    monkeypatch.setattr(mlp, "scattermoe_expert_mlp", lambda *a, **k: calls.append(1) or run(*a, **k))
    got = loss_and_gradients(with_adapter(build(name, "scattermoe")))
    assert calls, "the kernels did not run"
    assert_equal(got, loss_and_gradients(with_adapter(build(name, "eager"))))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is launched for plans and tables; on the CPU too plans are sorted by the kernels, which are interpreted."""
    names: list[str] = []

    def note(module: ModuleType, name: str) -> None:
        launch = getattr(module, name)

        def noted(*args: Any, **options: Any) -> None:
            if triton_launch._compiled_only.get() is None:
                names.append(name)
            launch(*args, **options)

        monkeypatch.setattr(module, name, noted)

    for module, name in ((counting_sort, "_count"), (counting_sort, "_place"), (tiles, "_row_tables")):
        note(module, name)
    if DEVICE == "cpu":
        monkeypatch.setattr(products, "build_plan", plan._by_counting)
    return names


@pytest.mark.parametrize("has_norm", [False, True])
def test_a_plan_and_its_tables_are_two_launches(has_norm: bool, launches: list[str]) -> None:
    """In the drop-in: one plan a layer serves both projections, forward and backward, also of a layer in pieces."""
    model = with_adapter(tiny_model("scattermoe", num_hidden_layers=1))
    for module in model.modules():
        if has_norm and hasattr(module, "gate_up_proj"):
            module.has_post_expert_norm, module.post_expert_norm = True, nn.RMSNorm(64)
    model.to(DEVICE)
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for _ in range(2):
        launches.clear()
        model(input_ids=ids, labels=ids).loss.backward()
    assert launches == ["_count", "_place"]


def test_a_plan_and_its_tables_are_two_launches_in_a_block(launches: list[str]) -> None:
    block = MoEBlock(MoEConfig(16, 16, 4, RoutingRule(2), backend="scattermoe")).to(DEVICE)
    for _ in range(2):
        launches.clear()
        block(torch.randn(9, 16, device=DEVICE)).sum().backward()
    assert launches == ["_count", "_place"]


def test_a_tuned_tile_decides_the_tables(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    tile, tables = LinearTile(32, 32, 32, 4, 2, descriptors=False), []
    run = mlp.scattermoe_expert_mlp
    monkeypatch.setattr(experts, "tuned_tile", lambda *_: tile)
    monkeypatch.setattr(mlp, "scattermoe_expert_mlp", lambda *a, **k: tables.append(a[2].tables) or run(*a, **k))
    loss_and_gradients(with_adapter(tiny_model("scattermoe", num_hidden_layers=1)))
    assert [each.tiles.block_rows for each in tables] == [32]
    assert launches.count("_place") == 1
    if DEVICE == "cpu":
        assert "_row_tables" not in launches


@pytest.mark.skipif(
    "post_expert_norm" not in inspect.getsource(moe), reason="this Transformers knows no norm after the experts"
)
def test_a_norm_between_the_experts_and_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = pieces.expert_linear
    monkeypatch.setattr(pieces, "expert_linear", lambda *a, **k: calls.append(1) or run(*a, **k))

    def with_norm(implementation: str) -> PreTrainedModel:
        model = tiny_model(implementation)
        for module in model.modules():
            if hasattr(module, "gate_up_proj"):
                module.has_post_expert_norm, module.post_expert_norm = True, nn.RMSNorm(64)
        return model

    got, want = (loss_and_gradients(with_adapter(with_norm(name))) for name in ("scattermoe", "grouped_mm"))
    assert calls, "the pieces did not run"
    assert_equal(got, want)


def test_it_generates_eagers_tokens() -> None:
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    tokens = [
        with_adapter(tiny_model(name)).to(DEVICE).generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        for name in ("eager", "scattermoe")
    ]
    assert torch.equal(*tokens)
