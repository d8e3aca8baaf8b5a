"""The expert MLP as registered ops, for torch.compile: traced as they stand, without a graph break.

    h, u1 = expert_up(x)      a = act(h), traced; a Gate is computed inside the next op      y, u2 = expert_down(a, p)

Each op has a fake (shapes alone, any number of tokens) and a backward that is an op too. Against the autograd function
of eager code: dh is not written over h, since an op's results share no memory with its inputs, and the row tables are
built in each op. Eager code does not come here: an op's dispatch costs the host more than the function's.

What an op takes: tensors, numbers, a name. A plan is its four tensors, K and whether it has sentinels; a projection is
weight, bias, A, B and scaling; a tile is a list of its fields in order. What is absent, comes back empty.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from expertune.ops.experts.gates import Gate
from expertune.ops.experts.scattermoe.halves import down_backward, down_forward, up_backward, up_forward
from expertune.ops.experts.scattermoe.products import Products, at_home, dense
from expertune.ops.experts.scattermoe.tiling import LinearTile, pad_rank, pick_tile
from expertune.ops.experts.torch_grouped import flatten_projection, scaling_of, unflatten_projection
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import ExpertPlan

NO_GATE = ""
TILE_FIELDS = [field.name for field in fields(LinearTile)]


def traced_expert_mlp(
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
    tile: LinearTile | None,
) -> Tensor:
    """`scattermoe_expert_mlp` under torch.compile; arguments are checked, x has the dtype of the weights."""
    tensors = [plan.slot_of_row_S, plan.row_of_slot_S, plan.token_of_row_S, plan.row_fence_F]
    routing = (tensors, plan.top_k, plan.has_sentinels)
    numbers = None if tile is None else [int(getattr(tile, name)) for name in TILE_FIELDS]
    h_SJ, _ = expert_up(x_TH, *flatten_projection(up), scaling_of(up), *routing, numbers)
    gate = activation.name if isinstance(activation, Gate) else NO_GATE
    if gate == NO_GATE:
        with torch.autocast(x_TH.device.type, enabled=False):
            h_SJ = activation(h_SJ)
    y_TH, _ = expert_down(h_SJ, weights_TK, *flatten_projection(down), scaling_of(down), *routing, gate, numbers)
    return y_TH


@torch.library.custom_op("expertune::expert_up", mutates_args=())
def expert_up(
    x_TH: Tensor,
    weight_EJH: Tensor,
    bias_EJ: Tensor | None,
    lora_a_ERH: Tensor | None,
    lora_b_EJR: Tensor | None,
    scaling: float,
    plan: list[Tensor],
    top_k: int,
    sentinels: bool,
    tile: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """(h [S, J], u1 [S, R'])."""
    up = unflatten_projection((weight_EJH, bias_EJ, lora_a_ERH, lora_b_EJR), scaling)
    with at_home(x_TH):
        h_SJ, u1_SR = up_forward(_products(plan, top_k, sentinels, tile, weight_EJH), x_TH, up)
    return h_SJ, _or_empty(u1_SR, x_TH)


@expert_up.register_fake
def _(x_TH, weight_EJH, bias_EJ, lora_a_ERH, lora_b_EJR, scaling, plan, *_):
    num_rows = plan[0].shape[0]
    return x_TH.new_empty(num_rows, weight_EJH.shape[1]), _empty_thin(x_TH, num_rows, lora_a_ERH)


@torch.library.custom_op("expertune::expert_up_backward", mutates_args=())
def expert_up_backward(
    dh_SJ: Tensor,
    x_TH: Tensor,
    u1_SR: Tensor,
    weight_EJH: Tensor,
    bias_EJ: Tensor | None,
    lora_a_ERH: Tensor | None,
    lora_b_EJR: Tensor | None,
    scaling: float,
    plan: list[Tensor],
    top_k: int,
    sentinels: bool,
    tile: list[int] | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, A and B, empty where `needs` says no."""
    up = unflatten_projection((weight_EJH, bias_EJ, lora_a_ERH, lora_b_EJR), scaling)
    with at_home(x_TH):
        products = _products(plan, top_k, sentinels, tile, weight_EJH)
        grads = up_backward(products, x_TH, u1_SR, up, dh_SJ, needs)
    return _as_outputs(grads, (x_TH, weight_EJH, bias_EJ, lora_a_ERH, lora_b_EJR))


@expert_up_backward.register_fake
def _(dh_SJ, x_TH, u1_SR, *rest):
    return _fake_outputs((x_TH, *rest[:4]), rest[-1])


@torch.library.custom_op("expertune::expert_down", mutates_args=())
def expert_down(
    h_SJ: Tensor,
    weights_TK: Tensor,
    weight_EHI: Tensor,
    bias_EH: Tensor | None,
    lora_a_ERI: Tensor | None,
    lora_b_EHR: Tensor | None,
    scaling: float,
    plan: list[Tensor],
    top_k: int,
    sentinels: bool,
    gate: str,
    tile: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """(y [T, H], u2 [S, R']). gate: a Gate's name, or empty if h is a."""
    down = unflatten_projection((weight_EHI, bias_EH, lora_a_ERI, lora_b_EHR), scaling)
    with at_home(h_SJ):
        products = _products(plan, top_k, sentinels, tile, weight_EHI)
        y_TH, u2_SR = down_forward(products, dense(h_SJ), weights_TK.contiguous(), down, _gate(gate))
    return y_TH, _or_empty(u2_SR, h_SJ)


@expert_down.register_fake
def _(h_SJ, weights_TK, weight_EHI, bias_EH, lora_a_ERI, lora_b_EHR, scaling, plan, *_):
    y_TH = h_SJ.new_empty(weights_TK.shape[0], weight_EHI.shape[1])
    return y_TH, _empty_thin(h_SJ, plan[0].shape[0], lora_a_ERI)


@torch.library.custom_op("expertune::expert_down_backward", mutates_args=())
def expert_down_backward(
    dy_TH: Tensor,
    h_SJ: Tensor,
    weights_TK: Tensor,
    u2_SR: Tensor,
    weight_EHI: Tensor,
    bias_EH: Tensor | None,
    lora_a_ERI: Tensor | None,
    lora_b_EHR: Tensor | None,
    scaling: float,
    plan: list[Tensor],
    top_k: int,
    sentinels: bool,
    gate: str,
    tile: list[int] | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, of the routing weights, of weight, bias, A and B, empty where `needs` says no."""
    down = unflatten_projection((weight_EHI, bias_EH, lora_a_ERI, lora_b_EHR), scaling)
    with at_home(h_SJ):
        products = _products(plan, top_k, sentinels, tile, weight_EHI)
        *grads, _ = down_backward(
            products, dense(h_SJ), weights_TK.contiguous(), u2_SR, down, _gate(gate), dy_TH, needs, reuse_h=False
        )
    return _as_outputs(grads, (h_SJ, weights_TK, weight_EHI, bias_EH, lora_a_ERI, lora_b_EHR))


@expert_down_backward.register_fake
def _(dy_TH, h_SJ, weights_TK, u2_SR, *rest):
    return _fake_outputs((h_SJ, weights_TK, *rest[:4]), rest[-1])


# Autograd: each forward op saves what its backward op takes. u is no output that could be differentiated.


def _save_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TH, weight, bias, lora_a, lora_b, scaling, plan, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_TH, output[1], weight, bias, lora_a, lora_b, *plan)
    ctx.scaling = scaling


def _grad_up(ctx: Any, dh_SJ: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved, plan = ctx.saved_tensors[:-4], list(ctx.saved_tensors[-4:])
    needs = list(ctx.needs_input_grad[:5])
    grads = expert_up_backward(dh_SJ, *saved, ctx.scaling, plan, *ctx.options, needs)
    return *_needed(grads, needs), None, [None] * len(plan), *[None] * len(ctx.options)


def _save_down(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h_SJ, weights_TK, weight, bias, lora_a, lora_b, scaling, plan, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(h_SJ, weights_TK, output[1], weight, bias, lora_a, lora_b, *plan)
    ctx.scaling = scaling


def _grad_down(ctx: Any, dy_TH: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved, plan = ctx.saved_tensors[:-4], list(ctx.saved_tensors[-4:])
    needs = list(ctx.needs_input_grad[:6])
    grads = expert_down_backward(dy_TH, *saved, ctx.scaling, plan, *ctx.options, needs)
    return *_needed(grads, needs), None, [None] * len(plan), *[None] * len(ctx.options)


expert_up.register_autograd(_grad_up, setup_context=_save_up)
expert_down.register_autograd(_grad_down, setup_context=_save_down)


# What an op's arguments stand for, and what it returns.


def _products(
    plan: Sequence[Tensor], top_k: int, sentinels: bool, tile: Sequence[int] | None, weight_EYX: Tensor
) -> Products:
    slot_of_row_S, row_of_slot_S, token_of_row_S, row_fence_F = plan
    num_rows, num_experts = slot_of_row_S.shape[0], weight_EYX.shape[0]
    num_tokens = row_of_slot_S.shape[0] // top_k
    expert_plan = ExpertPlan(
        num_tokens, top_k, num_experts, slot_of_row_S, row_of_slot_S, token_of_row_S, row_fence_F, sentinels
    )
    if tile is None:
        return Products.of(expert_plan, pick_tile(num_rows, num_experts, weight_EYX.dtype, weight_EYX.device))
    return Products.of(expert_plan, LinearTile(*tile))  # type: ignore[arg-type]


def _gate(name: str) -> Gate | None:
    return None if name == NO_GATE else Gate(name)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _empty_thin(rows_NX: Tensor, num_rows: int, lora_a_ERX: Tensor | None) -> Tensor:
    """The fake of u: [S, R']."""
    if lora_a_ERX is None:
        return rows_NX.new_empty(0)
    return rows_NX.new_empty(num_rows, pad_rank(int(lora_a_ERX.shape[1])))


def _as_outputs(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Any:
    """A tuple: each gradient in the dtype and the strides that `_fake_outputs` promises, empty if there is none."""
    *dense_grads, db = [
        _no_gradient(inputs) if grad is None or of is None else grad.to(of.dtype)
        for grad, of in zip(grads, inputs, strict=True)
    ]
    return *(grad.contiguous() for grad in dense_grads), db


def _fake_outputs(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Contiguous, but the last, B's, which lies as B does (`lay_out_as`)."""
    formats = [torch.contiguous_format] * (len(inputs) - 1) + [torch.preserve_format]
    return tuple(
        torch.empty_like(of, memory_format=layout) if of is not None and need else _no_gradient(inputs)
        for of, need, layout in zip(inputs, needs, formats, strict=True)
    )


def _no_gradient(inputs: Sequence[Tensor | None]) -> Tensor:
    assert inputs[0] is not None
    return inputs[0].new_empty(0)


def _needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]
