"""The experts of one layer on tensors without data: what our kernels allocate, in their order, and nothing computed.

`scattermoe` launches Triton kernels, which fake tensors cannot enter and which a machine without a GPU may not even
have. `_ScatterMoE` makes and drops the same tensors as `ops.experts.scattermoe.mlp`; a test holds the one against the
other, allocation by allocation. `torch_grouped` is plain torch and runs as it is.

With expert parallelism the tokens that other ranks hold for our experts come in and go back; at a balanced load as many
rows come in as go out. Rows carry their routing weights, and come back weighted:

    forward    send [S, H] | receive [S, H], kept: the x of the local experts | local MLP | return [S, H] | y [T, H]
    backward   send dy [S, H] | receive [S, H] | local backward | return dx [S, H] | dx [T, H]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.estimate.ledger import EXCHANGE, EXPERTS, Ledger
from expertune.integrations.adapters import active_lora
from expertune.integrations.gates import activation_of
from expertune.layers.backends import TORCH_GROUPED
from expertune.layers.layout import projection_names, read_projection
from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe.tiling import pad_rank
from expertune.ops.experts.torch_grouped import (
    flatten_projection,
    grouped_expert_mlp,
    scaling_of,
    unflatten_projection,
)
from expertune.ops.experts.types import Activation, ExpertLora, ExpertProjection
from expertune.ops.integers import cdiv
from expertune.ops.plan import ExpertPlan

CHUNK_ROWS = 1024  # scattermoe's: rows of one expert that one program sums (its tiles.CHUNK_ROWS, a test compares)
TILE_ROWS = 128  # of its tiles

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def experts_on_paper(ledger: Ledger, backend: str, *, expert_parallel: bool = False) -> ExpertsFunction:
    """A function for Transformers' experts interface that allocates like our backend and computes nothing.

    backend: scattermoe or torch_grouped. expert_parallel: tokens are exchanged with other ranks.
    """

    def run(
        x_TH: Tensor, weights_TK: Tensor, up: ExpertProjection, down: ExpertProjection, activation: Activation
    ) -> Tensor:
        num_tokens = weights_TK.shape[0]
        if expert_parallel:  # each row that comes in is a token with one expert
            x_TH, weights_TK = _Dispatch.apply(ledger, x_TH, weights_TK)
        with ledger.scope(EXPERTS, passing=True):
            plan = plan_on_paper(weights_TK.shape[0], weights_TK.shape[1], up.num_experts, x_TH.device)
            if backend == TORCH_GROUPED:
                y_TH = grouped_expert_mlp(x_TH, weights_TK, plan, up, down, activation)
        if backend != TORCH_GROUPED:
            y_TH = scattermoe_on_paper(ledger, x_TH, weights_TK, plan, up, down, activation)
        return _Combine.apply(ledger, num_tokens, y_TH) if expert_parallel else y_TH

    def forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up_name, down_name = projection_names(experts)
        up = read_projection(experts, up_name, active_lora(experts, up_name))
        down = read_projection(experts, down_name, active_lora(experts, down_name))
        x_TH = hidden_states.to(up.weight_EYX.dtype)
        return run(x_TH, top_k_weights, up, down, activation_of(experts)).to(hidden_states.dtype)

    return forward


def plan_on_paper(num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> ExpertPlan:
    """A plan of this size, its order unknown."""
    num_slots = num_tokens * top_k
    rows_3S = torch.empty(3, num_slots + num_slots % 2, dtype=torch.int64, device=device)[:, :num_slots]
    fence_F = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    slots_S, rows_S, tokens_S = rows_3S
    return ExpertPlan(num_tokens, top_k, num_experts, slots_S, rows_S, tokens_S, fence_F, has_sentinels=False)


def scattermoe_on_paper(
    ledger: Ledger,
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
) -> Tensor:
    """`scattermoe_expert_mlp` without its kernels; gradients are shapes too."""
    options = _Options(ledger, plan, activation, (scaling_of(up), scaling_of(down)))
    tensors = (x_TH, weights_TK.contiguous(), *flatten_projection(up), *flatten_projection(down))
    return _ScatterMoE.apply(options, *tensors)


@dataclass(frozen=True)
class _Options:
    """What is no tensor of autograd's."""

    ledger: Ledger
    plan: ExpertPlan
    activation: Activation
    scalings: tuple[float, float]


