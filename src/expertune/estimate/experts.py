"""The experts of one layer on tensors without data: what our kernels allocate, in their order, and nothing computed.

`scattermoe` launches Triton kernels, which fake tensors cannot enter and which a machine without a GPU may not even
have. `_ScatterMoE` makes and drops the same tensors as `ops.experts.scattermoe.mlp`; a test holds the one against the
other, allocation by allocation. `torch_grouped` is plain torch and runs as it is.

With expert parallelism a token travels once to each process that has any of its experts, with K ids and weights, and
one partial sum comes back. P rows go out and, at an even load, as many come in, with T K pairs of token and expert:

    forward    send [P, H] | receive [P, H], kept: x of the local experts | local MLP | return [P, H] | sum y in fp32
    backward   send dy [P, H] | receive [P, H] | local backward | return dx [P, H] | sum dx in fp32

A forward gathers what it sends before it knows P: T min(N, K) rows. (A recomputation knows P; here it does the same.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.estimate.ledger import EXCHANGE, EXPERT_GRADIENTS, EXPERTS, Ledger
from expertune.integrations.adapters import active_lora
from expertune.integrations.gates import activation_of
from expertune.layers.backends import TORCH_GROUPED
from expertune.layers.layout import projection_names, read_projection
from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe.tiling import fits_one_pass, pad_rank, pick_backward_tile
from expertune.ops.experts.torch_grouped import (
    flatten_projection,
    grouped_expert_mlp,
    scaling_of,
    unflatten_projection,
)
from expertune.ops.experts.types import Activation, ExpertLora, ExpertProjection
from expertune.ops.integers import cdiv
from expertune.ops.plan import ExpertPlan
from expertune.ops.row_tables import CHUNK_ROWS

TILE_ROWS = 128  # of scattermoe's tiles

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def experts_on_paper(ledger: Ledger, backend: str, *, expert_parallel: int = 1) -> ExpertsFunction:
    """A function for Transformers' experts interface that allocates like our backend and computes nothing.

    backend: scattermoe or torch_grouped. expert_parallel: processes that share the experts.
    """

    def forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up_name, down_name = projection_names(experts)
        up = read_projection(experts, up_name, active_lora(experts, up_name))
        down = read_projection(experts, down_name, active_lora(experts, down_name))
        x_TH, weights_TK = hidden_states.to(up.weight_EYX.dtype), top_k_weights
        num_tokens, top_k = weights_TK.shape
        if expert_parallel > 1:
            num_rows = rows_that_travel(num_tokens, top_k, up.num_experts, expert_parallel)
            num_gathered = num_tokens * min(expert_parallel, top_k)
            x_TH, weights_TK = _ToExperts.apply(ledger, num_rows, num_gathered, x_TH, weights_TK)
        with ledger.scope(EXPERTS, passing=True):
            num_local = up.num_experts // expert_parallel
            pairs = num_tokens * top_k
            plan = plan_on_paper(x_TH.shape[0], top_k, up.num_experts, x_TH.device, num_live_rows=pairs)
            if backend == TORCH_GROUPED:
                y_TH = grouped_expert_mlp(x_TH, weights_TK, plan, up, down, activation_of(experts))
        if backend != TORCH_GROUPED:
            y_TH = scattermoe_on_paper(
                ledger, x_TH, weights_TK, plan, up, down, activation_of(experts), num_local=num_local
            )
        if expert_parallel > 1:
            y_TH = _FromExperts.apply(ledger, num_tokens, y_TH)
        return y_TH.to(hidden_states.dtype)

    return forward


def rows_that_travel(num_tokens: int, top_k: int, num_experts: int, processes: int) -> int:
    """How many rows go out, if all experts are as likely: each token to every process that has any of its experts."""
    elsewhere = comb(num_experts - num_experts // processes, top_k) / comb(num_experts, top_k)
    return round(num_tokens * processes * (1 - elsewhere))


def plan_on_paper(
    num_tokens: int, top_k: int, num_experts: int, device: torch.device, *, num_live_rows: int | None = None
) -> ExpertPlan:
    """A plan of this size, its order unknown. num_live_rows: pairs that are not another process's."""
    num_slots = num_tokens * top_k
    rows_3S = torch.empty(3, num_slots + num_slots % 2, dtype=torch.int64, device=device)[:, :num_slots]
    fence_F = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    slots_S, rows_S, tokens_S = rows_3S
    live = slice(num_live_rows)
    return ExpertPlan(
        num_tokens, top_k, num_experts, slots_S[live], rows_S, tokens_S[live], fence_F, has_sentinels=False
    )


