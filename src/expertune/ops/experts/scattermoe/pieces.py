"""The pieces of the fused expert MLP, each public and alone, for blocks of another build.

    group_rows                  out_s = c_s x_t                                     plan order, t the token of row s
    expert_linear               out_s = W[e] x + b[e] + s B[e] u,  u = A[e] x       e the expert of row s
    expert_linear_input_grad    dx_s = W[e]^T dout + s A[e]^T v,   v = B[e]^T dout
    expert_linear_adapter_grads dA[e] = s sum of p v x^T,          dB[e] = s sum of p dout u^T

The plan is `expertune.ops.plan.build_plan`. Whole MLPs: `scattermoe_expert_mlp`, which runs the same kernels and
saves less between the two projections.

Two forms of a projection with an adapter, equal up to rounding (`pick_form` is the rule):
    fused   two launches: u = A x, then W x with B (s u) as one more step in the same accumulator
    split   three products: W x, u = A x and B u, each rounded, then W x + s (B u)
Ranks up to 256 run fused: u is at most four narrow columns of tiles, and R' (R padded to a power of two) at most four
steps of 64 beside the in / 64 of the main loop. Beyond 256 the steps are no longer few: three plain products keep the
last one in the tile that suits it, for S out values more to read and write. Not measured.

Saved for the backward: x (the caller's own), u, the routing weights and the plan. Deterministic, no atomics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.ops.experts.scattermoe.combine import combine
from expertune.ops.experts.scattermoe.pack import pack_lora
from expertune.ops.experts.scattermoe.products import (
    Products,
    at_home,
    bias_part,
    check_devices,
    check_dtype,
    dense,
    packed,
    tensors_of,
)
from expertune.ops.experts.scattermoe.rows import launch_group_rows, launch_row_dots
from expertune.ops.experts.scattermoe.sums import RowsOf
from expertune.ops.experts.scattermoe.tiles import RowTables, build_row_tables
from expertune.ops.experts.scattermoe.tiling import LinearTile, pad_rank, pick_tile
from expertune.ops.experts.torch_grouped import flatten_projection, scaling_of, unflatten_projection
from expertune.ops.experts.types import ExpertProjection
from expertune.ops.plan import ExpertPlan

Output = Literal["grouped", "scattered", "combined"]
Form = Literal["auto", "fused", "split"]
LARGEST_FUSED_RANK = 256


def pick_form(rank: int) -> Form:
    """The form that "auto" runs: fused for ranks up to 256, split above."""
    return "fused" if rank <= LARGEST_FUSED_RANK else "split"


def group_rows(x_NH: Tensor, plan: ExpertPlan, *, coefficients_TK: Tensor | None = None) -> Tensor:
    """Bring rows into plan order: `out_s = c_s x_s`, computed in fp32, stored in the dtype of x.

    x_NH: [T, H], every token's row goes to its K rows (fan-out K), or [T, K, H], a row for each slot (fan-out 1).
        bfloat16, float16 or float32; any strides.
    coefficients_TK: [T, K] float, a factor of each row, or None.
    Returns [S, H] contiguous; sentinel rows are zero. Gradients: x (over K summed in fp32 and in order: deterministic)
    and coefficients_TK.
    Raises ValueError, naming the argument, if shapes, dtypes or devices do not belong together.
    """
    num_tokens, top_k = plan.num_tokens, plan.top_k
    if x_NH.shape[:-1] not in ((num_tokens,), (num_tokens, top_k)):
        need = f"[{num_tokens}, width] or [{num_tokens}, {top_k}, width]"
        raise ValueError(f"x_NH: got shape {tuple(x_NH.shape)}, need {need} (tokens and slots of the plan)")
    check_dtype("x_NH", x_NH)
    check_devices(x_NH, "x_NH", plan, coefficients_TK=coefficients_TK)
    if coefficients_TK is not None:
        _check_slots("coefficients_TK", coefficients_TK, plan)
        coefficients_TK = coefficients_TK.contiguous()
    if x_NH.dim() == 3:
        plan = replace(plan, num_tokens=plan.num_rows, top_k=1, token_of_row_S=plan.slot_of_row_S)
        x_NH = x_NH.flatten(0, 1)
        coefficients_TK = None if coefficients_TK is None else coefficients_TK.view(-1, 1)
    return _GroupRows.apply(plan, x_NH, coefficients_TK)


def expert_linear(
    x_NX: Tensor,
    projection: ExpertProjection,
    plan: ExpertPlan,
    *,
    grouped: bool = False,
    output: Output = "grouped",
    weights_TK: Tensor | None = None,
    form: Form = "auto",
    tile: LinearTile | None = None,
    tables: RowTables | None = None,
) -> Tensor:
    """Compute one projection, `W[e] x + b[e] + s B[e] (A[e] x)`, of every routed row.

    x_NX: [T, in], gathered in the load by the token of each row, or, with `grouped`, [S, in] in plan order. Any
        strides; cast to the dtype of the weight.
    projection: weight [E, out, in] in bfloat16, float16 or float32, and any widths; rows of a multiple of 16 bytes are
        copied by tensor descriptors, others are loaded one by one.
    output: "grouped": [S, out] in plan order, sentinel rows zero. "scattered": [T, K, out], row of token t and slot k
        at [t, k], sentinel slots zero. "combined": [T, out], the K rows of each token summed with `weights_TK`.
    weights_TK: [T, K] float, the routing weights, for "combined" and only there.
    form: "auto" (see `pick_form`), "fused" or "split"; without an adapter there is one form.
    tile: of the big products, by default `pick_tile`'s. tables: `build_row_tables(plan, tile.rows)`, if several
        projections of one plan share them.
    Returns the weight's dtype. Gradients: x, weights_TK, the adapter (fp32 sums, stored in its dtype), weight and bias
    of the base when, and only when, they require it; an expert without rows gets exact zeros.
    Raises ValueError, naming the argument, before any work if arguments do not belong together.
    """
    _check_linear("x_NX", x_NX, 2, projection, plan, grouped)
    if output not in get_args(Output):
        raise ValueError(f"output: got {output!r}, need one of {', '.join(get_args(Output))}")
    if (weights_TK is not None) != (output == "combined"):
        what = "None" if weights_TK is None else "a tensor"
        raise ValueError(f'weights_TK: got {what} with output="{output}"; "combined", and only that, needs them')
    if weights_TK is not None:
        _check_slots("weights_TK", weights_TK, plan)
        check_devices(x_NX, "x_NX", plan, weights_TK=weights_TK)
        weights_TK = weights_TK.contiguous()
    call = _make_call(projection, plan, form, tile, tables)
    x_NX = x_NX.to(projection.weight_EYX.dtype)
    options = _Options(call, grouped, output, scaling_of(projection))
    return _ExpertLinear.apply(options, x_NX, weights_TK, *flatten_projection(projection))


@torch.no_grad()
def expert_linear_input_grad(
    dout_NY: Tensor,
    projection: ExpertProjection,
    plan: ExpertPlan,
    *,
    grouped: bool = True,
    form: Form = "auto",
    tile: LinearTile | None = None,
    tables: RowTables | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of a projection's rows, `W[e]^T dout + s A[e]^T v` with `v = B[e]^T dout`; no autograd.

    dout_NY: [S, out] in plan order, or, with grouped=False, [T, out] that every row reads by its token.
    Returns ([S, in] in plan order, v [S, R'] or None without an adapter), both in the dtype of the weight; R' is the
    rank padded with zeros to a power of two from 16 on. Sentinel rows are zero. v is without the scaling, as
    `expert_linear_adapter_grads` takes it. The gradient of gathered tokens is the sum over their K rows: `combine`.
    form, tile, tables, errors: as for `expert_linear`.
    """
    _check_linear("dout_NY", dout_NY, 1, projection, plan, grouped)
    call = _make_call(projection, plan, form, tile, tables)
    with at_home(dout_NY):
        dout = call.rows_of(dout_NY.to(projection.weight_EYX.dtype), grouped=grouped)
        lora = packed(projection)
        v_SR = call.thin(dout, lora.b_EYR.transpose(1, 2)) if lora else None
        drows_SX = call.input_grad(dout, projection, lora, v_SR)
        return _zero_sentinels(drows_SX, plan), None if v_SR is None else _zero_sentinels(v_SR, plan)


