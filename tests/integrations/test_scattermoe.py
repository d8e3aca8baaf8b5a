"""Whole models with adapters on scattermoe, against Transformers' eager experts and PEFT's own fold.

Without a GPU the kernels run in Triton's interpreter, and only the question whether the backend can run is answered for
them; with one, everything is as users have it.
"""

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import moe

from expertune.layers import running
from expertune.ops.experts.scattermoe import mlp, pieces
from tests.comparing import relative_error
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


def loss_and_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model = with_adapter(model).to(DEVICE)
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach().cpu(), **grads}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert any("experts" in key for key in want)
    for key, value in want.items():
        assert relative_error(got[key], value) < (5e-6 if key == "loss" else 1e-4), key


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_loss_and_gradients_equal_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in MODELS
    calls = []
    run = mlp.scattermoe_expert_mlp
    monkeypatch.setattr(mlp, "scattermoe_expert_mlp", lambda *a, **k: calls.append(1) or run(*a, **k))
    got = loss_and_gradients(build(name, "scattermoe"))
    assert calls, "the kernels did not run"
    assert_equal(got, loss_and_gradients(build(name, "eager")))


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

    got, want = loss_and_gradients(with_norm("scattermoe")), loss_and_gradients(with_norm("grouped_mm"))
    assert calls, "the pieces did not run"
    assert_equal(got, want)


def test_it_generates_eagers_tokens() -> None:
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    tokens = [
        with_adapter(tiny_model(name)).to(DEVICE).generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        for name in ("eager", "scattermoe")
    ]
    assert torch.equal(*tokens)
