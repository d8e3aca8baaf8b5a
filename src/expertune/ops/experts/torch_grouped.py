"""The expert MLP with LoRA on torch's grouped products: the CPU, and any GPU without a faster backend.

Forward, rows sorted by expert, s over S = T * K rows of expert e, token t, routing weight p:

    u1 = A1[e] x_t            h = W1[e] x_t + b1[e] + s1 B1[e] u1          a = act(h)
    u2 = A2[e] a              z = W2[e] a   + b2[e] + s2 B2[e] u2          y_t = sum over K of p z

Backward, from dy [T, H]; W_eff = W + s B A is never formed, nor dW of a frozen weight:

    v2 = s2 B2[e]^T dy_t      da = W2[e]^T dy_t + A2[e]^T v2               (before the factor p)
    dp = <da, a> + <dy_t, b2[e]>                                           (so z is not needed, nor kept)
    dh = act'(h) (p da)       v1 = s1 B1[e]^T dh
    dx = sum over K of W1[e]^T dh + A1[e]^T v1
    dA1 = sum of v1 x_t^T     dB1 = s1 sum of dh u1^T     dA2 = sum of p v2 a^T     dB2 = s2 sum of p dy_t u2^T

Saved: x (the caller's own), h [S, J], u1 and u2 [S, R], the routing weights and the plan. The gathered x and a are
recomputed. FLOPs: 2 S (J H + H I) forward, the same again for dx, plus the skinny products of rank R.
Everything runs in the dtype of the weights; sums inside a product are fp32. Deterministic: no atomics.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.ops.experts.types import Activation, ExpertLora, ExpertProjection
from expertune.ops.plan import ExpertPlan

# What torch's grouped_mm asks of pointers and strides; ranks are padded with zeros up to it, odd widths go to a loop.
_ALIGNMENT_BYTES = 16


def grouped_expert_mlp(
    x_TH: Tensor,
    weights_TK: Tensor,
    plan: ExpertPlan,
    up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
) -> Tensor:
    """Compute `y_t = sum over K of p * (W2 act(W1 x + ...) + ...)` with the adapters of `up` and `down` unfolded.

    x_TH: [T, H] float. weights_TK: [T, K] float, the routing weights. plan: from `build_plan` of the same routing.
    up: [E, J, H]. down: [E, H, I]. activation: [S, J] to [S, I]; any function of autograd without parameters of its
    own, for its derivative is taken from autograd and gradients to anything it closes over are not computed.
    Returns [T, H] in the dtype of x. Gradients: x, weights_TK, both adapters (in the adapter's dtype), and weights and
    biases of the base when, and only when, they require it; an expert without rows gets exact zeros.
    Raises ValueError, naming the argument, if shapes or devices do not belong together.
    """
    check_expert_mlp(x_TH, weights_TK, plan, up, down)
    compute_dtype = up.weight_EYX.dtype
    y_TH = _GroupedExpertMLP.apply(
        plan,
        activation,
        (scaling_of(up), scaling_of(down)),
        x_TH.to(compute_dtype),
        weights_TK,
        *flatten_projection(up),
        *flatten_projection(down),
    )
    return y_TH.to(x_TH.dtype)


def grouped_expert_linear(rows_SX: Tensor, projection: ExpertProjection, plan: ExpertPlan) -> Tensor:
    """Compute one projection `W[e] x + b[e] + s B[e] (A[e] x)` of rows that are already sorted by expert.

    The piece for blocks with something of their own between or after the two projections (a norm with weights, say).
    rows_SX: [S, in] in plan order. Returns [S, out] in the weight's dtype; sentinel rows are zero.
    """
    projection.check("projection")
    if rows_SX.shape != (plan.num_rows, projection.weight_EYX.shape[2]):
        need = (plan.num_rows, projection.weight_EYX.shape[2])
        raise ValueError(f"rows_SX: got shape {tuple(rows_SX.shape)}, need {need} (rows of the plan, in)")
    rows_SX = rows_SX.to(projection.weight_EYX.dtype)
    return _GroupedExpertLinear.apply(plan, scaling_of(projection), rows_SX, *flatten_projection(projection))


def gather_rows(x_TH: Tensor, plan: ExpertPlan) -> Tensor:
    """Bring tokens [T, H] into plan order [S, H]; sentinel rows are zero. Differentiable."""
    return _zero_sentinels(x_TH[plan.token_of_row_S], plan)


def combine_rows(z_SH: Tensor, weights_TK: Tensor, plan: ExpertPlan) -> Tensor:
    """Sum the K rows of each token, weighted: [S, H] in plan order to [T, H], accumulated in fp32. Differentiable."""
    z_TKH = plan.to_slots(_zero_sentinels(z_SH, plan)).unflatten(0, (plan.num_tokens, plan.top_k))
    return (z_TKH * weights_TK.unsqueeze(-1).to(z_SH.dtype)).sum(dim=1)


class _Flat(NamedTuple):
    """An ExpertProjection as autograd takes it: tensors only."""

    weight_EYX: Tensor
    bias_EY: Tensor | None
    a_ERX: Tensor | None
    b_EYR: Tensor | None


def flatten_projection(projection: ExpertProjection) -> _Flat:
    if projection.lora is None:
        return _Flat(projection.weight_EYX, projection.bias_EY, None, None)
    return _Flat(projection.weight_EYX, projection.bias_EY, projection.lora.a_ERX, projection.lora.b_EYR)


def unflatten_projection(tensors: Sequence[Tensor | None], scaling: float) -> ExpertProjection:
    """The projection again, from the four tensors of `flatten_projection`."""
    weight_EYX, bias_EY, a_ERX, b_EYR = tensors
    assert weight_EYX is not None
    lora = None if a_ERX is None or b_EYR is None else ExpertLora(a_ERX, b_EYR, scaling)
    return ExpertProjection(weight_EYX, bias_EY, lora)


def scaling_of(projection: ExpertProjection) -> float:
    """The adapter's scaling, 0 without an adapter."""
    return projection.lora.scaling if projection.lora else 0.0


class _GroupedExpertMLP(torch.autograd.Function):
    """Inputs 0-2 are not tensors (plan, activation, scalings); 3 is x, 4 the routing weights, 5-8 up, 9-12 down."""

    @staticmethod
    def forward(ctx, plan, activation, scalings, x_TH, weights_TK, *flat):  # type: ignore[no-untyped-def]
        up, down = unflatten_projection(flat[:4], scalings[0]), unflatten_projection(flat[4:], scalings[1])
        with _no_autocast(x_TH):
            h_SJ, u1_SR = _project(x_TH[plan.token_of_row_S], up, plan)
            z_SH, u2_SR = _project(activation(h_SJ), down, plan)
            z_SH = z_SH.mul_(_weight_of_row(weights_TK, plan))
            y_TH = _sum_slots(_zero_sentinels(z_SH, plan), plan)
        ctx.plan, ctx.activation, ctx.scalings = plan, activation, scalings
        ctx.save_for_backward(x_TH, weights_TK, h_SJ, u1_SR, u2_SR, *flat)
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):  # type: ignore[no-untyped-def]
        plan = ctx.plan
        x_TH, weights_TK, h_SJ, u1_SR, u2_SR, *flat = ctx.saved_tensors
        up, down = unflatten_projection(flat[:4], ctx.scalings[0]), unflatten_projection(flat[4:], ctx.scalings[1])
        need_x, need_weights = ctx.needs_input_grad[3:5]
        need_up, need_down = _Flat(*ctx.needs_input_grad[5:9]), _Flat(*ctx.needs_input_grad[9:13])
        dx_TH = dweights_TK = None
        with _no_autocast(x_TH):
            p_S1 = _weight_of_row(weights_TK, plan)
            dz_SH = dy_TH[plan.token_of_row_S]  # before the factor p
            v2_SR = _adapter_grad(dz_SH, down, plan)
            da_SI = _input_grad(dz_SH, v2_SR, down, plan)
            with torch.enable_grad():
                h_leaf_SJ = h_SJ.detach().requires_grad_()
                a_SI = activation_out = ctx.activation(h_leaf_SJ)
            a_SI = a_SI.detach()
            if need_weights:
                dp_S = (da_SI * a_SI).sum(dim=-1, dtype=_sum_dtype(da_SI))
                if down.bias_EY is not None:
                    bias_SH = down.bias_EY[plan.expert_of_row()]
                    dp_S = dp_S + (dz_SH * bias_SH).sum(dim=-1, dtype=dp_S.dtype)
                dp_S = _zero_sentinels(dp_S.unsqueeze(-1), plan)
                dweights_TK = plan.to_slots(dp_S).view_as(weights_TK).to(weights_TK.dtype)
            grads_down = _parameter_grads(dz_SH, v2_SR, a_SI, u2_SR, down, plan, need_down, p_S1)
            del dz_SH, a_SI
            if need_x or any(need_up):
                (dh_SJ,) = torch.autograd.grad(activation_out, h_leaf_SJ, da_SI.mul_(p_S1))
                del activation_out, da_SI
                v1_SR = _adapter_grad(dh_SJ, up, plan)
                if need_x:
                    dx_TH = _sum_slots(_zero_sentinels(_input_grad(dh_SJ, v1_SR, up, plan), plan), plan)
                xs_SH = x_TH[plan.token_of_row_S] if need_up.a_ERX or need_up.weight_EYX else None
                grads_up = _parameter_grads(dh_SJ, v1_SR, xs_SH, u1_SR, up, plan, need_up)
            else:
                grads_up = _Flat(None, None, None, None)  # type: ignore[arg-type]
        return None, None, None, dx_TH, dweights_TK, *grads_up, *grads_down