def scattermoe_on_paper(
    ledger: Ledger,
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
    *,
    num_local: int | None = None,
    on_hopper: bool = True,
) -> Tensor:
    """`scattermoe_expert_mlp` without its kernels; gradients are shapes too.

    num_local: of the experts, those that this process has (all of them if None): what is packed for the kernels.
    on_hopper: with the kernels that only Hopper has, which need a little more: the gradient of the up projection's B
    is there before dx.
    """
    scalings, num_local = (scaling_of(up), scaling_of(down)), num_local or plan.num_experts
    options = _Options(ledger, plan, activation, scalings, num_local, on_hopper)
    tensors = (x_TH, weights_TK.contiguous(), *flatten_projection(up), *flatten_projection(down))
    return _ScatterMoE.apply(options, *tensors)


@dataclass(frozen=True)
class _Options:
    """What is no tensor of autograd's."""

    ledger: Ledger
    plan: ExpertPlan
    activation: Activation
    scalings: tuple[float, float]
    num_local: int
    on_hopper: bool

    @property
    def num_rows(self) -> int:
        """S, of the pairs that are this process's."""
        return self.plan.slot_of_row_S.shape[0]


class _ScatterMoE(torch.autograd.Function):
    """Input 0 holds no tensors of autograd's; 1: x, 2: routing weights, 3-6: up, 7-10: down."""

    @staticmethod
    def forward(ctx, options, x_TH, weights_TK, *flat):  # type: ignore[no-untyped-def]
        up = unflatten_projection(flat[:4], options.scalings[0])
        down = unflatten_projection(flat[4:], options.scalings[1])
        with options.ledger.scope(EXPERTS, passing=True), _no_autocast(x_TH):
            ctx.tables = _row_tables(options)
            h_SJ, u1_SR = _project(options, x_TH, up)
            a_SI = _activated(h_SJ, options.activation)
            z_SH, u2_SR = _project(options, a_SI, down)
            del a_SI
            y_TH = z_SH.new_empty(options.plan.num_tokens, z_SH.shape[1])
            del z_SH
        ctx.options = options
        ctx.save_for_backward(x_TH, weights_TK, h_SJ, u1_SR, u2_SR, *flat)
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):  # type: ignore[no-untyped-def]
        options = ctx.options
        x_TH, weights_TK, h_SJ, _, _, *flat = ctx.saved_tensors
        up = unflatten_projection(flat[:4], options.scalings[0])
        down = unflatten_projection(flat[4:], options.scalings[1])
        need_x, need_weights, *need_flat = ctx.needs_input_grad[1:]
        with options.ledger.scope(EXPERTS, passing=True), _no_autocast(x_TH):
            dh_SJ, dweights_TK, *grads_down, db1 = _down_backward(
                options, dy_TH, h_SJ, weights_TK, (up, down), need_flat
            )
            del h_SJ
            dx_TH, *grads_up = _up_backward(options, dh_SJ, up, need_x, need_flat[:4], db1)
        return None, dx_TH, dweights_TK if need_weights else None, *grads_up, *grads_down


def _row_tables(options: _Options) -> list[Tensor]:
    return [
        options.plan.row_fence_F.new_empty(4, cdiv(options.num_rows, rows) + options.num_local)
        for rows in (TILE_ROWS, CHUNK_ROWS)
    ]


def _project(options: _Options, rows: Tensor, projection: ExpertProjection) -> tuple[Tensor, Tensor | None]:
    """(out [S, Y], u [S, R'] or None); the packed adapter lives as long as this."""
    packed = _packed(options, projection)
    u_SR = _thin(rows, options, projection)
    out_SY = rows.new_empty(options.num_rows, projection.weight_EYX.shape[1])
    del packed
    return out_SY, u_SR


def _down_backward(
    options: _Options,
    dy_TH: Tensor,
    h_SJ: Tensor,
    weights_TK: Tensor,
    projections: tuple[ExpertProjection, ExpertProjection],
    need: Any,
) -> tuple[Any, ...]:
    """Last: the gradient of the up projection's B, where it comes out of the same pass."""
    up, down = projections
    packed = _packed(options, down)
    p_S = weights_TK.reshape(-1).new_empty(options.num_rows)
    v2_SR = _thin(dy_TH, options, down)
    da_SI = dy_TH.new_empty(options.num_rows, down.weight_EYX.shape[2])
    del packed
    need_down, da2, db1 = list(need[4:]), None, None
    if isinstance(options.activation, Gate):  # dh goes over h, a over da
        dh_SJ, dweights_TK = h_SJ, torch.empty_like(weights_TK)
        a_SI: Tensor | None = da_SI
        if _in_one_pass(options, h_SJ, up, down, need):
            da2, db1 = _grads_in_one_pass(options, h_SJ, up, down)
            need_down[2], a_SI = False, None
    else:
        dh_SJ, a_SI, dweights_TK = _function_backward(options.activation, h_SJ, da_SI, p_S, weights_TK)
    del da_SI
    dweight, dbias, own_da2, db2 = _parameter_grads(options, dy_TH, down, need_down)
    del a_SI, v2_SR  # as long as the sums run
    return dh_SJ, dweights_TK, dweight, dbias, own_da2 if da2 is None else da2, db2, db1


