"""What the stand-ins allocate is what the code that they stand for allocates: the same bytes kept, the same peak."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from expertune.estimate.experts import CHUNK_ROWS, plan_on_paper, scattermoe_on_paper
from expertune.estimate.ledger import EXPERTS, Ledger
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.types import Activation, ExpertLora, ExpertProjection
from expertune.ops.plan import build_plan

pytest.importorskip("triton")


@dataclass(frozen=True)
class Sizes:
    """tokens, experts, per token, hidden, intermediate, rank (0: no adapter on the down projection)."""

    tokens: int = 300
    experts: int = 8
    top_k: int = 4
    hidden: int = 256
    intermediate: int = 192
    rank: int = 12
    adapter_dtype: torch.dtype = torch.float32
    adapt_down: bool = True


def geglu(h_SJ: Tensor) -> Tensor:
    gate, up = h_SJ.chunk(2, dim=-1)
    return F.gelu(gate) * up


def problem(sizes: Sizes) -> tuple[Tensor, Tensor, ExpertProjection, ExpertProjection]:
    """x, routing weights and both projections, stored as PEFT stores them (B with the expert fastest)."""

    def projection(num_out: int, num_in: int, adapted: bool) -> ExpertProjection:
        weight = torch.zeros(sizes.experts, num_out, num_in, dtype=torch.bfloat16)
        if not adapted:
            return ExpertProjection(weight)
        a = torch.zeros(sizes.experts, sizes.rank, num_in, dtype=sizes.adapter_dtype, requires_grad=True)
        b = torch.zeros(num_out, sizes.rank, sizes.experts, dtype=sizes.adapter_dtype, requires_grad=True)
        return ExpertProjection(weight, lora=ExpertLora(a, b.permute(2, 0, 1), 2.0))

    x = torch.zeros(sizes.tokens, sizes.hidden, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.zeros(sizes.tokens, sizes.top_k, requires_grad=True)
    up = projection(2 * sizes.intermediate, sizes.hidden, True)
    return x, weights, up, projection(sizes.hidden, sizes.intermediate, sizes.adapt_down)


def measure(run: Callable[[Ledger], Tensor]) -> tuple[int, int, int]:
    """Bytes alive after the forward, the peak, and bytes alive after the backward (the gradients)."""
    ledger = Ledger()
    with ledger:
        y = run(ledger)
        after_forward = sum(ledger.alive.values())
        y.backward(torch.empty_like(y))
        del y
    return after_forward, ledger.peak_bytes, sum(ledger.alive.values())


@pytest.mark.parametrize("on_hopper", [False, True], ids=["anywhere", "on Hopper"])
@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        (Sizes(), SWIGLU),
        (Sizes(rank=64), SWIGLU),
        (Sizes(rank=65), SWIGLU),
        (Sizes(), geglu),
        (Sizes(rank=16, adapter_dtype=torch.bfloat16), SWIGLU),
        (Sizes(tokens=64), SWIGLU),  # no expert has more rows than a chunk: no room for parts
        (Sizes(adapt_down=False), SWIGLU),
    ],
)
def test_scattermoe_on_paper_allocates_what_scattermoe_does(
    monkeypatch: pytest.MonkeyPatch, sizes: Sizes, activation: Activation, on_hopper: bool
) -> None:
    from expertune.ops.experts.scattermoe import gate_hopper
    from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
    from expertune.ops.triton_launch import Launcher

    monkeypatch.setattr(Launcher, "__call__", lambda *_, **__: None)  # the host's side alone: what it allocates
    monkeypatch.setattr(gate_hopper, "is_hopper", lambda _: on_hopper)
    x, weights, up, down = problem(sizes)
    ids = torch.zeros(sizes.tokens, sizes.top_k, dtype=torch.int64)
    plan = build_plan(ids, sizes.experts)
    real = measure(lambda _: scattermoe_expert_mlp(x, weights, plan, up, down, activation))
    with FakeTensorMode():
        x, weights, up, down = problem(sizes)
        run = partial(scattermoe_on_paper, on_hopper=on_hopper)
        fake_plan = plan_on_paper(sizes.tokens, sizes.top_k, sizes.experts, x.device)
        paper = measure(lambda ledger: run(ledger, x, weights, fake_plan, up, down, activation))
    assert paper[::2] == real[::2]
    assert 0 <= real[1] - paper[1] <= 4096, "the peak, but for the counters of the sums' programs"
    assert real[1] > real[0] > 0


def test_the_rows_of_a_chunk_are_the_kernels() -> None:
    from expertune.ops.experts.scattermoe import tiles

    assert CHUNK_ROWS == tiles.CHUNK_ROWS


def test_the_one_pass_is_the_kernels() -> None:
    from expertune.estimate import experts
    from expertune.ops.experts.scattermoe import gate_hopper

    assert experts.fits_one_pass is gate_hopper.fits_one_pass
    assert experts.pick_backward_tile is gate_hopper.pick_backward_tile
    assert [gate_hopper.pick_backward_tile(rank).columns for rank in (16, 64)] == [128, 64]
    h_SJ = torch.empty(1, 32, dtype=torch.bfloat16)
    assert [gate_hopper.fits_one_pass(h_SJ, rank) for rank in (64, 128)] == [True, False]


def test_what_outlives_the_experts_is_no_workspace_of_theirs() -> None:
    sizes = Sizes()
    with FakeTensorMode():
        x, weights, up, down = problem(sizes)
        plan = plan_on_paper(sizes.tokens, sizes.top_k, sizes.experts, x.device)
        ledger = Ledger()
        with ledger:
            y = scattermoe_on_paper(ledger, x, weights, plan, up, down, SWIGLU)
        assert ledger.alive[EXPERTS] == 0
        assert any(moment.get(EXPERTS, 0) > 0 for moment in ledger.moments)
        del y