class _GroupedExpertLinear(torch.autograd.Function):
    """Inputs 0-1 are not tensors (plan, scaling); 2 are the rows, 3-6 the projection."""

    @staticmethod
    def forward(ctx, plan, scaling, rows_SX, *flat):  # type: ignore[no-untyped-def]
        with _no_autocast(rows_SX):
            out_SY, u_SR = _project(rows_SX, unflatten_projection(flat, scaling), plan)
        ctx.plan, ctx.scaling = plan, scaling
        ctx.save_for_backward(rows_SX, u_SR, *flat)
        return _zero_sentinels(out_SY, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_SY):  # type: ignore[no-untyped-def]
        rows_SX, u_SR, *flat = ctx.saved_tensors
        projection, plan = unflatten_projection(flat, ctx.scaling), ctx.plan
        drows_SX = None
        with _no_autocast(rows_SX):
            v_SR = _adapter_grad(dout_SY, projection, plan)
            if ctx.needs_input_grad[2]:
                drows_SX = _zero_sentinels(_input_grad(dout_SY, v_SR, projection, plan), plan)
            grads = _parameter_grads(dout_SY, v_SR, rows_SX, u_SR, projection, plan, _Flat(*ctx.needs_input_grad[3:7]))
        return None, None, drows_SX, *grads


