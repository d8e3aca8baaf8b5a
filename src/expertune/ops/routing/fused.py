"""Routing on a GPU: from logits to (weights, expert ids) in one launch, and its backward in another.

    s = score(x)                 c = s + bias, NaN as the lowest number         x [T, E] logits, fp32 inside
    groups: g = sum of a group's best c; only experts of the best groups stay
    ids = the K largest c, in order, the lowest index first among equals
    n = sum_k s + epsilon, or 1 without `normalize`                             w = scaling s / n     [T, K]
    backward, from dw [T, K]:
    r_k = scaling / n (dw_k - [normalize] sum_j dw_j s_j / n)                   the gradient of s at the K chosen
    softmax:            dx_e = s_e ([e chosen] r_e - sum_k r_k s_k)             every expert
    softmax of chosen:  the same, over the chosen alone
    sigmoid:            dx_e = r_e s_e (1 - s_e)                                the chosen, zero elsewhere
    sqrt(softplus):     dx_e = r_e sigmoid(x_e) / (2 s_e)                       the chosen, zero elsewhere

Saved: the logits, which are the caller's own, and the ids; scores are computed again. No atomics: two runs agree in
every bit. Scores that torch computes less than a few roundings apart may come in the other order.

A thread keeps up to 32 experts of a row in registers, and K times finds the largest value, then the lowest index that
has it: 6 instructions an expert and round. One 64-bit key of both would be one reduction, of 8 instructions, twice the
registers and as many shuffles; ints in the order of the floats were no shorter. Bytes: T E logits read and 12 T K
written (fp32 weights, int64 ids); backward as much read again and T E written. At T = 32768, E = 256, K = 8, fp32:
forward 36 MB, which are 9 us, but 72 instructions for each of 8.4 M logits (51 of them the rounds), most at half rate:
34 us on an H200, where torch's softmax, topk and the rest take 421; backward 17 (benchmarks/results/routing_h200.csv).
"""

from dataclasses import astuple
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.ops.integers import cdiv, next_power_of_2
from expertune.ops.routing.select import check_arguments, select_experts
from expertune.ops.routing.types import Routing, RoutingRule
from expertune.ops.triton_launch import Launcher, wait_for_earlier_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_EXPERTS = 1024  # a warp a row, 32 experts a thread
THREAD_EXPERTS = 32  # of one row, in registers: more lanes a row cost shuffles, fewer registers
MIN_LANES = 4  # of a row: 64 bytes of it are loaded at once
LOAD_BYTES = 16  # of one thread
NUM_WARPS = 1  # of a program: no row is shared among warps, and small batches spread over the multiprocessors
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # what NaN and -inf count as: above what must not be chosen


class _Tile(NamedTuple):
    """The logits of `tokens` rows as [tokens, slices, columns].

    Expert e is in slice e // step, column e % step; columns are `step` padded to a power of two. So Triton lays a row
    on few lanes (columns / values of one load), the rows beside it on the others, and all slices in the registers of
    one thread: the search for a maximum seldom crosses lanes. As [tokens, experts] a row would be a whole warp's. With
    groups a slice is a group.
    """

    tokens: int
    slices: int
    columns: int
    step: int


