"""Tokens to the processes that own their experts, and the results back, by DeepEP's NVLink kernels.

The same two operations as `dispatch`, with the same numbers: a token goes once to each process that has any of its
experts, with K local ids (-1 elsewhere) and K routing weights; rows arrive by process, then by token; partial sums are
added in fp32, in process order, and rounded to bf16 once.

    forward     dispatch x, ids, weights         combine y
    backward    combine dx and dweights          dispatch dy, by the handle that the first dispatch returned

DeepEP's kernels give up after 100 seconds, in a way that names no layer and leaves the GPU useless. So before each
dispatch the processes meet on the wire, which waits as long as `ddp_timeout` says and names the layer.

Used is `deep_ep.Buffer`, as versions 1.2 to 2.1 have it; 2.5 took it away. Its documentation and asserts are the source
of the limits below: https://github.com/deepseek-ai/DeepEP, deep_ep/buffer.py and csrc/kernels/intranode.cu (1.2),
deep_ep/buffers/legacy.py, csrc/legacy/buffer.hpp and csrc/kernels/legacy/intranode.cu (2.1).
"""

import importlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.distributed.collectives import Wire
from expertune.distributed.dispatch import Arrived, ExpertShard
from expertune.errors import ConfigError
from expertune.ops.plan import ExpertPlan

_WIDTH_STEP = 256
"""Values of a row that a warp of the combine adds at a time; what is left over is not safe in every version:
https://github.com/deepseek-ai/DeepEP/pull/413, https://github.com/NVIDIA/TensorRT-LLM/pull/14977."""

_MOST_WIDTH = 7936
"""The multiple of 256 that fits: half a row in bf16 and 8 bytes go through 8192 bytes of shared memory up to version
2.1 (https://github.com/deepseek-ai/DeepEP/issues/722)."""

_MOST_LOCAL_EXPERTS = 128  # one thread of the kernel that counts tokens for each
_MOST_TOP_K = 32  # one lane of a warp for each
_INSTEAD = "remove the key to use NCCL's all-to-all"


@dataclass(frozen=True)
class DeepEP:
    """A transport (`dispatch.Transport`).

    buffer: a deep_ep.Buffer, of the processes that share experts. ids_dtype: the integers that it takes.
    """

    buffer: Any
    ids_dtype: torch.dtype

    def send(self, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, shard: ExpertShard) -> Arrived:
        """See `send_to_experts`. x_TH: bf16. Ids are not checked."""
        if x_TH.dtype != torch.bfloat16:
            raise ValueError(f"x_TH: got {x_TH.dtype}; need torch.bfloat16, all that DeepEP adds up")
        if expert_ids_TK.shape[1] > _MOST_TOP_K:
            raise ValueError(f"expert_ids_TK: got K = {expert_ids_TK.shape[1]}; need at most {_MOST_TOP_K} for DeepEP")
        if shard.meanwhile is not None:
            shard.meanwhile()
        shard.wire.barrier("meeting before tokens are sent")
        ids_TK = expert_ids_TK.to(self.ids_dtype).contiguous()
        x_RH, weights_RK, ids_RK, trip = _ToExperts.apply(self.buffer, shard, ids_TK, x_TH, weights_TK)
        return Arrived(trip, x_RH, ids_RK, weights_RK)


def open_deep_ep(wire: Wire, *, num_local: int, widths: Collection[int], dtype: torch.dtype) -> DeepEP:
    """DeepEP between the processes of `wire`, with a buffer as large as it advises for the rows.

    num_local: experts of a layer on each process. widths: of the rows, in any layer. dtype: of the experts' weights.
    Every process must call it. The buffer stays until the process ends: DeepEP's way to free it lets a process free
    memory that another still has open (https://github.com/deepseek-ai/DeepEP/issues/497).
    Raises ConfigError if the package or the model does not allow it.
    """
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"expert_parallel_backend: got deep_ep, which adds up bf16 only, and the experts are in {dtype}; need "
            f"bf16: true, or {_INSTEAD}"
        )
    wrong = [width for width in widths if width % _WIDTH_STEP or width > _MOST_WIDTH]
    if wrong:
        raise ConfigError(
            f"expert_parallel_backend: got deep_ep, and the experts' rows have {max(wrong)} values; need a multiple of "
            f"{_WIDTH_STEP}, at most {_MOST_WIDTH}, or {_INSTEAD}"
        )
    if num_local > _MOST_LOCAL_EXPERTS:
        raise ConfigError(
            f"expert_parallel_backend, expert_parallel_size: {num_local * wire.size} / {wire.size} = {num_local} "
            f"experts on each process, and deep_ep takes {_MOST_LOCAL_EXPERTS}; need a larger size, or {_INSTEAD}"
        )
    deep_ep = _import()
    row_bytes = max(widths) * dtype.itemsize
    configs = deep_ep.Buffer.get_dispatch_config(wire.size), deep_ep.Buffer.get_combine_config(wire.size)
    num_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, wire.size) for config in configs)
    try:
        # A buffer that frees itself does so wherever Python drops it, also after an error, and waits for all others.
        buffer = deep_ep.Buffer(wire.group, num_nvl_bytes=num_bytes, explicitly_destroy=True)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"expert_parallel_backend: deep_ep cannot share memory between these GPUs: {error}; need NVLink between "
            f"all of them; {_INSTEAD}"
        ) from error
    return DeepEP(buffer, getattr(deep_ep, "topk_idx_t", torch.int64))