# One projection, forward and backward: rows are in plan order, rows past the last fence are garbage in and garbage out.


def _project(rows_SX: Tensor, projection: ExpertProjection, plan: ExpertPlan) -> tuple[Tensor, Tensor | None]:
    """W x + b + s B (A x), and u = A x for the backward."""
    out_SY = _grouped_mm(rows_SX, projection.weight_EYX.transpose(1, 2), plan)
    if projection.bias_EY is not None:
        out_SY += projection.bias_EY[plan.expert_of_row()]
    if projection.lora is None:
        return out_SY, None
    a_ERX, b_EYR = _lora_operands(projection.lora, rows_SX)
    u_SR = _grouped_mm(rows_SX, a_ERX.transpose(1, 2), plan)
    out_SY.add_(_grouped_mm(u_SR, b_EYR.transpose(1, 2), plan), alpha=projection.lora.scaling)
    return out_SY, u_SR


def _adapter_grad(dout_SY: Tensor, projection: ExpertProjection, plan: ExpertPlan) -> Tensor | None:
    """v = s B^T dout, the gradient that reaches u."""
    if projection.lora is None:
        return None
    _, b_EYR = _lora_operands(projection.lora, dout_SY)
    return _grouped_mm(dout_SY, b_EYR, plan).mul_(projection.lora.scaling)