class _ScatterMoE(torch.autograd.Function):
    """Input 0 holds no tensors of autograd's; 1: x, 2: routing weights, 3-6: up, 7-10: down."""

    @staticmethod
    def forward(ctx, options, x_TH, weights_TK, *flat):  # type: ignore[no-untyped-def]
        up = unflatten_projection(flat[:4], options.scalings[0])
        down = unflatten_projection(flat[4:], options.scalings[1])
        with options.ledger.scope(EXPERTS, passing=True), _no_autocast(x_TH):
            ctx.tables = _row_tables(options.plan)
            h_SJ, u1_SR = _project(options.plan, x_TH, up)
            a_SI = _activated(h_SJ, options.activation)
            z_SH, u2_SR = _project(options.plan, a_SI, down)
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
            dh_SJ, dweights_TK, *grads_down = _down_backward(options, dy_TH, h_SJ, weights_TK, down, need_flat[4:])
            del h_SJ
            dx_TH, *grads_up = _up_backward(options.plan, dh_SJ, up, need_x, need_flat[:4])
        return None, dx_TH, dweights_TK if need_weights else None, *grads_up, *grads_down


def _row_tables(plan: ExpertPlan) -> list[Tensor]:
    return [
        plan.row_fence_F.new_empty(4, cdiv(plan.num_rows, rows) + plan.num_experts) for rows in (TILE_ROWS, CHUNK_ROWS)
    ]


def _project(plan: ExpertPlan, rows: Tensor, projection: ExpertProjection) -> tuple[Tensor, Tensor | None]:
    """(out [S, Y], u [S, R'] or None); the packed adapter lives as long as this."""
    packed = _packed(projection)
    u_SR = _thin(rows, plan, projection)
    out_SY = rows.new_empty(plan.num_rows, projection.weight_EYX.shape[1])
    del packed
    return out_SY, u_SR


def _down_backward(
    options: _Options, dy_TH: Tensor, h_SJ: Tensor, weights_TK: Tensor, down: ExpertProjection, need: Any
) -> tuple[Any, ...]:
    plan = options.plan
    packed = _packed(down)
    p_S = weights_TK.reshape(-1).new_empty(plan.num_rows)
    v2_SR = _thin(dy_TH, plan, down)
    da_SI = dy_TH.new_empty(plan.num_rows, down.weight_EYX.shape[2])
    del packed
    if isinstance(options.activation, Gate):  # dh goes over h, a over da
        dh_SJ, a_SI, dweights_TK = h_SJ, da_SI, torch.empty_like(weights_TK)
    else:
        dh_SJ, a_SI, dweights_TK = _function_backward(options.activation, h_SJ, da_SI, p_S, weights_TK)
    del da_SI
    grads = _parameter_grads(plan, dy_TH, a_SI, down, need)
    del v2_SR
    return dh_SJ, dweights_TK, *grads


def _up_backward(
    plan: ExpertPlan, dh_SJ: Tensor, up: ExpertProjection, need_x: bool, need: Any
) -> tuple[Tensor | None, ...]:
    packed, dx_TH = _packed(up), None
    v1_SR = _thin(dh_SJ, plan, up)
    width = up.weight_EYX.shape[2]
    if need_x:
        drows_SH = dh_SJ.new_empty(plan.num_rows, width)
        dx_TH = dh_SJ.new_empty(plan.num_tokens, width)
        del drows_SH
    grads = _parameter_grads(plan, dh_SJ, dh_SJ, up, need)
    del packed, v1_SR
    return dx_TH, *grads


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
    plan: ExpertPlan, dout: Tensor, rows: Tensor, projection: ExpertProjection, need: Any
) -> tuple[Tensor | None, ...]:
    need_weight, need_bias, need_a, need_b = need
    if need_weight or need_bias:
        raise ValueError("full fine-tuning of experts is not estimated: only their adapters train")
    lora, da, db = projection.lora, None, None
    if lora is not None and need_a:
        da = torch.empty_like(lora.a_ERX, memory_format=torch.contiguous_format)
        _parts(plan, dout, lora, lora.a_ERX.shape[2])
    if lora is not None and need_b:
        db_ERY = torch.empty_like(lora.b_EYR.transpose(1, 2), memory_format=torch.contiguous_format)
        _parts(plan, dout, lora, lora.b_EYR.shape[1])
        db = torch.empty_like(lora.b_EYR)
        if db.stride() == db_ERY.transpose(1, 2).stride():
            db = db_ERY.transpose(1, 2)
    return None, None, da, db


