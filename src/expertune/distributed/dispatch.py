"""Tokens to the processes that own their experts, and the results back: two all-to-alls with autograd.

Experts are dealt out in blocks: of N processes, number n owns experts n E/N to (n + 1) E/N - 1. With p the routing
weights of token t and e its experts:

    y_t = sum over n of  [ sum over the k with e_tk on process n of  p_tk expert(e_tk, x_t) ]

The inner sum is what the local backend computes anyway. So a token travels once to each process that has any of its
experts, not once for each expert (K = 8 of 128 experts on 2 processes: 2 rows, not 8), with its K expert ids (local;
-1, a sentinel, where another process has that expert) and its K routing weights; and one partial sum comes back.
No token is dropped and no message is padded: the sizes are exchanged first, which the host waits for (`recompute` has
them from the forward). All that needs no sizes is given to the device before that wait.

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
from expertune.ops.destinations import find_destinations, unpack_choices
from expertune.ops.plan import ExpertPlan, has_triton


class Trip(Protocol):
    """Tokens of this process that are away at their experts, and those that came here."""

    @property
    def num_pairs(self) -> int:
        """(token, expert) pairs that arrived here."""

    def plan_of(self, build: Callable[[int], ExpertPlan]) -> ExpertPlan:
        """The plan of the local experts, by `build(num_pairs)`, unless a forward that went the same way made it."""

    def bring_home(self, y_RH: Tensor) -> Tensor:
        """`return_from_experts`, by the way that the tokens came."""


class Transport(Protocol):
    """What carries rows between the processes that share a layer's experts. One serves all layers."""

    def send(self, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, shard: "ExpertShard") -> "Arrived":
        """`send_to_experts`."""