def _input_grad(dout_SY: Tensor, v_SR: Tensor | None, projection: ExpertProjection, plan: ExpertPlan) -> Tensor:
    """W^T dout + A^T v."""
    drows_SX = _grouped_mm(dout_SY, projection.weight_EYX, plan)
    if projection.lora is not None and v_SR is not None:
        drows_SX += _grouped_mm(v_SR, _lora_operands(projection.lora, dout_SY)[0], plan)
    return drows_SX


def _parameter_grads(
    dout_SY: Tensor,
    v_SR: Tensor | None,
    rows_SX: Tensor | None,
    u_SR: Tensor | None,
    projection: ExpertProjection,
    plan: ExpertPlan,
    need: _Flat,
    row_scale_S1: Tensor | None = None,
) -> _Flat:
    """Gradients of weight, bias, A and B, each only if needed; `row_scale_S1` multiplies every row of the sums."""

    def scaled(rows: Tensor) -> Tensor:
        return rows if row_scale_S1 is None else (rows * row_scale_S1).to(rows.dtype)

    dweight = dbias = da = db = None
    if need.weight_EYX and rows_SX is not None:
        dweight = grouped_outer(dout_SY, scaled(rows_SX), plan)
    if need.bias_EY:
        ones_S8 = dout_SY.new_ones(dout_SY.shape[0], 8)  # 8 columns: one would break the alignment rule
        dbias = grouped_outer(scaled(ones_S8), dout_SY, plan)[:, 0]
    lora = projection.lora
    if lora is not None and need.a_ERX and v_SR is not None and rows_SX is not None:
        da = grouped_outer(scaled(v_SR), rows_SX, plan)[:, : lora.rank].to(lora.a_ERX.dtype)
    if lora is not None and need.b_EYR and u_SR is not None:
        db = grouped_outer(dout_SY, scaled(u_SR).mul(lora.scaling), plan)[..., : lora.rank].to(lora.b_EYR.dtype)
    return _Flat(dweight, dbias, da, db)  # type: ignore[arg-type]


# Grouped products.


def _grouped_mm(rows_SX: Tensor, weight_EXY: Tensor, plan: ExpertPlan) -> Tensor:
    """[S, X] times the [X, Y] of each row's expert: [S, Y]."""
    if _torch_takes(rows_SX, weight_EXY):
        return F.grouped_mm(rows_SX, weight_EXY, offs=plan.row_ends_E)
    out_SY = rows_SX.new_empty(rows_SX.shape[0], weight_EXY.shape[2])
    for expert, rows in _row_blocks(plan):
        torch.mm(rows_SX[rows], weight_EXY[expert], out=out_SY[rows])
    return out_SY


def grouped_outer(left_SY: Tensor, right_SX: Tensor, plan: ExpertPlan) -> Tensor:
    """left^T right over the rows of each expert: [E, Y, X], zero for an expert without rows."""
    if _torch_takes(left_SY, right_SX):
        return F.grouped_mm(left_SY.t(), right_SX, offs=plan.row_ends_E)
    out_EYX = left_SY.new_zeros(plan.num_experts, left_SY.shape[1], right_SX.shape[1])
    for expert, rows in _row_blocks(plan):
        torch.mm(left_SY[rows].t(), right_SX[rows], out=out_EYX[expert])
    return out_EYX


