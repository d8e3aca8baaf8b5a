"""A PEFT model on our backends is the same model: losses, gradients, merging, disabling, several adapters, saving."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

import expertune
from tests.comparing import relative_error
from tests.tiny import VOCAB, randomize_lora_b, tiny_model, with_adapter

OURS = ["expertune", "torch_grouped"]
TOLERANCE = 2e-5  # fp32, two layers, relative


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, VOCAB, (3, 19), generator=torch.Generator().manual_seed(7))


def loss_and_grads(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert relative_error(got[0], want[0]) < TOLERANCE
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert relative_error(got[1][name], gradient) < TOLERANCE, name


ADAPTERS = {
    "attention and experts": {},
    "experts only": {"target_modules": []},
    "gate_up only": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "down only": {"target_parameters": ["mlp.experts.down_proj"]},
    "attention only": {"target_parameters": None},
    "rsLoRA": {"use_rslora": True},
    "rank 1": {"r": 1},
    "with the router": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 1}},
}


@pytest.mark.parametrize("implementation", OURS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_same_loss_and_gradients_as_pefts_own_fold(name: str, implementation: str, ids: Tensor) -> None:
    want = loss_and_grads(with_adapter(tiny_model("eager"), **ADAPTERS[name]), ids)
    got = loss_and_grads(with_adapter(tiny_model(implementation), **ADAPTERS[name]), ids)
    assert_same(got, want)


def test_full_fine_tuning_gets_the_gradients_of_the_base(ids: Tensor) -> None:
    want = loss_and_grads(tiny_model("eager"), ids)
    assert any("experts" in name for name in want[1])
    assert_same(loss_and_grads(tiny_model("expertune"), ids), want)


def test_the_weights_are_not_folded(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(tiny_model("expertune"))

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a weight was parametrised, so W + s B A was formed")

    monkeypatch.setattr(parametrize, "register_parametrization", refuse)
    loss_and_grads(model, ids)
    with pytest.raises(AssertionError, match="parametrised"):  # the canary: PEFT's own way does go through here
        loss_and_grads(with_adapter(tiny_model("eager")), ids)


def test_frozen_base_weights_get_no_gradient(ids: Tensor) -> None:
    model = with_adapter(tiny_model("expertune"))
    _, grads = loss_and_grads(model, ids)
    assert grads
    assert all(".lora_" in name for name in grads)


def test_disabling_merging_and_unmerging(ids: Tensor) -> None:
    base = tiny_model("expertune")(input_ids=ids).logits
    model = with_adapter(tiny_model("expertune"))
    adapted = model(input_ids=ids).logits
    assert relative_error(adapted, base) > 0.05
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base)
    model.merge_adapter()
    assert relative_error(model(input_ids=ids).logits, adapted) < TOLERANCE
    model.unmerge_adapter()
    assert relative_error(model(input_ids=ids).logits, adapted) < TOLERANCE
    merged = model.merge_and_unload()
    assert relative_error(merged(input_ids=ids).logits, adapted) < TOLERANCE


def test_two_adapters_at_once_and_switching(ids: Tensor) -> None:
    def build(implementation: str) -> PeftModel:
        model = with_adapter(tiny_model(implementation))
        config = model.peft_config["default"]
        second = LoraConfig(
            r=2, lora_alpha=3, target_modules=config.target_modules, target_parameters=config.target_parameters
        )
        model.add_adapter("second", second)
        randomize_lora_b(model, seed=5)
        return model

    ours, pefts = build("expertune"), build("eager")
    for active in (["default"], ["second"], ["default", "second"]):
        ours.base_model.set_adapter(active)
        pefts.base_model.set_adapter(active)
        assert_same(loss_and_grads(ours, ids), loss_and_grads(pefts, ids))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, ids: Tensor) -> None:
    want = loss_and_grads(with_adapter(tiny_model("expertune")), ids)
    model = with_adapter(tiny_model("expertune"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_same(loss_and_grads(model, ids), want)


def test_greedy_generation_gives_eagers_tokens(ids: Tensor) -> None:
    tokens = [
        with_adapter(tiny_model(implementation)).generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        for implementation in ("eager", "expertune")
    ]
    assert torch.equal(*tokens)


def test_a_saved_adapter_loads_without_expertune(ids: Tensor, tmp_path: Path) -> None:
    model = with_adapter(tiny_model("expertune"))
    base = tmp_path / "base"
    tiny_model("eager").save_pretrained(base)
    model.save_pretrained(tmp_path / "adapter")
    torch.save((ids, model(input_ids=ids).logits), tmp_path / "expected.pt")
    program = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(base)!r}), {str(tmp_path / "adapter")!r})
ids, want = torch.load({str(tmp_path / "expected.pt")!r})
assert "expertune" not in sys.modules
got = model(input_ids=ids).logits
assert ((got - want).norm() / want.norm()).item() < {TOLERANCE}
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)


def test_what_is_not_a_projection_goes_to_pefts_fold_with_one_warning(ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig

    def build(implementation: str) -> PeftModel:
        torch.manual_seed(0)
        config = GptOssConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=64,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, std=0.1)
        return with_adapter(model, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"])

    want = loss_and_grads(build("eager"), ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = loss_and_grads(build("expertune"), ids)
    assert_same(got, want)
    messages = [str(w.message) for w in caught if "expertune leaves an adapter" in str(w.message)]
    assert len(messages) == 1
    assert "gate_up_proj_bias is not one of the projections" in messages[0]


def test_other_implementations_are_left_alone(ids: Tensor) -> None:
    with_ours = loss_and_grads(with_adapter(tiny_model("grouped_mm")), ids)
    expertune.unregister()
    try:
        without = loss_and_grads(with_adapter(tiny_model("grouped_mm")), ids)
        with pytest.raises(ValueError, match="expertune"):
            tiny_model("expertune")
    finally:
        expertune.register()
    assert torch.equal(with_ours[0], without[0])
    assert all(torch.equal(with_ours[1][name], without[1][name]) for name in without[1])
    expertune.register()  # again does no harm
    loss_and_grads(with_adapter(tiny_model("expertune")), ids)
