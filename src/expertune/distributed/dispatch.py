"""Tokens to the processes that own their experts, and the results back: two all-to-alls with autograd.

Experts are dealt out in blocks: of N processes, number n owns experts n E/N to (n + 1) E/N - 1. With p the routing
weights of token t and e its experts:

    y_t = sum over n of  [ sum over the k with e_tk on process n of  p_tk expert(e_tk, x_t) ]

The inner sum is what the local backend computes anyway. So a token travels once to each process that has any of its
experts, not once for each expert (K = 8 of 128 experts on 2 processes: 2 rows, not 8), with its K expert ids (local;
-1, a sentinel, where another process has that expert) and its K routing weights; and one partial sum comes back.
No token is dropped and no buffer is padded: the sizes are exchanged first, which the host waits for (`recompute` has
them from the forward).

Backward is the mirror image: dy goes out as x did and dx and dp come back, each once for each process of a token.
Partial sums are added in fp32 and in process order, so a run repeats bit for bit.

Here the rows travel by the process group's all-to-all; `deep_ep.py` has another transport with the same two operations.

4 tokens, 4 experts, 2 processes, K = 2; process 0 has tokens 0 and 1:
    token 0: experts 0 1     goes to process 0 with ids 0 1
    token 1: experts 1 3     goes to process 0 with ids 1 -1 and to process 1 with ids -1 1
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.distributed.collectives import Wire
from expertune.distributed.recompute import Recall
from expertune.ops.destinations import find_destinations
from expertune.ops.plan import ExpertPlan, has_triton


class Trip(Protocol):
    """Tokens of this process that are away at their experts, and those that came here."""

    @property
    def num_pairs(self) -> int:
        """(token, expert) pairs that arrived here."""

    def bring_home(self, y_RH: Tensor) -> Tensor:
        """`return_from_experts`, by the way that the tokens came."""


class Transport(Protocol):
    """What carries rows between the processes that share a layer's experts. One serves all layers."""

    def send(self, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, shard: "ExpertShard") -> "Arrived":
        """`send_to_experts`."""

    def close(self) -> None:
        """Give back what it holds. Every process must call it; nothing is sent afterwards."""


@dataclass(frozen=True)
class AllToAll:
    """The all-to-all of the process group's own library, NCCL or gloo: any dtype, over any number of machines."""

    def send(self, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, shard: "ExpertShard") -> "Arrived":
        """See `send_to_experts`."""
        trip = shard.recall.take()
        if trip is None:
            trip = _plan_trip(expert_ids_TK, shard)
        else:
            torch._assert_async((expert_ids_TK == trip.expert_ids_TK).all(), "recomputed tokens choose other experts")
            if shard.meanwhile is not None:
                shard.meanwhile()
        x_RH, weights_RK, ids_RK = _ToExperts.apply(trip, x_TH, weights_TK)
        return Arrived(trip, x_RH, ids_RK, weights_RK)

    def close(self) -> None:
        """It holds nothing."""


@dataclass(frozen=True)
class ExpertShard:
    """The experts of one layer that this process owns.

    wire: the processes that share the layer's experts. index: this one's place among them. num_local: experts each.
    transport: what carries the tokens.
    meanwhile: what a transport calls in each forward where the host would only wait for the other processes.
    recall: what a recomputation of the layer knows from its forward.
    """

    wire: Wire
    index: int
    num_local: int
    transport: Transport = AllToAll()
    meanwhile: Callable[[], None] | None = None
    recall: "Recall[_AllToAllTrip]" = field(default_factory=Recall, compare=False)

    @property
    def experts(self) -> range:
        """The ids of this process's experts in the whole layer."""
        return range(self.index * self.num_local, (self.index + 1) * self.num_local)

    @property
    def num_experts(self) -> int:
        """Of the whole layer."""
        return self.wire.size * self.num_local


@dataclass(frozen=True)
class Arrived:
    """The rows that reached this process, for its own experts.

    x_RH: [R, H]. expert_ids_RK: [R, K] int64, ids of this process's experts, -1 where another process has the expert.
    weights_RK: [R, K], the routing weights; those of sentinels count for nothing.
    """

    trip: Trip
    x_RH: Tensor
    expert_ids_RK: Tensor
    weights_RK: Tensor


def send_to_experts(x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, shard: ExpertShard) -> Arrived:
    """Send each token to the processes that own its experts.

    x_TH: [T, H]. expert_ids_TK: [T, K] integer, ids in the whole layer. weights_TK: [T, K]. T may be 0, on any process.
    Every process of the group must call it. Gradients flow to x and to the weights.
    Raises CollectiveError if a process does not take part in time, ValueError for an id that no process owns.
    """
    return shard.transport.send(x_TH, expert_ids_TK, weights_TK, shard)


def return_from_experts(y_RH: Tensor, arrived: Arrived) -> Tensor:
    """Send the experts' results [R, H] home and add up those of each token: [T, H] in the dtype of `y_RH`."""
    return arrived.trip.bring_home(y_RH)