def _torch_takes(left: Tensor, right: Tensor) -> bool:
    """Whether torch's grouped_mm has these operands: not fp64, one dense dimension, other strides of 16 bytes each."""
    return left.dtype != torch.float64 and _aligned(left) and _aligned(right)


def _aligned(operand: Tensor) -> bool:
    if 1 not in operand.stride()[-2:]:
        return False
    wide = (stride for stride in operand.stride() if stride != 1)
    return operand.data_ptr() % _ALIGNMENT_BYTES == 0 and all(
        stride * operand.element_size() % _ALIGNMENT_BYTES == 0 for stride in wide
    )


def _row_blocks(plan: ExpertPlan) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows; reads the fence on the host, which synchronises a GPU."""
    fence = pairwise(plan.row_fence_F.tolist())
    return [(expert, slice(first, end)) for expert, (first, end) in enumerate(fence) if end > first]


def _lora_operands(lora: ExpertLora, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, R, in] and B [E, out, R] as grouped_mm takes them: the rows' dtype, contiguous, R padded with zeros.

    Thin copies: PEFT stores B with the expert index fastest, which no grouped product reads.
    """
    padding = -lora.rank % (_ALIGNMENT_BYTES // rows.element_size())
    a_ERX, b_EYR = F.pad(lora.a_ERX, (0, 0, 0, padding)), F.pad(lora.b_EYR, (0, padding))
    return a_ERX.to(rows.dtype).contiguous(), b_EYR.to(rows.dtype).contiguous()


# Rows and slots.


def _weight_of_row(weights_TK: Tensor, plan: ExpertPlan) -> Tensor:
    return weights_TK.reshape(-1)[plan.slot_of_row_S].unsqueeze(-1)


def _sum_slots(rows_SH: Tensor, plan: ExpertPlan) -> Tensor:
    """The K rows of each token summed, in fp32 inside: [T, H]."""
    return plan.to_slots(rows_SH).unflatten(0, (plan.num_tokens, plan.top_k)).sum(dim=1)


def _zero_sentinels(rows_SX: Tensor, plan: ExpertPlan) -> Tensor:
    return rows_SX.masked_fill(plan.sentinel_rows(), 0) if plan.has_sentinels else rows_SX


def _sum_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _no_autocast(rows: Tensor) -> torch.autocast:
    # The dtype is the weights': a product that autocast lowered would meet operands of another dtype.
    return torch.autocast(rows.device.type, enabled=False)


def check_expert_mlp(
    x_TH: Tensor, weights_TK: Tensor, plan: ExpertPlan, up: ExpertProjection, down: ExpertProjection
) -> None:
    up.check("up")
    down.check("down")
    if x_TH.shape != (plan.num_tokens, up.weight_EYX.shape[2]):
        need = (plan.num_tokens, up.weight_EYX.shape[2])
        raise ValueError(f"x_TH: got shape {tuple(x_TH.shape)}, need {need} (tokens of the plan, in of up)")
    if weights_TK.shape != (plan.num_tokens, plan.top_k):
        raise ValueError(f"weights_TK: got shape {tuple(weights_TK.shape)}, need {(plan.num_tokens, plan.top_k)}")
    for name, projection in (("up", up), ("down", down)):
        if projection.num_experts != plan.num_experts:
            raise ValueError(f"{name}: got {projection.num_experts} experts, the plan has {plan.num_experts}")
        if projection.weight_EYX.device != x_TH.device:
            raise ValueError(f"{name}.weight_EYX: on {projection.weight_EYX.device}, x_TH is on {x_TH.device}")
    if up.weight_EYX.dtype != down.weight_EYX.dtype:
        raise ValueError(f"down.weight_EYX: got {down.weight_EYX.dtype}, up.weight_EYX has {up.weight_EYX.dtype}")