def _in_one_pass(options: _Options, h_SJ: Tensor, up: ExpertProjection, down: ExpertProjection, need: Any) -> bool:
    """What `between` asks."""
    if not options.on_hopper or up.lora is None or down.lora is None or not (need[3] and need[6]) or need[4]:
        return False
    return fits_one_pass(h_SJ, pad_rank(up.lora.rank), pad_rank(down.lora.rank))


def _grads_in_one_pass(
    options: _Options, h_SJ: Tensor, up: ExpertProjection, down: ExpertProjection
) -> tuple[Tensor, Tensor]:
    """The gradients of the down projection's A and of the up projection's B; dp comes in parts of some columns."""
    assert up.lora is not None
    assert down.lora is not None
    with options.ledger.scope(EXPERT_GRADIENTS):
        da = torch.empty_like(down.lora.a_ERX, memory_format=torch.contiguous_format)
        db_ERY = torch.empty_like(up.lora.b_EYR.transpose(1, 2), memory_format=torch.contiguous_format)
    width = h_SJ.shape[1] // 2
    parts = [_parts(options, h_SJ, down.lora, width), _parts(options, h_SJ, up.lora, 2 * width)]
    tile = pick_backward_tile(pad_rank(max(up.lora.rank, down.lora.rank)))
    dp_NS = h_SJ.new_empty(cdiv(width, tile.columns), options.num_rows, dtype=torch.float32)
    del parts, dp_NS
    with options.ledger.scope(EXPERT_GRADIENTS):
        return da, _laid_out(db_ERY, up.lora)


def _up_backward(
    options: _Options, dh_SJ: Tensor, up: ExpertProjection, need_x: bool, need: Any, db: Tensor | None
) -> tuple[Tensor | None, ...]:
    """db: the gradient of B, if it is there."""
    packed, dx_TH = _packed(options, up), None
    v1_SR = _thin(dh_SJ, options, up)
    width = up.weight_EYX.shape[2]
    if need_x:
        drows_SH = dh_SJ.new_empty(options.num_rows, width)
        dx_TH = dh_SJ.new_empty(options.plan.num_tokens, width)
        del drows_SH
    *grads, own_db = _parameter_grads(options, dh_SJ, up, (*need[:3], need[3] and db is None))
    del packed, v1_SR
    return dx_TH, *grads, own_db if db is None else db


