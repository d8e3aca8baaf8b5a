"""Drop-in: others are untouched; registration, threads, checkpointing, autocast, compile, generation, trainers."""

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

import expertune
from expertune.integrations import experts
from expertune.layers import running
from tests.comparing import relative_error
from tests.integrations.test_adapter_shapes import BOTH, GRADIENT, OUTPUT, ROUTER, assert_same, everything
from tests.tiny import VOCAB, tiny_model, with_adapter

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_moe" / "model"


def adapted(implementation: str, *, seed: int = 1, **sizes: Any) -> PeftModel:
    """Adapters on attention, experts and router."""
    return with_adapter(tiny_model(implementation, **sizes), seed=seed, target_parameters=[*BOTH, ROUTER])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (3, 19), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def tokens_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens in each call of our experts that came with both adapters unfolded."""
    calls: list[int] = []
    run = experts.run_expert_mlp

    def noting(
        backend: Any, x: Tensor, weights: Any, plan: Any, up: Any, down: Any, *rest: Any, **options: Any
    ) -> Tensor:
        if up.lora and down.lora:
            calls.append(x.shape[0])
        return run(backend, x, weights, plan, up, down, *rest, **options)

    monkeypatch.setattr(experts, "run_expert_mlp", noting)
    return calls


# Registration.


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of indexed rows have the same bits in each run only on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_other_implementations_have_the_same_bits_with_and_without_us(ids: Tensor, tokens_of_calls: list[int]) -> None:
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        with_us = everything(adapted(implementation), ids)
        expertune.unregister()
        try:
            without = everything(adapted(implementation), ids)
        finally:
            expertune.register()
        assert with_us.keys() == without.keys()
        assert all(torch.equal(with_us[key], value) for key, value in without.items()), implementation
    assert not tokens_of_calls


def test_registering_from_many_threads_hooks_once_and_is_undone_at_once() -> None:
    expertune.unregister()
    originals = ParamWrapper._activate_lora, BaseTuner.inject_adapter
    assert not any(hasattr(method, "expertune_original") for method in originals)
    barrier = threading.Barrier(8)

    def register() -> None:
        barrier.wait()
        for _ in range(20):
            expertune.register()

    try:
        threads = [threading.Thread(target=register) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hooked = ParamWrapper._activate_lora, BaseTuner.inject_adapter
        assert tuple(method.expertune_original for method in hooked) == originals
        expertune.unregister()
        assert (ParamWrapper._activate_lora, BaseTuner.inject_adapter) == originals
    finally:
        expertune.register()


def test_an_adapted_model_outlives_unregistering(ids: Tensor) -> None:
    model = adapted("eager")
    want = everything(model, ids)
    expertune.unregister()
    try:
        assert_same(everything(model, ids), want)
    finally:
        expertune.register()
    model.get_base_model().set_experts_implementation("expertune")
    assert_same(everything(model, ids), want)


def test_another_instance_of_the_registry_knows_us(ids: Tensor, tokens_of_calls: list[int]) -> None:
    """Modules that made an ExpertsInterface of their own, before or after us."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    other = ExpertsInterface()
    assert other is not ALL_EXPERTS_FUNCTIONS
    assert {"expertune", "torch_grouped"} <= set(other.valid_keys())
    model = adapted("expertune")
    want = everything(model, ids)
    tokens_of_calls.clear()

    def forward(self: nn.Module, *args: Any) -> Tensor:
        return other.get_interface(self.config._experts_implementation, None)(self, *args)

    for layer in model.get_base_model().model.layers:
        module = layer.mlp.experts.get_base_layer()
        assert isinstance(module, Qwen3MoeExperts)
        module.forward = forward.__get__(module)
    assert_same(everything(model, ids), want)
    assert len(tokens_of_calls) == 2


SECOND_COPY = """
import sys, torch, expertune
from tests.tiny import tiny_model, with_adapter
ids = torch.arange(3, 21).view(2, 9)
model = with_adapter(tiny_model("expertune"))
want = model(input_ids=ids).logits
eager = with_adapter(tiny_model("eager"))(input_ids=ids).logits
for name in [name for name in sys.modules if name.split(".")[0] == "expertune"]:
    del sys.modules[name]
import expertune as second
assert second is not expertune
for text, change in (("beside", None), ("first registers again", expertune.register), ("second", second.register)):
    if change: change()
    got = model(input_ids=ids).logits
    assert torch.equal(got, want), text
second.unregister()
from peft.tuners.lora.layer import ParamWrapper
assert not hasattr(ParamWrapper._activate_lora, "expertune_original")
"""


