"""A step on paper beside a real one on the CPU: what autograd saves, and what is alive at the peak."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertune.estimate.experts import rows_that_travel
from expertune.estimate.ledger import EXCHANGE, EXPERT_GRADIENTS, EXPERTS, KEPT, OTHER_GRADIENTS, Ledger, rounded
from expertune.estimate.model import adapt_on_meta, count
from expertune.estimate.step import Paper, Step
from expertune.layers.backends import TORCH_GROUPED
from expertune.train.model import add_adapter
from tests.estimate.settings import config_of
from tests.tiny import tiny_config

BATCH, LENGTH = 2, 48
STEP = Step(BATCH, LENGTH, torch.float32, backend=TORCH_GROUPED, balance_coefficient=0.0)


def paper_of(folder: Path, **changes: Any) -> Paper:
    model_config = tiny_config()
    return Paper(adapt_on_meta(model_config, config_of(folder, model_config, bf16=False, **changes)))


@contextmanager
def saved_bytes(ignored: list[Tensor]) -> Iterator[dict[int, int]]:
    """The bytes of every storage that autograd saves, by address, but for those of `ignored`."""
    there = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            sizes[storage.data_ptr()] = rounded(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def real_model(folder: Path, dtype: torch.dtype) -> PeftModel:
    config = config_of(folder, tiny_config(), bf16=dtype == torch.bfloat16)
    bare = AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype, experts_implementation="torch_grouped")
    model = add_adapter(bare, config)
    model.train()
    return model


def real_loss(model: PeftModel, dtype: torch.dtype) -> Tensor:
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    with torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else nullcontext():
        return model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state.sum()


@pytest.fixture
def plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of the hidden states: on the CPU TRL's LM head allocates other things than on a GPU."""
    monkeypatch.setattr("expertune.estimate.step.fused_loss_on_paper", lambda _, hidden, __: hidden.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_activations_are_what_autograd_saves(
    tmp_path: Path, plain_loss: None, dtype: torch.dtype, checkpointing: bool
) -> None:
    model = real_model(tmp_path, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    with Ledger() as ledger, saved_bytes([*model.parameters(), *model.buffers()]) as sizes:
        loss = real_loss(model, dtype)
        alive = ledger.alive[KEPT]
    model_config = tiny_config()
    config = config_of(tmp_path, model_config, bf16=dtype == torch.bfloat16)
    paper = Paper(adapt_on_meta(model_config, config))
    course = paper.run(replace(STEP, dtype=dtype, checkpointing=checkpointing))
    kept, saved = course.after_forward[KEPT], sum(sizes.values())
    small = rounded(loss.nbytes) + 5 * rounded(BATCH * LENGTH * 8)  # die with the inputs: ids, positions
    assert abs(kept - alive) <= small
    if checkpointing:  # torch's hooks do not see what a checkpoint holds to run again
        saved += rounded(BATCH * LENGTH * 64 * dtype.itemsize)
    assert saved <= kept <= saved + small + 2 * rounded(LENGTH * 32 * 4)  # sines of the positions: alive, seldom saved
    assert saved > 4 * small


def test_the_peak_is_that_of_a_real_step(tmp_path: Path, plain_loss: None) -> None:
    model = real_model(tmp_path, torch.float32)
    with Ledger() as ledger:
        loss = real_loss(model, torch.float32)
        ledger.in_backward = True
        loss.backward()
    course = paper_of(tmp_path).run(STEP)
    assert sum(course.peak.values()) == pytest.approx(ledger.peak_bytes, rel=0.01)


def test_gradients_are_those_of_the_adapters(tmp_path: Path) -> None:
    paper = paper_of(tmp_path)
    model = count(paper.model)
    last = dict.fromkeys((EXPERT_GRADIENTS, OTHER_GRADIENTS), 0)
    for moment in paper.run(STEP).moments:
        last = {kind: max(size, moment.get(kind, 0)) for kind, size in last.items()}
    assert last == {EXPERT_GRADIENTS: model.expert_adapters, OTHER_GRADIENTS: model.other_adapters}


def test_checkpointing_keeps_less_and_computes_a_layer_again(tmp_path: Path, plain_loss: None) -> None:
    paper = paper_of(tmp_path)
    plain, checkpointed = paper.run(STEP), paper.run(replace(STEP, checkpointing=True))
    assert checkpointed.after_forward[KEPT] < plain.after_forward[KEPT] / 3
    assert "activations computed again" in {kind for moment in checkpointed.moments for kind in moment}
    assert "activations computed again" not in {kind for moment in plain.moments for kind in moment}
    assert paper.run(STEP) == plain, "a run leaves nothing behind"


def test_accumulated_gradients_are_there_while_the_next_forward_runs(tmp_path: Path) -> None:
    paper = paper_of(tmp_path)
    model = count(paper.model)
    course = paper.run(replace(STEP, accumulates=True))
    assert course.after_forward[EXPERT_GRADIENTS] == model.expert_adapters
    assert EXPERT_GRADIENTS not in paper.run(STEP).after_forward


def test_masks_cost_where_attention_has_one(tmp_path: Path) -> None:
    paper = paper_of(tmp_path)
    full, padded, packed = (paper.run(replace(STEP, rows=rows)) for rows in ("full", "padded", "packed"))
    mask = BATCH * LENGTH * LENGTH
    assert padded.after_forward[KEPT] - full.after_forward[KEPT] > 2 * 4 * mask, "an fp32 bias for each of two layers"
    assert packed.after_forward[KEPT] > padded.after_forward[KEPT], "one row of all tokens: a mask of their square"


def test_expert_parallelism_keeps_the_rows_that_came_in(tmp_path: Path) -> None:
    paper = paper_of(tmp_path)
    alone, together = paper.run(STEP), paper.run(replace(STEP, expert_parallel=4))
    num_rows = rows_that_travel(BATCH * LENGTH, 2, 8, 4)
    assert together.after_forward[EXCHANGE] == 2 * (rounded(num_rows * 64 * 4) + rounded(num_rows * 2 * 4)), (
        "x, weights"
    )
    assert EXCHANGE not in alone.after_forward


def test_a_token_travels_once_to_each_process() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(20_000, 128, generator=generator).topk(8).indices
    for processes in (1, 2, 8, 64):
        owners = (ids * processes // 128).sort(dim=1).values
        distinct = 1 + (owners[:, 1:] != owners[:, :-1]).sum(dim=1)
        assert rows_that_travel(20_000, 8, 128, processes) == pytest.approx(int(distinct.sum()), rel=0.01)


def test_the_routers_loss_keeps_their_logits(tmp_path: Path) -> None:
    paper = paper_of(tmp_path)
    without, balanced = paper.run(STEP), paper.run(replace(STEP, balance_coefficient=0.01))
    assert sum(balanced.after_forward.values()) > sum(without.after_forward.values())


def test_scattermoe_is_the_backend_on_a_gpu(tmp_path: Path) -> None:
    course = paper_of(tmp_path).run(Step(BATCH, LENGTH, torch.float32))
    assert any(moment.get(EXPERTS, 0) > 0 for moment in course.moments)
