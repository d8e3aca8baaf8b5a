"""A checkpointed layer's tokens travel as they did in the forward: sizes and choices sent once, the same gradients."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expertune.distributed.collectives import Wire
from expertune.distributed.dispatch import ExpertShard, return_from_experts, send_to_experts
from expertune.distributed.mesh import EXPERT, join_mesh
from expertune.distributed.recompute import Recall
from expertune.distributed.sizes import ParallelSizes
from tests.distributed.processes import Crew

HIDDEN, EXPERTS, TOP_K = 16, 4, 2
TOKENS = ((5, 3, 4), (2, 6, 0))  # of each forward, by rank


@dataclass(frozen=True)
class Case:
    """reentrant: None without checkpointing. saves_behind: by layer, whether something behind its experts saves.

    forwards: before one backward; the second one's tokens are others. exchanges: of sizes, by layer, forward and back.
    """

    reentrant: bool | None
    exchanges: int
    saves_behind: tuple[bool, bool] = (False, False)
    forwards: int = 1


CASES = {
    "kept": Case(None, 1),
    "checkpointed": Case(False, 1),
    "reentrant": Case(True, 2),
    "something behind saves": Case(False, 2, (True, True)),
    "two forwards": Case(False, 2, forwards=2),
    "two forwards, kept": Case(None, 2, forwards=2),
    "two forwards, something behind saves": Case(False, 4, (True, True), forwards=2),
    "three forwards": Case(False, 3, forwards=3),
}


class Layer(nn.Module):
    """x + experts(x), of which each is a matrix; the router is one too. saves_behind: the experts' result squared."""

    def __init__(self, shard: ExpertShard, saves_behind: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.shard, self.saves_behind, self.forwards = shard, saves_behind, 0
        self.router = torch.randn(HIDDEN, EXPERTS, generator=generator)
        mine = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator)[shard.experts.start : shard.experts.stop]
        self.experts = nn.Parameter(mine / HIDDEN)

    def forward(self, x_TH: Tensor) -> Tensor:
        self.forwards += 1
        weights_TK, ids_TK = self.choose(x_TH)
        arrived = send_to_experts(x_TH, ids_TK, weights_TK, self.shard)
        matrices = torch.cat((self.experts, self.experts.new_zeros(1, HIDDEN, HIDDEN)))  # -1: zeros
        y_RKH = torch.einsum("rh,rkhj->rkj", arrived.x_RH, matrices[arrived.expert_ids_RK])
        y_TH = return_from_experts(torch.einsum("rkh,rk->rh", y_RKH, arrived.weights_RK), arrived)
        return x_TH + (y_TH * y_TH if self.saves_behind else y_TH)

    def choose(self, x_TH: Tensor) -> Any:
        return torch.topk(torch.softmax(x_TH @ self.router, -1), TOP_K, -1)


class Undecided(Layer):
    """Chooses by the clock."""

    def choose(self, x_TH: Tensor) -> Any:
        ids_TK = (torch.arange(len(x_TH))[:, None] + torch.arange(TOP_K) + self.forwards) % EXPERTS
        return torch.ones(ids_TK.shape), ids_TK


def run(case: Case, kind: type[Layer] = Layer) -> tuple[list[Tensor], int, list[Any]]:
    """(gradients, exchanges of sizes by layer, what recalls still hold) in one process of two."""
    mesh = join_mesh(ParallelSizes(expert=2), "cpu", timeout_s=30)
    rank, generator = mesh.index(EXPERT), torch.Generator().manual_seed(0)
    shards = [ExpertShard(mesh.wire(EXPERT, f"layer {n}"), rank, EXPERTS // 2) for n in range(2)]
    layers = [kind(shard, saves, generator) for shard, saves in zip(shards, case.saves_behind, strict=True)]
    inputs = [torch.randn(max(sizes), HIDDEN, generator=generator) for sizes in zip(*TOKENS, strict=True)]
    inputs = [x[:size].requires_grad_() for x, size in zip(inputs, TOKENS[rank], strict=True)][: case.forwards]
    with (
        patch.object(Wire, "exchange_counts", autospec=True, side_effect=Wire.exchange_counts) as exchanged,
        patch.object(Wire, "exchange_rows", autospec=True, side_effect=Wire.exchange_rows) as sent,
    ):
        loss = torch.zeros(())
        for x_TH in inputs:
            hidden_TH = x_TH
            for layer in layers:
                hidden_TH = (
                    layer(hidden_TH)
                    if case.reentrant is None
                    else checkpoint(layer, hidden_TH, use_reentrant=case.reentrant)
                )
            loss = loss + (hidden_TH**3).sum()
        loss.backward()
    grads = [each.grad for each in (*inputs, *(layer.experts for layer in layers))]
    assert exchanged.call_count % 2 == 0
    messages = Counter(call.args[-1] for call in sent.call_args_list)
    assert messages["sending expert ids and routing weights"] == exchanged.call_count, "with the sizes, and only then"
    assert messages["sending tokens"] == sum(layer.forwards for layer in layers)
    return [grad for grad in grads if grad is not None], exchanged.call_count // 2, [s.recall._left for s in shards]


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_exchanged_once_and_gradients_stay(name: str, two: Crew) -> None:
    case = CASES[name]
    kept = two.run(run, Case(None, 0, case.saves_behind, case.forwards))
    for (want, *_), (got, exchanges, left) in zip(kept, two.run(run, case), strict=True):
        assert len(got) == len(want) == case.forwards + 2
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        assert exchanges == case.exchanges
        assert left == [None, None], "a trip is kept after the backward"


def other_choices(_: None) -> str:
    with pytest.raises(RuntimeError) as caught:
        run(Case(False, 0), Undecided)
    return str(caught.value)


def test_a_recomputation_that_chooses_otherwise_is_an_error(two: Crew) -> None:
    assert two.run(other_choices, None) == ["recomputed tokens choose other experts"] * 2


class Unit(torch.autograd.Function):
    """x, and in its backward a call."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], x: Tensor) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.call()
        return None, grads[0]


def in_a_backward(*calls: Callable[[], None]) -> None:
    """Each of them, the first one first, in one backward."""
    x = torch.ones((), requires_grad=True)
    for call in reversed(calls):
        x = Unit.apply(call, x)
    x.backward()


def test_what_one_backward_left_is_not_anothers() -> None:
    recall: Recall[str] = Recall()
    found: list[str | None] = []
    in_a_backward(lambda: recall.leave("old"))
    in_a_backward(lambda: found.append(recall.take()))
    assert found == [None]
    in_a_backward(lambda: recall.leave("old"))
    assert recall.take() is None, "a forward"
    in_a_backward(lambda: recall.leave("new"), lambda: found.append(recall.take()), lambda: found.append(recall.take()))
    assert found == [None, "new", None]


def test_a_forward_that_ran_again_first_leaves_nothing() -> None:
    recall: Recall[str] = Recall()
    found: list[str | None] = []
    take: Callable[[], None] = lambda: found.append(recall.take())  # noqa: E731
    in_a_backward(take, lambda: recall.leave("first"), take, lambda: recall.leave("second"))
    assert found == [None, None]
    in_a_backward(take, lambda: recall.leave("first"), lambda: recall.leave("second"), take)
    assert found == [None, None, None, "second"]
