"""Attention and the LM head on tensors without data: what their CUDA kernels allocate, and nothing computed.

Flash attention, the same for sdpa's flash and cuDNN kernels and for flash-attn (Dao, FlashAttention-2, 2023,
https://arxiv.org/abs/2307.08691): kept are q, k, v, the output and fp32 log-sum-exps [B, heads, T]. A backward adds an
fp32 sum of dq, and with fewer key heads than query heads, dk and dv of every query head before they are summed.
With a mask sdpa runs its memory-efficient kernel: keys and values repeated for every query head, and the mask as bias
in the dtype of q, both kept.

The LM head is TRL 1.16's (`trl.kernels.ChunkedLogProbFunction` on its Triton path): logits exist as tiles of
4096 tokens x 32768 words; the gradient of the hidden states is an fp32 sum.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from expertune.estimate.ledger import HEAD, Ledger

TILE_TOKENS, TILE_WORDS = 4096, 32768  # trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE, trl.trainer.utils
STATISTICS = 7  # fp32 values of each token while tiles are folded


def attention_on_paper(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """What fused attention allocates, in the form of Transformers' attention interface.

    query: [B, heads, T, D]. key, value: [B, key heads, T, D]. attention_mask: None for a causal one.
    Returns ([B, T, heads, D of the values], None).
    """
    if attention_mask is None:
        return _Flash.apply(query, key, value), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    bias = torch.empty(attention_mask.shape, dtype=query.dtype, device=query.device)
    return _Flash.apply(query, key, value, bias), None


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias=None):  # type: ignore[no-untyped-def]
        batch, heads, num_tokens, _ = query.shape
        out = query.new_empty(batch, num_tokens, heads, value.shape[-1])
        log_sums = query.new_empty(batch, heads, num_tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        query, key, value, _, _, log_sums = ctx.saved_tensors
        dout = dout.contiguous()
        rows_D = torch.empty_like(log_sums)
        sum_dq = torch.empty_like(query, dtype=torch.float32)
        dquery, dkey, dvalue = (torch.empty_like(each) for each in (query, key, value))
        if key.shape[1] != query.shape[1]:
            heads = (query.shape[0], query.shape[1], key.shape[2])
            each_head = (key.new_empty(*heads, key.shape[3]), value.new_empty(*heads, value.shape[3]))
            del each_head
        del rows_D, sum_dq
        return dquery, dkey, dvalue, None


def fused_loss_on_paper(ledger: Ledger, hidden: Tensor, head: nn.Module) -> Tensor:
    """TRL's loss of hidden states [B, T, H], with the label of every token counted: a scalar.

    head: the LM head, with `weight` [V, H] and perhaps a bias.
    """
    with ledger.scope(HEAD):
        rows_NH = _Compact.apply(ledger, hidden[:, :-1])
        weight, bias = head.weight, getattr(head, "bias", None)
        assert isinstance(weight, Tensor)
        log_probs_N = _ChunkedLogProbs.apply(ledger, rows_NH, weight, bias)
        return -log_probs_N.sum()


class _Compact(torch.autograd.Function):
    """The rows that have a label, copied: `hidden[mask]`."""

    @staticmethod
    def forward(ctx, ledger, hidden):  # type: ignore[no-untyped-def]
        ctx.ledger, ctx.shape = ledger, hidden.shape
        return hidden.new_empty(hidden.shape[0] * hidden.shape[1], hidden.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_NH):  # type: ignore[no-untyped-def]
        with ctx.ledger.scope(HEAD, passing=True):
            return None, drows_NH.new_empty(ctx.shape)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ledger, hidden_NH, weight_VH, bias_V):  # type: ignore[no-untyped-def]
        device, num_rows = hidden_NH.device.type, hidden_NH.shape[0]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        targets_N = hidden_NH.new_empty(num_rows, dtype=torch.int64)
        statistics = [hidden_NH.new_empty(num_rows, dtype=torch.float32) for _ in range(STATISTICS)]
        _tile(hidden_NH, dtype)
        ctx.ledger, ctx.dtype = ledger, dtype
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, *statistics[:2])
        return statistics[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        hidden_NH, weight_VH, bias_V, *_ = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[1:4]
        wanted = ((hidden_NH, need_hidden), (weight_VH, need_weight), (bias_V, need_bias))
        with ctx.ledger.scope(HEAD, passing=True):
            sums = [torch.empty_like(each, dtype=torch.float32) if need else None for each, need in wanted]
            _tile(hidden_NH, ctx.dtype)
            return None, *(
                None if total is None else total.to(each.dtype)
                for total, (each, _) in zip(sums, wanted, strict=True)
            )  # fmt: skip


def _tile(hidden_NH: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits of one tile."""
    return hidden_NH.new_empty(min(hidden_NH.shape[0], TILE_TOKENS), TILE_WORDS, dtype=dtype)