@dataclass(frozen=True)
class AllToAll:
    """The all-to-all of the process group's own library, NCCL or gloo: any dtype, over any number of machines."""

    def send(self, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, shard: "ExpertShard") -> "Arrived":
        """See `send_to_experts`."""
        trip = shard.recall.take()
        if trip is None:
            trip, x_PH = _plan_trip(x_TH.detach(), expert_ids_TK, weights_TK.detach(), shard)
        else:
            torch._assert_async((expert_ids_TK == trip.expert_ids_TK).all(), "recomputed tokens choose other experts")
            x_PH = x_TH.detach()[trip.token_of_row_P]
            if shard.meanwhile is not None:
                shard.meanwhile()
        x_RH, weights_RK = _ToExperts.apply(trip, x_PH, x_TH, weights_TK)
        return Arrived(trip, x_RH, trip.ids_RK, weights_RK)


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

    x_RH: [R, H]. expert_ids_RK: [R, K] integer, ids of this process's experts, -1 where another process has the expert.
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

    expert_ids_TK: what the tokens chose.
    token_of_row_P: [P] int64, the token of each row that is sent, by destination, then by token.
    sums: T tokens of up to N rows each, one for each process, as a plan with processes in the place of experts' slots.
    send, receive: rows to and from each process. num_pairs: (token, expert) pairs that arrive here.
    ids_RK, weights_RK: of the rows that arrive. plan: of the local experts, once it is made.
    """

    wire: Wire
    recall: "Recall[_AllToAllTrip]"
    expert_ids_TK: Tensor
    token_of_row_P: Tensor
    sums: ExpertPlan
    send: tuple[int, ...]
    receive: tuple[int, ...]
    num_pairs: int
    ids_RK: Tensor
    weights_RK: Tensor
    plan: ExpertPlan | None = None

    def send_rows(self, rows_PX: Tensor, what: str) -> Tensor:
        """Rows of tokens to the processes of their experts: [R, X]."""
        return self.wire.exchange_rows(rows_PX, self.send, self.receive, what)

    def return_rows(self, rows_RX: Tensor, what: str) -> Tensor:
        """Rows that arrived here back to their tokens: [P, X]."""
        return self.wire.exchange_rows(rows_RX, self.receive, self.send, what)

    def plan_of(self, build: Callable[[int], ExpertPlan]) -> ExpertPlan:
        if self.plan is None:
            self.plan = build(self.num_pairs)
        return self.plan

    def bring_home(self, y_RH: Tensor) -> Tensor:
        return _FromExperts.apply(self, y_RH)


def _plan_trip(
    x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, shard: ExpertShard
) -> tuple[_AllToAllTrip, Tensor]:
    """(the trip, x of the rows that are sent [P, H]). Waits for the other processes."""
    (num_tokens, top_k), num_owners = expert_ids_TK.shape, shard.wire.size
    # All that does not need the sizes comes before the wait for them, after which the device has nothing else to do.
    found = find_destinations(expert_ids_TK, weights_TK, num_owners, shard.num_local)
    x_MH = x_TH

    def get_ready() -> None:
        nonlocal x_MH
        if shard.meanwhile is not None:
            shard.meanwhile()
        x_MH = x_TH[found.token_M[: num_tokens * min(num_owners, top_k)]]

    what = "exchange of the dispatch's sizes"
    sent, received = shard.wire.exchange_counts(found.counts_N2, what, meanwhile=get_ready)
    if sum(pairs for _, pairs in sent) != expert_ids_TK.numel():
        raise ValueError(
            f"expert_ids_TK: ids span {int(expert_ids_TK.min())} to {int(expert_ids_TK.max())}, need 0 to "
            f"{shard.num_experts - 1}"
        )
    send, receive = (tuple(rows for rows, _ in half) for half in (sent, received))
    num_sent = sum(send)
    what = "sending expert ids and routing weights"
    choices_RX = shard.wire.exchange_rows(found.choices_MX[:num_sent], send, receive, what)
    ids_RK, weights_RK = unpack_choices(choices_RX, top_k, weights_TK.dtype)
    token_P, slot_P = found.token_M[:num_sent], found.slot_M[:num_sent]
    sums = ExpertPlan(
        num_tokens, num_owners, 1, slot_P, found.row_of_slot_M, token_P, found.fence_2, has_sentinels=True
    )
    num_pairs = sum(pairs for _, pairs in received)
    trip = _AllToAllTrip(
        shard.wire, shard.recall, expert_ids_TK, token_P, sums, send, receive, num_pairs, ids_RK, weights_RK
    )
    return trip, x_MH[:num_sent]


def _add_up(rows_PX: Tensor, trip: _AllToAllTrip) -> Tensor:
    """The rows of each token added in fp32 and in process order: [T, X] in the dtype of the rows."""
    plan = trip.sums
    if rows_PX.is_cuda and rows_PX.dtype != torch.float64 and has_triton():
        from expertune.ops.experts.scattermoe.combine import combine

        return combine(rows_PX, None, plan)
    rows_TNX = plan.to_slots(rows_PX).unflatten(0, (plan.num_tokens, plan.top_k))
    return rows_TNX.sum(1, dtype=torch.promote_types(rows_PX.dtype, torch.float32)).to(rows_PX.dtype)


class _ToExperts(torch.autograd.Function):
    """Inputs: the trip, x of the rows that are sent [P, H], x [T, H], weights [T, K]."""

    @staticmethod
    def forward(ctx, trip, x_PH, x_TH, weights_TK):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        return trip.send_rows(x_PH, "sending tokens"), trip.weights_RK.detach()  # autograd makes outputs its own

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RH, dweights_RK):  # type: ignore[no-untyped-def]
        trip, (*_, need_x, need_weights) = ctx.trip, ctx.needs_input_grad
        trip.recall.drop(trip)
        # Both before anything is added up: a message waits for all that its stream was given before.
        dx_PH = trip.return_rows(dx_RH, "returning gradients of tokens") if need_x else None
        what = "returning gradients of routing weights"
        dweights_PK = trip.return_rows(dweights_RK, what) if need_weights else None
        return None, None, *(None if rows is None else _add_up(rows, trip) for rows in (dx_PH, dweights_PK))


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