def test_a_second_copy_of_expertune_takes_over() -> None:
    """Its modules imported afresh (a test runner, a notebook): adapters and experts meet in one of the two copies."""
    done = subprocess.run([sys.executable, "-c", SECOND_COPY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def run(index: int) -> None:
        barrier.wait()
        results[index] = functions[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_models_in_two_threads(ids: Tensor) -> None:
    models = [adapted("expertune", seed=1), adapted("expertune", seed=2)]
    want = [everything(model, ids) for model in models]
    assert relative_error(want[0]["logits"], want[1]["logits"]) > 0.05

    def train(index: int) -> Callable[[], list[dict[str, Tensor]]]:
        return lambda: [everything(models[index], ids) for _ in range(10)]

    for index, results in enumerate(in_threads(train(0), train(1))):
        for result in results:
            assert all(torch.equal(result[key], value) for key, value in want[index].items())


def test_one_model_in_two_threads(ids: Tensor) -> None:
    """Which PEFT's fold cannot do: it replaces the module's parameter while it runs."""
    model = adapted("expertune").eval()
    batches = [ids, ids.flip(1)]
    want = [model(input_ids=batch).logits for batch in batches]

    def infer(batch: Tensor) -> Callable[[], list[Tensor]]:
        return lambda: [model(input_ids=batch).logits for _ in range(10)]

    for expected, results in zip(want, in_threads(*map(infer, batches)), strict=True):
        assert all(torch.equal(result, expected) for result in results)


# What a forward may be wrapped in.


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, ids: Tensor, tokens_of_calls: list[int]) -> None:
    want = everything(adapted("eager"), ids)
    model = adapted("expertune")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_same(everything(model, ids), want)
    assert tokens_of_calls == [ids.numel()] * 4  # two layers, each forward twice


def test_autocast_is_as_close_to_fp32_as_pefts_fold(ids: Tensor, tokens_of_calls: list[int]) -> None:
    """One layer, and the routing fixed by a router that is sure: otherwise rounding sends tokens elsewhere."""

    def run(implementation: str, lowered: bool) -> dict[str, Tensor]:
        model = adapted(implementation, num_hidden_layers=1)
        model.get_base_model().model.layers[0].mlp.gate.get_base_layer().weight.data *= 50
        with torch.autocast("cpu", torch.bfloat16) if lowered else nullcontext():
            return everything(model, ids)

    truth, pefts, ours = run("eager", False), run("eager", True), run("expertune", True)
    assert tokens_of_calls == [ids.numel()]
    assert ours.keys() == pefts.keys() == truth.keys()
    for key, value in truth.items():
        assert ours[key].dtype == pefts[key].dtype, key
        assert relative_error(ours[key], value) <= max(1.5 * relative_error(pefts[key], value), 1e-2), key


def test_torch_compile(ids: Tensor, tokens_of_calls: list[int]) -> None:
    """A layer: torch_grouped runs between its graphs; attention and the router's second linear are traced."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = adapted("expertune", num_hidden_layers=1)
    want = everything(model, ids)
    model.get_base_model().model.layers[0].compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(everything(model, ids), want)
    assert tokens_of_calls == [ids.numel()] * 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    assert breaks
    assert all("expertune's torch_grouped runs outside of the graphs of torch.compile" in text for text in breaks)


@pytest.fixture
def kernels_can_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In Triton's interpreter, where there is no GPU."""
    monkeypatch.setattr(running, "unavailable_reason", lambda *_, **__: None)
    running._backend_for.cache_clear()
    yield
    running._backend_for.cache_clear()


@pytest.mark.usefixtures("kernels_can_run")
@pytest.mark.gpu
def test_the_kernels_are_part_of_one_graph_on_a_gpu() -> None:
    one_graph("cuda")


@pytest.mark.usefixtures("kernels_can_run")
def test_the_kernels_are_part_of_one_graph() -> None:
    if torch.cuda.is_available():
        pytest.skip("compiled kernels do not run on the CPU")
    one_graph("cpu")


def one_graph(device: str) -> None:
    """fullgraph=True over a whole adapted model, forward and backward, with scattermoe's kernels in it."""
    torch.compiler.reset()
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(7)).to(device)
    model = adapted("scattermoe", num_hidden_layers=1, num_experts=4).to(device)
    want = everything(model, ids)
    torch._dynamo.utils.counters.clear()
    inner = model.get_base_model()
    graph = torch.compile(inner, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.zero_grad()
        output = graph(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    tolerance = 1 if device == "cpu" else 10
    assert relative_error(output.logits, want["logits"]) < OUTPUT * tolerance
    assert grads.keys() == want.keys() - {"logits", "loss"}
    for name, gradient in grads.items():
        assert relative_error(gradient, want[name]) < GRADIENT * tolerance, name


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=["cache", "no cache", "beams"])
def test_greedy_generation_gives_eagers_tokens(
    options: dict[str, Any], ids: Tensor, tokens_of_calls: list[int]
) -> None:
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    settings = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, **options}
    want = adapted("eager").generate(input_ids=ids, **settings)
    got = adapted("expertune").generate(input_ids=ids, **settings)
    assert got.shape[1] == ids.shape[1] + 10
    assert torch.equal(got, want)
    rows = len(ids) * options.get("num_beams", 1)
    length = ids.shape[1]
    cached = [length, *[1] * 9]
    expected = cached if options.get("use_cache", True) else [length + done for done in range(10)]
    assert tokens_of_calls == [rows * each for each in expected for _ in range(2)]


# Trainers.


def three_steps(trainer_of: Callable[[PeftModel], Trainer], implementation: str, vocab: int) -> list[float]:
    trainer = trainer_of(
        adapted(implementation, vocab_size=vocab, hidden_size=32, head_dim=16, moe_intermediate_size=16)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_trains_alike(
    trainer_of: Callable[[PeftModel], Trainer], tokens_of_calls: list[int], vocab: int = VOCAB
) -> None:
    want = three_steps(trainer_of, "eager", vocab)
    assert not tokens_of_calls
    got = three_steps(trainer_of, "expertune", vocab)
    assert len(got) == len(want) == 3
    assert len(set(want)) == 3, "the losses do not move"
    assert got == pytest.approx(want, rel=2e-4)
    assert len(tokens_of_calls) >= 3 * 2


ARGUMENTS: dict[str, Any] = {
    "max_steps": 3, "learning_rate": 5e-3, "logging_steps": 1, "per_device_train_batch_size": 2, "report_to": [],
    "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_nan_inf_filter": False,
}  # fmt: skip


def test_trainer(tmp_path: Path, tokens_of_calls: list[int]) -> None:
    rows = torch.randint(3, VOCAB, (8, 12), generator=torch.Generator().manual_seed(1)).tolist()
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
    assert_trains_alike(lambda model: Trainer(model, arguments, train_dataset=dataset), tokens_of_calls)


def test_sft_trainer(tmp_path: Path, tokens_of_calls: list[int]) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    texts = [f"def f{index}(x):\n    return x + {index}\n" for index in range(8)]
    arguments = SFTConfig(output_dir=str(tmp_path), max_length=32, packing=True, **ARGUMENTS)

    def trainer(model: PeftModel) -> Trainer:
        dataset = Dataset.from_dict({"text": texts})
        return SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)

    assert_trains_alike(trainer, tokens_of_calls, len(tokenizer))


def test_dpo_trainer(tmp_path: Path, tokens_of_calls: list[int]) -> None:
    """Its reference is the same model without the adapter, or with a copy of it: both are switched in each step."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    numbers = range(8)
    columns = {
        "prompt": [f"def f{index}(x):\n" for index in numbers],
        "chosen": [f"    return x + {index}\n" for index in numbers],
        "rejected": ["    pass\n" for _ in numbers],
    }
    arguments = DPOConfig(output_dir=str(tmp_path), max_length=48, **ARGUMENTS)

    def trainer(model: PeftModel) -> Trainer:
        return DPOTrainer(model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)

    assert_trains_alike(trainer, tokens_of_calls, len(tokenizer))