def _function_backward(
    activation: Activation, h_SJ: Tensor, da_SI: Tensor, p_S: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dh_SJ = da_SI * p_S.unsqueeze(1).to(da_SI.dtype)
    with torch.enable_grad():
        leaf_SJ = h_SJ.detach().requires_grad_()
        a_SI = activation(leaf_SJ)
    (dh_SJ,) = torch.autograd.grad(a_SI, leaf_SJ, dh_SJ)
    dp_S = (da_SI.float() * a_SI.detach()).sum(dim=-1)
    return dh_SJ.contiguous(), a_SI.detach().contiguous(), dp_S.new_empty(weights_TK.shape).to(weights_TK.dtype)


def _parameter_grads(
    options: _Options, rows: Tensor, projection: ExpertProjection, need: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of all experts, whose share is a process's; the room for their parts is that of its own."""
    need_weight, need_bias, need_a, need_b = need
    if need_weight or need_bias:
        raise ValueError("full fine-tuning of experts is not estimated: only their adapters train")
    lora, da, db = projection.lora, None, None
    with options.ledger.scope(EXPERT_GRADIENTS):
        if lora is not None and need_a:
            da = torch.empty_like(lora.a_ERX, memory_format=torch.contiguous_format)
            _parts(options, rows, lora, lora.a_ERX.shape[2])
        if lora is not None and need_b:
            db_ERY = torch.empty_like(lora.b_EYR.transpose(1, 2), memory_format=torch.contiguous_format)
            _parts(options, rows, lora, lora.b_EYR.shape[1])
            db = _laid_out(db_ERY, lora)
    return None, None, da, db


def _laid_out(db_ERY: Tensor, lora: ExpertLora) -> Tensor:
    """The gradient of B with its strides."""
    db_EYR = torch.empty_like(lora.b_EYR)
    return db_ERY.transpose(1, 2) if db_EYR.stride() == db_ERY.transpose(1, 2).stride() else db_EYR


def _parts(options: _Options, like: Tensor, lora: ExpertLora, width: int) -> Tensor | None:
    """The room that the sum over an expert's rows has for its parts."""
    if options.num_rows <= CHUNK_ROWS:
        return None
    capacity = cdiv(options.num_rows, CHUNK_ROWS) + options.num_local
    with options.ledger.scope(EXPERTS):
        return like.new_empty(capacity, pad_rank(lora.rank), width, dtype=torch.float32)


def _packed(options: _Options, projection: ExpertProjection) -> tuple[Tensor, Tensor] | None:
    """The adapter laid out for the kernels: a copy, unless it lies so already."""
    lora, dtype = projection.lora, projection.weight_EYX.dtype
    if lora is None:
        return None
    (_, rank, num_in), num_out, padded = lora.a_ERX.shape, lora.b_EYR.shape[1], pad_rank(lora.rank)
    ready = rank == padded and lora.a_ERX.dtype == lora.b_EYR.dtype == dtype
    if ready and lora.a_ERX.is_contiguous() and lora.b_EYR.is_contiguous():
        return None
    a_ERX = lora.a_ERX.new_empty(options.num_local, padded, num_in, dtype=dtype)
    return a_ERX, lora.b_EYR.new_empty(options.num_local, num_out, padded, dtype=dtype)


def _thin(rows: Tensor, options: _Options, projection: ExpertProjection) -> Tensor | None:
    return None if projection.lora is None else rows.new_empty(options.num_rows, pad_rank(projection.lora.rank))


def _activated(h_SJ: Tensor, activation: Activation) -> Tensor:
    if isinstance(activation, Gate):
        return h_SJ.new_empty(h_SJ.shape[0], h_SJ.shape[1] // 2)
    return activation(h_SJ).contiguous()


def _no_autocast(rows: Tensor) -> torch.autocast:
    return torch.autocast(rows.device.type, enabled=False)


class GroupedProducts(TorchDispatchMode):
    """Within it, torch's grouped products allocate their result alone: on paper torch has them for bfloat16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right, offsets, *_ = args
        if right.dim() == 3:  # rows [S, X] times the [X, Y] of their expert
            return left.new_empty(left.shape[0], right.shape[2])
        return left.new_empty(offsets.shape[0], left.shape[0], right.shape[1])


class _ToExperts(torch.autograd.Function):
    """x [T, H] and weights [T, K] to the rows [P, H] that came in, with their weights [P, K]."""

    @staticmethod
    def forward(ctx, ledger, num_rows, num_gathered, x_TH, weights_TK):  # type: ignore[no-untyped-def]
        ctx.ledger, ctx.num_tokens = ledger, x_TH.shape[0]
        with ledger.scope(EXCHANGE):
            return tuple(_exchanged(values, num_rows, num_gathered) for values in (x_TH, weights_TK))

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_PH, dweights_PK):  # type: ignore[no-untyped-def]
        return None, None, None, *(_added_up(ctx.ledger, rows, ctx.num_tokens) for rows in (dx_PH, dweights_PK))


class _FromExperts(torch.autograd.Function):
    """Partial sums [P, H] of the local experts to y [T, H] of our tokens."""

    @staticmethod
    def forward(ctx, ledger, num_tokens, y_PH):  # type: ignore[no-untyped-def]
        ctx.ledger, ctx.num_rows = ledger, y_PH.shape[0]
        return _added_up(ledger, y_PH, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):  # type: ignore[no-untyped-def]
        with ctx.ledger.scope(EXCHANGE):
            return None, None, _exchanged(dy_TH, ctx.num_rows, ctx.num_rows)


def _exchanged(values_TX: Tensor, num_rows: int, num_gathered: int) -> Tensor:
    """What comes in for the rows of our tokens that go out. num_gathered: rows that are made room for, to be sent."""
    sent_MX = values_TX.new_empty(num_gathered, values_TX.shape[1])
    return torch.empty_like(sent_MX[:num_rows])


def _added_up(ledger: Ledger, rows_PX: Tensor, num_tokens: int) -> Tensor:
    """The rows of each token, once they are back, added in fp32 and rounded."""
    with ledger.scope(EXCHANGE):
        returned_PX = torch.empty_like(rows_PX)
        sum_TX = returned_PX.new_empty(num_tokens, rows_PX.shape[1], dtype=torch.float32)
    return sum_TX.to(rows_PX.dtype)