@dataclass
class _AllToAllTrip:
    """Which tokens of this process go where, and how many rows come from where.

    expert_ids_TK: what the tokens chose. ids_PK: int32, local expert ids of each row that is sent, -1 where another
    process has the expert.
    token_of_row_P: [P] int64, the token of each row that is sent, by destination, then by token.
    sums: T tokens of up to N rows each, one for each process, as a plan with processes in the place of experts' slots.
    send, receive: rows to and from each process. num_pairs: (token, expert) pairs that arrive here.
    choices: ids [R, K] and weights [R, K] of the rows that arrived, once they have: a recomputation has the same.
    """

    wire: Wire
    recall: "Recall[_AllToAllTrip]"
    expert_ids_TK: Tensor
    ids_PK: Tensor
    token_of_row_P: Tensor
    sums: ExpertPlan
    send: tuple[int, ...]
    receive: tuple[int, ...]
    num_pairs: int
    choices: tuple[Tensor, Tensor] | None = None

    def send_rows(self, rows_PX: Tensor, what: str) -> Tensor:
        """Rows of tokens to the processes of their experts: [R, X]."""
        return self.wire.exchange_rows(rows_PX, self.send, self.receive, what)

    def return_rows(self, rows_RX: Tensor, what: str) -> Tensor:
        """Rows that arrived here back to their tokens: [P, X]."""
        return self.wire.exchange_rows(rows_RX, self.receive, self.send, what)

    def bring_home(self, y_RH: Tensor) -> Tensor:
        return _FromExperts.apply(self, y_RH)


def _plan_trip(expert_ids_TK: Tensor, shard: ExpertShard) -> _AllToAllTrip:
    """Waits for the other processes."""
    num_tokens, num_owners = expert_ids_TK.shape[0], shard.wire.size
    # All that does not need the sizes comes before the wait for them, after which the device has nothing else to do.
    found = find_destinations(expert_ids_TK, num_owners, shard.num_local)
    what = "exchange of the dispatch's sizes"
    sent, received = shard.wire.exchange_counts(found.counts_N2, what, meanwhile=shard.meanwhile)
    if sum(pairs for _, pairs in sent) != expert_ids_TK.numel():
        raise ValueError(
            f"expert_ids_TK: ids span {int(expert_ids_TK.min())} to {int(expert_ids_TK.max())}, need 0 to "
            f"{shard.num_experts - 1}"
        )
    send, receive = (tuple(rows for rows, _ in half) for half in (sent, received))
    num_sent = sum(send)
    token_P, slot_P, ids_PK = (each[:num_sent] for each in (found.token_M, found.slot_M, found.ids_MK))
    sums = ExpertPlan(
        num_tokens, num_owners, 1, slot_P, found.row_of_slot_M, token_P, found.fence_2, has_sentinels=True
    )
    num_pairs = sum(pairs for _, pairs in received)
    return _AllToAllTrip(shard.wire, shard.recall, expert_ids_TK, ids_PK, token_P, sums, send, receive, num_pairs)


def _add_up(rows_PX: Tensor, trip: _AllToAllTrip) -> Tensor:
    """The rows of each token added in fp32 and in process order: [T, X] in the dtype of the rows."""
    plan = trip.sums
    if rows_PX.is_cuda and rows_PX.dtype != torch.float64 and has_triton():
        from expertune.ops.experts.scattermoe.combine import combine

        return combine(rows_PX, None, plan)
    rows_TNX = plan.to_slots(rows_PX).unflatten(0, (plan.num_tokens, plan.top_k))
    return rows_TNX.sum(1, dtype=torch.promote_types(rows_PX.dtype, torch.float32)).to(rows_PX.dtype)


class _ToExperts(torch.autograd.Function):
    """Inputs: the trip, x [T, H], weights [T, K]."""

    @staticmethod
    def forward(ctx, trip, x_TH, weights_TK):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        # Tokens first: while they travel, the host gets the rest ready.
        x_RH = trip.send_rows(x_TH[trip.token_of_row_P], "sending tokens")
        if trip.choices is None:
            trip.choices = _exchange_choices(trip, weights_TK)
        ids_RK, weights_RK = (each.detach() for each in trip.choices)  # autograd makes outputs its own
        ctx.mark_non_differentiable(ids_RK)
        return x_RH, weights_RK, ids_RK

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RH, dweights_RK, _):  # type: ignore[no-untyped-def]
        trip, (_, need_x, need_weights) = ctx.trip, ctx.needs_input_grad
        trip.recall.drop(trip)
        # Both before anything is added up: a message waits for all that its stream was given before.
        dx_PH = trip.return_rows(dx_RH, "returning gradients of tokens") if need_x else None
        what = "returning gradients of routing weights"
        dweights_PK = trip.return_rows(dweights_RK, what) if need_weights else None
        return None, *(None if rows is None else _add_up(rows, trip) for rows in (dx_PH, dweights_PK))


def _exchange_choices(trip: _AllToAllTrip, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(local expert ids [R, K] int64, routing weights [R, K]) of the rows that arrive, in one message, bit for bit."""
    top_k = trip.ids_PK.shape[1]
    wide = torch.promote_types(weights_TK.dtype, torch.float32)  # 4 or 8 bytes: whole int32
    weights_PK = weights_TK[trip.token_of_row_P].to(wide)
    packed_P = torch.cat((trip.ids_PK, weights_PK.view(torch.int32)), dim=1)
    packed_R = trip.send_rows(packed_P, "sending expert ids and routing weights")
    ids_RK, weights_RK = packed_R[:, :top_k].to(torch.int64), packed_R[:, top_k:].contiguous().view(wide)
    return ids_RK, weights_RK.to(weights_TK.dtype)


class _FromExperts(torch.autograd.Function):
    """Inputs: the trip, y [R, H]."""

    @staticmethod
    def forward(ctx, trip, y_RH):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        return _add_up(trip.return_rows(y_RH, "returning results"), trip)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):  # type: ignore[no-untyped-def]
        trip = ctx.trip
        trip.recall.leave(trip)
        return None, trip.send_rows(dy_TH[trip.token_of_row_P], "sending gradients of results")
