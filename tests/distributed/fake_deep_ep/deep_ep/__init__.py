"""A stand-in for the package deep_ep on the CPU: what `deep_ep.Buffer` does within one machine, over gloo.

It was written from the real one's documentation, asserts and kernels, of which it has the shapes, dtypes, order of
rows, arithmetic and refusals that `expertune.distributed.deep_ep` meets. Each fact names its source:

    [py]      deep_ep/buffer.py of 1.2 (as in the wheel sgl-deep-ep 0.1.0), deep_ep/buffers/legacy.py of 2.1
    [host]    csrc/legacy/buffer.hpp of 2.1, the same asserts as csrc/deep_ep.cpp of 1.x
    [kernel]  csrc/kernels/legacy/intranode.cu of 2.1, csrc/kernels/intranode.cu of 1.x
    [config]  csrc/config.hpp

all in https://github.com/deepseek-ai/DeepEP. Not here: streams, events that are waited for, several machines, fp8.
The real one takes CUDA tensors only.
"""

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64  # [py] exported since 1.2.1; csrc/kernels/configs.cuh: 64 bits unless built otherwise
__version__ = "1.2.1"


class EventOverlap:
    """[py] The last thing that every operation returns; nothing to wait for without async_finish."""

    event: None = None


def host_assert(condition: bool, what: str) -> None:
    """[host] EP_HOST_ASSERT throws an EPException, a RuntimeError in Python."""
    if not condition:
        raise RuntimeError(f"Failed: Assertion error csrc/deep_ep.cpp '{what}'")


def device_assert(condition: bool, what: str) -> None:
    """[kernel] EP_DEVICE_ASSERT prints and traps: later an `unspecified launch failure`, the GPU useless."""
    if not condition:
        raise RuntimeError(f"CUDA error: unspecified launch failure (device assertion '{what}')")


def check_ids(topk_idx: Tensor) -> None:
    """[host] data_ptr<topk_idx_t>() throws for another dtype."""
    if topk_idx.dtype != topk_idx_t:
        raise RuntimeError(f"expected scalar type Long but found {topk_idx.dtype}")


class Config:
    """[config]"""

    def __init__(self, num_sms: int, send: int, recv: int, rdma_send: int, rdma_recv: int) -> None:
        host_assert(0 < send < recv and 0 < rdma_send < rdma_recv, "chunk sizes")
        self.num_sms, self.recv = num_sms, recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        host_assert(num_ranks < 8 or num_ranks % 8 == 0, "num_ranks")
        queues = self.num_sms // 2 * min(num_ranks, 8)
        # ids, weights and scales of up to 128 experts a token
        num_bytes = queues * 5 * 4 + queues * self.recv * (hidden_bytes + 128 * 8 + 128 * 4 + 128 * 4)
        return (num_bytes + 127) // 128 * 128