@torch.no_grad()
def expert_linear_adapter_grads(
    dout_NY: Tensor,
    x_NX: Tensor,
    projection: ExpertProjection,
    plan: ExpertPlan,
    *,
    grouped_dout: bool = True,
    grouped: bool = False,
    u_SR: Tensor | None = None,
    v_SR: Tensor | None = None,
    weights_TK: Tensor | None = None,
    tile: LinearTile | None = None,
    tables: RowTables | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of a projection's adapter, `dA = s sum p v x^T` and `dB = s sum p dout u^T`; no autograd.

    dout_NY: [S, out] in plan order, or, with grouped_dout=False, [T, out] that every row reads by its token.
    x_NX: [T, in], or, with `grouped`, [S, in] in plan order, as `expert_linear` had them.
    u_SR, v_SR: [S, R'] contiguous in the weight's dtype, `A x` and `B^T dout` where they are known
        (`expert_linear_input_grad` returns v); computed where they are None.
    weights_TK: [T, K], a factor p of each row (the routing weights of a combined output), or None.
    Returns (dA [E, R, in], dB [E, out, R]) in the adapter's dtype and strides of B, from fp32 sums in a fixed order;
    an expert without rows gets exact zeros.
    tile, tables, errors: as for `expert_linear`; ValueError also if the projection has no adapter.
    """
    _check_linear("dout_NY", dout_NY, 1, projection, plan, grouped_dout)
    _check_linear("x_NX", x_NX, 2, projection, plan, grouped)
    lora, dtype = projection.lora, projection.weight_EYX.dtype
    if lora is None:
        raise ValueError("projection.lora: got None, need an adapter")
    for name, thin_SR in (("u_SR", u_SR), ("v_SR", v_SR)):
        need = (plan.num_rows, pad_rank(lora.rank))
        if thin_SR is not None and (thin_SR.shape != need or thin_SR.dtype != dtype or not thin_SR.is_contiguous()):
            got = f"{tuple(thin_SR.shape)} {thin_SR.dtype}"
            raise ValueError(f"{name}: got {got}, need {need} {dtype}, contiguous (the padded rank)")
    check_devices(x_NX, "x_NX", plan, dout_NY=dout_NY, u_SR=u_SR, v_SR=v_SR, weights_TK=weights_TK)
    if weights_TK is not None:
        _check_slots("weights_TK", weights_TK, plan)
    call = _make_call(projection, plan, "auto", tile, tables)
    with at_home(x_NX):
        p_S = None if weights_TK is None else weights_TK.reshape(-1)[plan.slot_of_row_S]
        dout = call.rows_of(dout_NY.to(dtype), grouped=grouped_dout)
        x = call.rows_of(x_NX.to(dtype), grouped=grouped)
        as_packed = pack_lora(lora, dtype)
        u_SR = call.thin(x, as_packed.a_ERX) if u_SR is None else u_SR
        v_SR = call.thin(dout, as_packed.b_EYR.transpose(1, 2)) if v_SR is None else v_SR
        return call.a_grad(v_SR, x, lora, p_S), call.b_grad(u_SR, dout, lora, p_S)


@dataclass(frozen=True)
class _Options:
    """What is no tensor of autograd's."""

    call: Products
    grouped: bool
    output: Output
    scaling: float


class _GroupRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, x_NH, coefficients_TK):
        ctx.plan = plan
        ctx.save_for_backward(x_NH if ctx.needs_input_grad[2] else None, coefficients_TK)
        with at_home(x_NH):
            return launch_group_rows(dense(x_NH), coefficients_TK, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_SH):
        x_NH, coefficients_TK = ctx.saved_tensors
        dout_SH, dx_NH, dcoefficients_TK = dout_SH.contiguous(), None, None
        with at_home(dout_SH):
            if ctx.needs_input_grad[1]:
                dx_NH = combine(dout_SH, coefficients_TK, ctx.plan)
            if ctx.needs_input_grad[2]:
                dots_TK = launch_row_dots(dout_SH, dense(x_NH), ctx.plan.token_of_row_S, ctx.plan)
                dcoefficients_TK = dots_TK.to(coefficients_TK.dtype)
        return None, dx_NH, dcoefficients_TK


class _ExpertLinear(torch.autograd.Function):
    """Input 0 holds no tensors of autograd's; 1: the rows, 2: routing weights or None, 3-6: the projection."""

    @staticmethod
    def forward(ctx, options, x_NX, weights_TK, *flat):
        with at_home(x_NX):
            out, u_SR = _forward(options, x_NX, weights_TK, unflatten_projection(flat, options.scaling))
        ctx.options = options
        ctx.save_for_backward(x_NX, weights_TK, u_SR, *flat)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x_NX, weights_TK, u_SR, *flat = ctx.saved_tensors
        projection = unflatten_projection(flat, ctx.options.scaling)
        with at_home(x_NX):
            return None, *_backward(ctx.options, x_NX, weights_TK, u_SR, projection, dout, ctx.needs_input_grad[1:])


def _forward(
    options: _Options, x_NX: Tensor, weights_TK: Tensor | None, projection: ExpertProjection
) -> tuple[Tensor, Tensor | None]:
    """(the output, u for the backward)."""
    call, plan = options.call, options.call.plan
    x, lora = call.rows_of(x_NX, grouped=options.grouped), packed(projection)
    u_SR = call.thin(x, lora.a_ERX) if lora else None
    scattered = options.output == "scattered"
    out_SY = call.forward(x, projection, lora, u_SR, plan.slot_of_row_S if scattered else None)
    if options.output == "combined":
        return combine(out_SY, weights_TK, plan), u_SR
    out_SY = _zero_sentinels(out_SY, plan, of_slots=scattered)
    return out_SY.unflatten(0, (plan.num_tokens, plan.top_k)) if scattered else out_SY, u_SR


def _backward(
    options: _Options,
    x_NX: Tensor,
    weights_TK: Tensor | None,
    u_SR: Tensor | None,
    projection: ExpertProjection,
    dout: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the rows, of the routing weights, and of weight, bias, A and B; None if not needed."""
    call, plan, (need_x, need_weights, *need) = options.call, options.call.plan, needs
    index_S = {"grouped": None, "scattered": plan.slot_of_row_S, "combined": plan.token_of_row_S}[options.output]
    rows = RowsOf(dense(dout.flatten(0, -2)), index_S)  # of a combined output: before the factor p
    x, lora = call.rows_of(x_NX, grouped=options.grouped), packed(projection)
    p_S = None if weights_TK is None else weights_TK.reshape(-1)[plan.slot_of_row_S]
    v_SR = dx_NX = dweights_TK = None
    if lora and (need_x or need_weights or need[2]):
        v_SR = call.thin(rows, lora.b_EYR.transpose(1, 2))
    if need_x or need_weights:
        drows_SX = call.input_grad(rows, projection, lora, v_SR)
        if need_weights and weights_TK is not None:  # <dy, W x + s B u> = <drows, x>: the rows of y need not be kept
            dweights_TK = launch_row_dots(drows_SX, *x, plan)
            if projection.bias_EY is not None:
                dweights_TK += bias_part(rows.rows_NX, projection.bias_EY, plan)
            dweights_TK = dweights_TK.to(weights_TK.dtype)
        if need_x and not options.grouped:
            dx_NX = combine(drows_SX, weights_TK, plan)
        elif need_x:
            drows_SX = drows_SX if p_S is None else (drows_SX * p_S.unsqueeze(1)).to(drows_SX.dtype)
            dx_NX = _zero_sentinels(drows_SX, plan)
    return dx_NX, dweights_TK, *call.parameter_grads(rows, v_SR, x, u_SR, projection, need, p_S)


def _zero_sentinels(rows_SX: Tensor, plan: ExpertPlan, *, of_slots: bool = False) -> Tensor:
    """In place: rows in plan order, or in slot order."""
    if not plan.has_sentinels:
        return rows_SX
    sentinels_S1 = plan.sentinel_rows()
    return rows_SX.masked_fill_(sentinels_S1[plan.row_of_slot_S] if of_slots else sentinels_S1, 0)


def _make_call(
    projection: ExpertProjection, plan: ExpertPlan, form: Form, tile: LinearTile | None, tables: RowTables | None
) -> Products:
    if form not in get_args(Form):
        raise ValueError(f"form: got {form!r}, need one of {', '.join(get_args(Form))}")
    weight_EYX, lora = projection.weight_EYX, projection.lora
    tile = tile or pick_tile(plan.num_rows, plan.num_experts, weight_EYX.dtype, weight_EYX.device)
    if tables is not None and tables.tiles.block_rows != tile.rows:
        raise ValueError(f"tables: got tiles of {tables.tiles.block_rows} rows, need {tile.rows} (rows of the tile)")
    runs = form if form != "auto" else pick_form(lora.rank if lora else 0)
    with at_home(weight_EYX):
        return Products(plan, tables or build_row_tables(plan, tile.rows), tile, fused=runs == "fused")


def _check_linear(
    name: str, rows: Tensor, width_dim: int, projection: ExpertProjection, plan: ExpertPlan, grouped: bool
) -> None:
    """Raise unless `rows` are as wide as dimension `width_dim` of the weight, one for each row or token of the plan."""
    projection.check("projection")
    check_dtype("projection.weight_EYX", projection.weight_EYX)
    if projection.num_experts != plan.num_experts:
        raise ValueError(f"projection: got {projection.num_experts} experts, the plan has {plan.num_experts}")
    need = (plan.num_rows if grouped else plan.num_tokens, projection.weight_EYX.shape[width_dim])
    if rows.shape != need:
        what = f"{'rows' if grouped else 'tokens'} of the plan, {'in' if width_dim == 2 else 'out'}"
        raise ValueError(f"{name}: got shape {tuple(rows.shape)}, need {need} ({what} of the projection)")
    if not rows.is_floating_point():
        raise ValueError(f"{name}: got dtype {rows.dtype}, need a floating-point tensor")
    check_devices(rows, name, plan, **tensors_of("projection", projection))


def _check_slots(name: str, slots_TK: Tensor, plan: ExpertPlan) -> None:
    need = (plan.num_tokens, plan.top_k)
    if slots_TK.shape != need or not slots_TK.is_floating_point():
        raise ValueError(f"{name}: got {tuple(slots_TK.shape)} {slots_TK.dtype}, need {need} floating-point")