def _import() -> Any:
    """The package deep_ep, if it is one that can be used."""
    try:
        deep_ep = importlib.import_module("deep_ep")
    except Exception as error:  # some builds look at CUDA, NCCL and the driver first, with asserts
        raise ConfigError(
            f"expert_parallel_backend: the package deep_ep cannot be imported: {type(error).__name__}: {error}; "
            f"{_INSTEAD}"
        ) from error
    buffer = getattr(deep_ep, "Buffer", None)
    if buffer is None or "explicitly_destroy" not in inspect.signature(buffer).parameters:
        raise ConfigError(
            f"expert_parallel_backend: got deep_ep {getattr(deep_ep, '__version__', '(no version)')}, which has no "
            f"deep_ep.Buffer(explicitly_destroy=...); need DeepEP 1.2 to 2.1, or {_INSTEAD}"
        )
    return deep_ep


@dataclass(frozen=True)
class _Trip:
    """handle: what DeepEP needs to go the same way again. num_pairs: (token, expert) pairs that arrived here."""

    buffer: Any
    wire: Wire
    handle: tuple[Tensor, ...]
    num_pairs: int

    def plan_of(self, build: Callable[[int], ExpertPlan]) -> ExpertPlan:
        return build(self.num_pairs)  # each forward has a trip of its own

    def bring_home(self, y_RH: Tensor) -> Tensor:
        return _FromExperts.apply(self, y_RH)


class _ToExperts(torch.autograd.Function):
    """Inputs: the buffer, the shard, ids [T, K], x [T, H], weights [T, K]."""

    @staticmethod
    def forward(ctx, buffer, shard, ids_TK, x_TH, weights_TK):  # type: ignore[no-untyped-def]
        with shard.wire.naming("sending tokens"):
            rows_N, _, pairs_E, goes_TN, _ = buffer.get_dispatch_layout(ids_TK, shard.num_experts)
            x_RH, ids_RK, weights_RK, num_pairs_of_each, handle, _ = buffer.dispatch(
                x_TH.contiguous(),
                topk_idx=ids_TK,
                topk_weights=weights_TK.to(torch.float32).contiguous(),
                num_tokens_per_rank=rows_N,
                is_token_in_rank=goes_TN,
                num_tokens_per_expert=pairs_E,
            )
        ctx.trip = _Trip(buffer, shard.wire, handle, sum(num_pairs_of_each))
        ids_RK = ids_RK.to(torch.int64)
        ctx.mark_non_differentiable(ids_RK)
        return x_RH, weights_RK.to(weights_TK.dtype), ids_RK, ctx.trip

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RH, dweights_RK, *_):  # type: ignore[no-untyped-def]
        trip, (*_, need_x, need_weights) = ctx.trip, ctx.needs_input_grad
        weights = dweights_RK.to(torch.float32).contiguous() if need_weights else None
        with trip.wire.naming("returning gradients of tokens"):
            dx_TH, dweights_TK, _ = trip.buffer.combine(dx_RH.contiguous(), trip.handle, topk_weights=weights)
        dweights_TK = dweights_TK.to(dweights_RK.dtype) if need_weights else None
        return None, None, None, dx_TH if need_x else None, dweights_TK


class _FromExperts(torch.autograd.Function):
    """Inputs: the trip, y [R, H]."""

    @staticmethod
    def forward(ctx, trip, y_RH):  # type: ignore[no-untyped-def]
        ctx.trip = trip
        with trip.wire.naming("returning results"):
            return trip.buffer.combine(y_RH.contiguous(), trip.handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):  # type: ignore[no-untyped-def]
        trip = ctx.trip
        with trip.wire.naming("sending gradients of results"):
            return None, trip.buffer.dispatch(dy_TH.contiguous(), handle=trip.handle)[0]