def _parts(plan: ExpertPlan, like: Tensor, lora: ExpertLora, width: int) -> None:
    """The room that the sum over an expert's rows has for its parts."""
    if plan.num_rows > CHUNK_ROWS:
        capacity = cdiv(plan.num_rows, CHUNK_ROWS) + plan.num_experts
        like.new_empty(capacity, pad_rank(lora.rank), width, dtype=torch.float32)


def _packed(projection: ExpertProjection) -> tuple[Tensor, Tensor] | None:
    """The adapter laid out for the kernels: a copy, unless it lies so already."""
    lora, dtype = projection.lora, projection.weight_EYX.dtype
    if lora is None:
        return None
    (num_experts, rank, num_in), num_out, padded = lora.a_ERX.shape, lora.b_EYR.shape[1], pad_rank(lora.rank)
    ready = rank == padded and lora.a_ERX.dtype == lora.b_EYR.dtype == dtype
    if ready and lora.a_ERX.is_contiguous() and lora.b_EYR.is_contiguous():
        return None
    a_ERX = lora.a_ERX.new_empty(num_experts, padded, num_in, dtype=dtype)
    return a_ERX, lora.b_EYR.new_empty(num_experts, num_out, padded, dtype=dtype)


def _thin(rows: Tensor, plan: ExpertPlan, projection: ExpertProjection) -> Tensor | None:
    return None if projection.lora is None else rows.new_empty(plan.num_rows, pad_rank(projection.lora.rank))


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


class _Dispatch(torch.autograd.Function):
    """x [T, H] to the rows [S, H] that came in, with their weights [S, 1]."""

    @staticmethod
    def forward(ctx, ledger, x_TH, weights_TK):  # type: ignore[no-untyped-def]
        ctx.ledger, (ctx.num_tokens, ctx.top_k) = ledger, weights_TK.shape
        num_rows = ctx.num_tokens * ctx.top_k
        with ledger.scope(EXCHANGE):
            sent_SH = x_TH.new_empty(num_rows, x_TH.shape[1])
            received_SH = torch.empty_like(sent_SH)
        return received_SH, weights_TK.new_empty(num_rows, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_SH, dweights_S1):  # type: ignore[no-untyped-def]
        with ctx.ledger.scope(EXCHANGE):
            returned_SH = torch.empty_like(dx_SH)
        dx_TH = returned_SH.new_empty(ctx.num_tokens, dx_SH.shape[1])
        return None, dx_TH, dweights_S1.new_empty(ctx.num_tokens, ctx.top_k)


class _Combine(torch.autograd.Function):
    """Weighted rows [S, H] of the local experts to y [T, H] of our tokens."""

    @staticmethod
    def forward(ctx, ledger, num_tokens, y_SH):  # type: ignore[no-untyped-def]
        ctx.ledger, ctx.num_rows = ledger, y_SH.shape[0]
        with ledger.scope(EXCHANGE):
            returned_SH = torch.empty_like(y_SH)
        return returned_SH.new_empty(num_tokens, y_SH.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):  # type: ignore[no-untyped-def]
        with ctx.ledger.scope(EXCHANGE):
            sent_SH = dy_TH.new_empty(ctx.num_rows, dy_TH.shape[1])
            received_SH = torch.empty_like(sent_SH)
        return None, None, received_SH