class Buffer:
    """[py], intranode branches only."""

    num_sms = 20

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        host_assert(num_nvl_bytes % 128 == 0, "num_nvl_bytes % NUM_BUFFER_ALIGNMENT_BYTES == 0")
        host_assert(num_rdma_bytes == 0, "num_rdma_bytes > 0 needs more than 8 ranks")
        self.rank, self.group_size, self.group = group.rank(), group.size(), group
        host_assert(self.group_size < 8 or self.group_size % 8 == 0, "num_ranks")
        self.num_nvl_bytes, self.explicitly_destroy = num_nvl_bytes, explicitly_destroy
        dist.all_gather_object([None] * self.group_size, self.rank, group)  # [py] of device ids and IPC handles

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        chunk = {2: 24, 4: 6, 8: 6}
        assert num_ranks in chunk, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, chunk[num_ranks], 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        chunk = {2: 10, 4: 9, 8: 4}
        assert num_ranks in chunk, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, chunk[num_ranks], 256, 6, 128)

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """num_tokens_per_rank [N] int32, None, num_tokens_per_expert [E] int32, is_token_in_rank [T, N] bool."""
        host_assert(topk_idx.dim() == 2, "topk_idx.dim() == 2")
        host_assert(topk_idx.is_contiguous(), "topk_idx.is_contiguous()")
        host_assert(num_experts > 0, "num_experts > 0")
        check_ids(topk_idx)
        expert_E = torch.arange(num_experts)
        pairs_TE = (topk_idx.unsqueeze(2) == expert_E).sum(1)  # ids out of range, -1 as well, are nobody's
        goes_TN = pairs_TE.view(len(topk_idx), self.group_size, num_experts // self.group_size).sum(2) > 0
        rows_N, pairs_E = goes_TN.sum(0).to(torch.int32), pairs_TE.sum(0).to(torch.int32)
        return rows_N, None, pairs_E, goes_TN, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, tuple[Tensor, ...] | None, EventOverlap]:
        """Rows [R, H] by source rank, then by token; with ids, also [R, K] local ids (else -1) and weights (else 0)."""
        host_assert(x.dim() == 2 and x.is_contiguous(), "x.dim() == 2 and x.is_contiguous()")
        row_bytes = x.shape[1] * x.element_size()
        host_assert(row_bytes % 16 == 0, "(x.size(1) * x.element_size()) % sizeof(int4) == 0")
        # [kernel] half a row and a barrier go through 8192 bytes; lifted after 2.1
        device_assert(row_bytes % 32 == 0 and row_bytes // 2 + 8 <= 8192, "half_hidden_bytes <= kNumTMABytesPerWarp")
        self._check_size(Buffer.get_dispatch_config(self.group_size), row_bytes)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            prefix_NN, _, _, _, goes_TN, _ = handle
            host_assert(tuple(goes_TN.shape) == (len(x), self.group_size), "is_token_in_rank.size(0) == x.size(0)")
            return self._send(x, goes_TN, prefix_NN), None, None, None, None, EventOverlap()
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        host_assert((topk_idx is None) == (topk_weights is None), "topk_idx.has_value() == topk_weights.has_value()")
        host_assert(is_token_in_rank.dtype == torch.bool, "is_token_in_rank.scalar_type() == torch::kBool")
        host_assert(num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32, "torch::kInt32")
        host_assert(tuple(is_token_in_rank.shape) == (len(x), self.group_size), "is_token_in_rank.size(0) == x.size(0)")
        num_local, rest = divmod(len(num_tokens_per_expert), self.group_size)
        host_assert(rest == 0, "num_experts % num_ranks == 0")
        host_assert(num_local <= 128, "num_experts / num_ranks <= kNumThreads")  # [kernel] notify_dispatch
        sent_NN = [torch.empty_like(num_tokens_per_rank) for _ in range(self.group_size)]
        dist.all_gather(sent_NN, num_tokens_per_rank, group=self.group)
        prefix_NN = torch.stack(sent_NN).cumsum(0).to(torch.int32)  # [kernel] rows that ranks up to i send to rank j
        token_T1 = torch.arange(len(x), dtype=torch.int32).unsqueeze(1)
        source_R = self._send(token_T1, is_token_in_rank, prefix_NN).squeeze(1)
        ids_RK = weights_RK = None
        pairs = num_tokens_per_expert.clone()
        dist.all_reduce(pairs, group=self.group)
        if topk_idx is not None and topk_weights is not None:
            check_ids(topk_idx)
            host_assert(topk_idx.is_contiguous() and topk_weights.is_contiguous(), "contiguous")
            host_assert(len(x) == len(topk_idx) and topk_idx.shape == topk_weights.shape, "num_topk")
            host_assert(topk_weights.dtype == torch.float32, "topk_weights->scalar_type() == torch::kFloat32")
            device_assert(topk_idx.shape[1] <= 32, "num_topk <= 32")
            ids_RK = self._send(topk_idx, is_token_in_rank, prefix_NN) - self.rank * num_local
            here_RK = (ids_RK >= 0) & (ids_RK < num_local)
            ids_RK = torch.where(here_RK, ids_RK, -1)
            weights_RK = torch.where(here_RK, self._send(topk_weights, is_token_in_rank, prefix_NN), 0.0)
        x_RH = self._send(x, is_token_in_rank, prefix_NN)
        channels_NC = torch.zeros(self.group_size, Buffer.num_sms // 2, dtype=torch.int32)
        heads_TN = torch.where(is_token_in_rank, is_token_in_rank.cumsum(0) - 1, -1).to(torch.int32)
        handle = (prefix_NN, channels_NC, channels_NC.clone(), source_R, is_token_in_rank, heads_TN)
        mine = pairs.view(self.group_size, num_local)[self.rank].tolist()
        return x_RH, ids_RK, weights_RK, mine, handle, EventOverlap()

    def combine(
        self, x: Tensor, handle: tuple[Tensor, ...], topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Rows [R, H] home: for each token the sum in fp32, by rank, without weights; topk_weights summed as well."""
        prefix_NN, _, _, source_R, _, heads_TN = handle
        host_assert(x.dim() == 2 and x.is_contiguous(), "x.dim() == 2 and x.is_contiguous()")
        host_assert(len(source_R) == len(x), "src_idx.size(0) == num_tokens")
        host_assert(x.shape[1] * x.element_size() % 16 == 0, "(hidden * x.element_size()) % sizeof(int4) == 0")
        self._check_size(Buffer.get_combine_config(self.group_size), x.shape[1] * x.element_size())
        host_assert(x.dtype == torch.bfloat16, 'false and "Unsupported type"')  # [kernel] SWITCH_TYPES
        summed_TK = None
        if topk_weights is not None:
            host_assert(topk_weights.dim() == 2 and topk_weights.is_contiguous(), "topk_weights->dim() == 2")
            host_assert(len(topk_weights) == len(x), "topk_weights->size(0) == num_tokens")
            host_assert(topk_weights.dtype == torch.float32, "topk_weights->scalar_type() == torch::kFloat32")
            device_assert(topk_weights.shape[1] <= 32, "num_topk <= 32")
            summed_TK = self._add_up(topk_weights, heads_TN, prefix_NN)
        return self._add_up(x, heads_TN, prefix_NN), summed_TK, EventOverlap()

    def _check_size(self, config: Config, row_bytes: int) -> None:
        """[host] Queues for each channel and rank must fit."""
        needed = config.num_sms // 2 * self.group_size * config.recv * row_bytes
        host_assert(needed <= self.num_nvl_bytes, "<= num_nvl_bytes")

    def _send(self, rows_TX: Tensor, goes_TN: Tensor, prefix_NN: Tensor) -> Tensor:
        """The rows of every rank for this one, by rank, then by token."""
        return self._exchange(torch.cat([rows_TX[goes_T] for goes_T in goes_TN.T]), goes_TN, prefix_NN, home=False)

    def _add_up(self, rows_RX: Tensor, heads_TN: Tensor, prefix_NN: Tensor) -> Tensor:
        """[kernel] From zero, in fp32, rank by rank; a token that no rank has is zero."""
        goes_TN = heads_TN >= 0
        rows_PX = self._exchange(rows_RX, goes_TN, prefix_NN, home=True)
        sums_TX = torch.zeros(len(goes_TN), rows_RX.shape[1])
        for goes_T, rows in zip(goes_TN.T, rows_PX.split(goes_TN.sum(0).tolist()), strict=True):
            sums_TX[goes_T] += rows.float()
        return sums_TX.to(rows_RX.dtype)

    def _exchange(self, rows: Tensor, goes_TN: Tensor, prefix_NN: Tensor, *, home: bool) -> Tensor:
        send = goes_TN.sum(0).tolist()
        receive = prefix_NN[:, self.rank].diff(prepend=prefix_NN.new_zeros(1)).tolist()
        if home:
            send, receive = receive, send
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.group)
        return out