def _pick_tile(num_experts: int, num_groups: int, itemsize: int) -> _Tile:
    width = LOAD_BYTES // itemsize
    if num_groups > 1:
        step = num_experts // num_groups
        slices, columns = next_power_of_2(num_groups), next_power_of_2(step)
    else:
        padded = next_power_of_2(num_experts)
        step = columns = min(padded, width * max(MIN_LANES, padded // THREAD_EXPERTS))
        slices = padded // columns
    lanes = min(32, max(1, columns // width))
    return _Tile(32 // lanes * NUM_WARPS, slices, columns, step)


@triton.jit
def _max_of_row(x):  # type: ignore[no-untyped-def]
    """[tokens, 1, 1] of [tokens, slices, columns]; over the slices first, they are in one thread."""
    return tl.max(tl.max(x, axis=1, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _sum_of_row(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, axis=1, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)), to a few units in the last place also where exp(x) is small (Kahan's log1p)."""
    exp = tl.exp(-tl.abs(x))
    one_more = 1.0 + exp
    log1p = tl.where(one_more == 1.0, exp, tl.log(one_more) * (exp / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def _score(x, row_max, row_sum, SCORE: tl.constexpr):  # type: ignore[no-untyped-def]
    if SCORE == "softmax":
        x = tl.exp(x - row_max) * (1.0 / row_sum)  # one division a row: it is 8 instructions
    elif SCORE == "sigmoid" or SCORE == "sigmoid_of_chosen":
        x = tl.sigmoid(x)
    elif SCORE == "sqrt_softplus":
        x = tl.sqrt(_softplus(x))
    return x


@triton.jit
def _best_groups(choice, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which groups are the best: [tokens, slices, 1] bool. A group is a slice."""
    groups = tl.arange(0, choice.shape[1])[None, :, None]
    columns = tl.arange(0, choice.shape[2])[None, None, :]
    left, score = choice, tl.zeros((choice.shape[0], choice.shape[1], 1), dtype=tl.float32)
    for _ in tl.static_range(GROUP_EXPERTS):
        best = tl.max(left, axis=2, keep_dims=True)
        score += best
        first = tl.min(tl.where(left == best, columns, choice.shape[2]), axis=2, keep_dims=True)
        left = tl.where(columns == first, float("-inf"), left)
    kept = (groups < 0) & (score != score)  # none of [tokens, slices, 1]
    for _ in tl.static_range(TOP_GROUPS):
        free = (groups < NUM_GROUPS) & (kept == 0)
        best = tl.max(tl.where(free, score, float("-inf")), axis=1, keep_dims=True)
        first = tl.min(tl.where(free & (score == best), groups, choice.shape[1]), axis=1, keep_dims=True)
        kept = kept | (groups == first)
    return kept


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    logits_ptr, num_tokens, stride_token, stride_expert, NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """(tokens [T, 1, 1], experts [1, slices, columns], which of these exist, logits in fp32 or -inf)."""
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]
    columns = tl.arange(0, COLUMNS)[None, None, :]
    experts = tl.arange(0, SLICES)[None, :, None] * STEP + columns
    exists = (columns < STEP) & (experts < NUM_EXPERTS)
    logits_ptrs = logits_ptr + tokens.to(tl.int64) * stride_token + experts.to(tl.int64) * stride_expert
    logits = tl.load(logits_ptrs, mask=exists & (tokens < num_tokens), other=float("-inf")).to(tl.float32)
    return tokens, experts, exists, logits


@triton.jit(do_not_specialize=["num_tokens", "epsilon", "scaling"])
def _select_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, num_tokens, stride_token, stride_expert, epsilon, scaling,
    other_groups, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, NORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    tokens, experts, exists, logits = _load_tile(
        logits_ptr, num_tokens, stride_token, stride_expert, NUM_EXPERTS, BLOCK_T, SLICES, COLUMNS, STEP
    )
    row_max, row_sum = 0.0, 1.0
    if SCORE == "softmax":
        row_max = _max_of_row(logits)
        row_sum = _sum_of_row(tl.exp(logits - row_max))
    choice = logits
    if SCORE != "softmax_of_chosen" and SCORE != "sigmoid_of_chosen":
        choice = _score(logits, row_max, row_sum, SCORE)
    if bias_ptr is not None:
        # As wide as the logits: a narrow load would get a layout of its own, and the logits be brought into that.
        bias_ptrs = bias_ptr + tl.broadcast_to(experts, choice.shape)
        choice += tl.load(bias_ptrs, mask=tl.broadcast_to(exists, choice.shape), other=0.0).to(tl.float32)
    num_nan = _sum_of_row(((choice != choice) & exists).to(tl.int32))
    choice = tl.where(choice > LOWEST, choice, LOWEST)  # false for NaN
    choice = tl.where(exists, choice, float("-inf"))
    if TOP_GROUPS < NUM_GROUPS:
        others = tl.where(exists, other_groups, float("-inf"))
        choice = tl.where(_best_groups(choice, NUM_GROUPS, TOP_GROUPS, GROUP_EXPERTS), choice, others)

    ranks = tl.arange(0, BLOCK_K)[None, None, :]
    ids = tl.zeros((BLOCK_T, 1, BLOCK_K), dtype=tl.int32)
    for rank in tl.range(0, TOP_K):
        best = _max_of_row(choice)
        first = -_max_of_row(tl.where(choice == best, -experts, -NUM_EXPERTS))
        choice = tl.where(experts == first, float("-inf"), choice)
        ids = tl.where(ranks == rank, first, ids)

    # The K logits once more, from the cache: to pick them out of the registers costs as much as a round each.
    is_choice = (ranks < TOP_K) & (tokens < num_tokens)
    x_ptrs = logits_ptr + tokens.to(tl.int64) * stride_token + ids.to(tl.int64) * stride_expert
    x = tl.load(x_ptrs, mask=is_choice, other=float("-inf")).to(tl.float32)
    if SCORE == "softmax_of_chosen":
        row_max = tl.max(x, axis=2, keep_dims=True)
        row_sum = tl.sum(tl.exp(x - row_max), axis=2, keep_dims=True)
        weights = tl.exp(x - row_max) / row_sum
    else:
        weights = _score(x, row_max, row_sum, SCORE)
    weights = tl.where(num_nan > 0, float("nan"), weights)
    if NORMALIZE:
        weights /= tl.sum(tl.where(ranks < TOP_K, weights, 0.0), axis=2, keep_dims=True) + epsilon
    out = tokens.to(tl.int64) * TOP_K + ranks
    tl.store(weights_ptr + out, (weights * scaling).to(weights_ptr.dtype.element_ty), mask=is_choice)
    tl.store(ids_ptr + out, ids.to(tl.int64), mask=is_choice)


_select = Launcher(_select_kernel)


def _launch_select(
    logits_TE: Tensor, bias_E: Tensor | None, weights_dtype: torch.dtype, rule: RoutingRule
) -> tuple[Tensor, Tensor]:
    """(weights [T, K], ids [T, K] int64)."""
    (num_tokens, num_experts), top_k = logits_TE.shape, rule.top_k
    weights_TK = logits_TE.new_empty(num_tokens, top_k, dtype=weights_dtype)
    ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    if num_tokens:
        groups = (rule.num_groups, rule.top_groups) if rule.has_groups else (1, 1)
        tile = _pick_tile(num_experts, groups[0], logits_TE.itemsize)
        with torch.cuda.device_of(logits_TE):  # Triton launches on the current device
            _select(
                (cdiv(num_tokens, tile.tokens),), logits_TE, bias_E, weights_TK, ids_TK, num_tokens,
                *logits_TE.stride(), float(rule.epsilon), float(rule.scaling), float(rule.other_groups), num_experts,
                top_k, rule.score, rule.normalize, *groups, rule.group_experts, *tile, next_power_of_2(top_k),
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return weights_TK, ids_TK


@triton.jit(do_not_specialize=["num_tokens", "epsilon", "scaling"])
def _select_backward_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, ids_ptr, dweights_ptr, dlogits_ptr, num_tokens, stride_token, stride_expert, epsilon, scaling,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_earlier_kernels()
    tokens, experts, exists, logits = _load_tile(  # loaded for softmax alone: nothing else uses them
        logits_ptr, num_tokens, stride_token, stride_expert, NUM_EXPERTS, BLOCK_T, SLICES, COLUMNS, STEP
    )
    ranks = tl.arange(0, BLOCK_K)[None, None, :]
    is_choice = (ranks < TOP_K) & (tokens < num_tokens)
    chosen = tokens.to(tl.int64) * TOP_K + ranks
    ids = tl.load(ids_ptr + chosen, mask=is_choice, other=0)
    dweights = tl.load(dweights_ptr + chosen, mask=is_choice, other=0.0).to(tl.float32)
    x_ptrs = logits_ptr + tokens.to(tl.int64) * stride_token + ids * stride_expert
    x = tl.load(x_ptrs, mask=is_choice, other=float("-inf")).to(tl.float32)

    row_max, row_sum = 0.0, 1.0
    if SCORE == "softmax":
        row_max = _max_of_row(logits)
        row_sum = _sum_of_row(tl.exp(logits - row_max))
        scores = _score(x, row_max, row_sum, SCORE)
    elif SCORE == "softmax_of_chosen":
        row_max = tl.max(x, axis=2, keep_dims=True)
        row_sum = tl.sum(tl.exp(x - row_max), axis=2, keep_dims=True)
        scores = tl.exp(x - row_max) / row_sum
    else:
        scores = _score(x, row_max, row_sum, SCORE)
    scores = tl.where(is_choice, scores, 0.0)
    dscores = dweights * scaling
    if NORMALIZE:
        total = tl.sum(scores, axis=2, keep_dims=True) + epsilon
        dscores = (dscores - tl.sum(dscores * scores, axis=2, keep_dims=True) / total) / total
    if SCORE == "sigmoid" or SCORE == "sigmoid_of_chosen":
        dx = dscores * scores * (1.0 - scores)
    elif SCORE == "sqrt_softplus":
        dx = dscores * tl.sigmoid(x) / (2.0 * scores)
    else:
        dot = tl.sum(dscores * scores, axis=2, keep_dims=True)
        dx = scores * (dscores - dot)

    dlogits_type = dlogits_ptr.dtype.element_ty
    row_ptrs = dlogits_ptr + tokens.to(tl.int64) * NUM_EXPERTS
    rest = tl.zeros((BLOCK_T, SLICES, COLUMNS), dtype=tl.float32)
    if SCORE == "softmax":
        rest = -_score(logits, row_max, row_sum, SCORE) * dot
    tl.store(row_ptrs + experts, rest.to(dlogits_type), mask=exists & (tokens < num_tokens))
    tl.debug_barrier()  # the chosen go over what other threads of this program have just written
    tl.store(row_ptrs + ids, dx.to(dlogits_type), mask=is_choice)


_select_backward = Launcher(_select_backward_kernel)


def _launch_select_backward(logits_TE: Tensor, ids_TK: Tensor, dweights_TK: Tensor, rule: RoutingRule) -> Tensor:
    """dlogits [T, E], contiguous, in the dtype of the logits."""
    num_tokens, num_experts = logits_TE.shape
    dlogits_TE = logits_TE.new_empty(num_tokens, num_experts)
    if num_tokens:
        tile = _pick_tile(num_experts, 1, logits_TE.itemsize)
        with torch.cuda.device_of(logits_TE):
            _select_backward(
                (cdiv(num_tokens, tile.tokens),), logits_TE, ids_TK, dweights_TK.contiguous(), dlogits_TE, num_tokens,
                *logits_TE.stride(), float(rule.epsilon), float(rule.scaling), num_experts, rule.top_k, rule.score,
                rule.normalize, *tile, next_power_of_2(rule.top_k), num_warps=NUM_WARPS,
            )  # fmt: skip
    return dlogits_TE


class _FusedSelect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, weights_dtype: torch.dtype, rule: RoutingRule
    ) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = _launch_select(logits_TE, bias_E, weights_dtype, rule)
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        return weights_TK, ids_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights_TK: Tensor | None, _dids: None) -> tuple[Tensor | None, None, None, None]:
        if dweights_TK is None:
            return None, None, None, None
        logits_TE, ids_TK = ctx.saved_tensors
        return _launch_select_backward(logits_TE, ids_TK, dweights_TK, ctx.rule), None, None, None


def fused_select_experts(
    logits_TE: Tensor,
    rule: RoutingRule,
    *,
    bias_E: Tensor | None = None,
    weights_dtype: torch.dtype = torch.float32,
) -> Routing:
    """`select.select_experts` in one launch, and its backward in another: same arguments, rules and errors.

    logits_TE: [T, E] bf16, fp16 or fp32 on a GPU, any strides. What the kernel is not made for goes to torch: fp64,
    which it would compute in fp32, and more than `MAX_EXPERTS` experts. Deterministic; no host synchronisation, so that
    CUDA graphs can capture it. The gradient can be taken once; that of a row with NaN weights has no meaning.
    """
    check_arguments(logits_TE, rule, bias_E, weights_dtype)
    if logits_TE.dtype not in DTYPES or logits_TE.shape[1] > MAX_EXPERTS:
        return select_experts(logits_TE, rule, bias_E=bias_E, weights_dtype=weights_dtype)
    if bias_E is not None:
        bias_E = bias_E.detach().contiguous()
    if torch.compiler.is_compiling():
        weights_TK, ids_TK = _select_op(logits_TE, bias_E, weights_dtype, *astuple(rule))
    else:
        weights_TK, ids_TK = _FusedSelect.apply(logits_TE, bias_E, weights_dtype, rule)
    return Routing(weights_TK, ids_TK, logits_TE)


# For torch.compile, which traces each launch as one op. An op takes no dataclass: the rule comes as its fields.


@torch.library.custom_op("expertune::select_experts", mutates_args=())
def _select_op(
    logits_TE: Tensor, bias_E: Tensor | None, weights_dtype: torch.dtype, top_k: int, score: str, normalize: bool,
    epsilon: float, scaling: float, num_groups: int, top_groups: int, group_experts: int, other_groups: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rule = RoutingRule(
        top_k, score, normalize, epsilon, scaling, num_groups, top_groups, group_experts, other_groups  # type: ignore[arg-type]
    )  # fmt: skip
    return _launch_select(logits_TE, bias_E, weights_dtype, rule)


@_select_op.register_fake
def _(
    logits_TE: Tensor, bias_E: Tensor | None, weights_dtype: torch.dtype, top_k: int, *rule: Any
) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape, dtype=weights_dtype), logits_TE.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("expertune::select_experts_backward", mutates_args=())
def _select_backward_op(
    logits_TE: Tensor, ids_TK: Tensor, dweights_TK: Tensor, score: str, normalize: bool, epsilon: float, scaling: float
) -> Tensor:
    rule = RoutingRule(ids_TK.shape[1], score, normalize, epsilon, scaling)  # type: ignore[arg-type]
    return _launch_select_backward(logits_TE, ids_TK, dweights_TK, rule)


@_select_backward_op.register_fake
def _(logits_TE: Tensor, ids_TK: Tensor, dweights_TK: Tensor, *rule: Any) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.rule = inputs[4:8]  # score, normalize, epsilon, scaling


def _grad_select(ctx: Any, dweights_TK: Tensor, _: Tensor) -> tuple[Any, ...]:
    return _select_backward_op(*ctx.saved_tensors, dweights_TK, *ctx.rule), *[None] * 11


_select_op.register_autograd(_grad_select, setup_context=_save_select)
