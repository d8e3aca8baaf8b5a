"""Which processes each token goes to, when experts are dealt out to processes in blocks; all that needs no sizes yet.

Of N processes, number n has the experts n L to (n + 1) L - 1. Token t goes to process n if it chose any of those; with
m = n T + t counting the possible rows (M = N T) by destination, then by token, and g_m whether token t goes to n:

    place_m = g_0 + ... + g_(m - 1)        of those that go, in this order: where row m is in what is sent

4 tokens, 4 experts, 2 processes, T = 2, K = 2: token 0 chose 0 1, token 1 chose 1 3

    m            0  1  2  3             rows sent        0      1      2
    token, n     00 10 01 11            token            0      1      1
    g            1  1  0  1             local ids       0 1    1 -1   -1 1
    place        0  1  -  2             counts (rows, pairs) of n: (2, 3) and (1, 1)

On a GPU two kernels and a prefix sum (`destination_kernels`); anywhere else, and to compare with, plain torch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.ops.plan import has_triton


@dataclass(frozen=True)
class Destinations:
    """The possible rows, M = N T of them, of which the first `fence_2[1]` are there: at most T min(N, K).

    token_M: int64, the token of each row; of those that are not there, any. slot_M: int64, its t N + n.
    choices_MX: int32, its experts as their process counts them, -1 for another process's, and the bits of its routing
    weights in fp32, or in fp64 if they are; X is 2 K or 3 K. row_of_slot_M: int64, the row at t N + n, or M if there is
    none. counts_N2: int64, of each process the rows and the (token, expert) pairs. fence_2: int32, 0 and all rows.
    """

    token_M: Tensor
    slot_M: Tensor
    choices_MX: Tensor
    row_of_slot_M: Tensor
    counts_N2: Tensor
    fence_2: Tensor


def find_destinations(expert_ids_TK: Tensor, weights_TK: Tensor, num_owners: int, num_local: int) -> Destinations:
    """Nothing waits for the device.

    expert_ids_TK: [T, K] integer, 0 to N L - 1; any other goes nowhere. weights_TK: [T, K], the routing weights.
    num_owners: N. num_local: L.
    """
    if expert_ids_TK.is_cuda and weights_TK.dtype != torch.float64 and has_triton():
        from expertune.ops.destination_kernels import launch_destinations

        return launch_destinations(expert_ids_TK, weights_TK, num_owners, num_local)
    return plain_destinations(expert_ids_TK, weights_TK, num_owners, num_local)


def unpack_choices(choices_RX: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(expert ids [R, K] int32, routing weights [R, K] of the dtype that they came from) of rows of `choices_MX`."""
    bits_RW = choices_RX[:, top_k:].contiguous()
    return choices_RX[:, :top_k], bits_RW.view(torch.promote_types(dtype, torch.float32)).to(dtype)


def plain_destinations(expert_ids_TK: Tensor, weights_TK: Tensor, num_owners: int, num_local: int) -> Destinations:
    """`find_destinations` in plain torch."""
    num_tokens, device = expert_ids_TK.shape[0], expert_ids_TK.device
    owner_TK = expert_ids_TK.div(num_local, rounding_mode="floor")
    pairs_TN = (owner_TK.unsqueeze(1) == torch.arange(num_owners, device=device).view(1, -1, 1)).sum(2)
    goes_TN = pairs_TN > 0
    goes_M = goes_TN.T.reshape(-1)
    num_most = goes_M.numel()
    # Where each that goes lands; all others share a place behind the end. (torch.nonzero would wait for the device.)
    place_M = torch.where(goes_M, goes_M.cumsum(0) - 1, num_most)
    index_M = torch.arange(num_most, device=device)
    index_M = index_M.new_zeros(num_most + 1).scatter_(0, place_M, index_M)[:num_most]
    token_M, owner_M = index_M % max(num_tokens, 1), index_M // max(num_tokens, 1)
    ids_MK = expert_ids_TK[token_M] - (owner_M * num_local).unsqueeze(1)
    ids_MK = torch.where((ids_MK >= 0) & (ids_MK < num_local), ids_MK, -1).to(torch.int32)
    weights_MK = weights_TK[token_M].to(torch.promote_types(weights_TK.dtype, torch.float32))
    return Destinations(
        token_M,
        slot_M=token_M * num_owners + owner_M,
        choices_MX=torch.cat((ids_MK, weights_MK.view(torch.int32)), dim=1),
        row_of_slot_M=place_M.view(num_owners, num_tokens).T.reshape(-1),
        counts_N2=torch.stack((goes_TN.sum(0), pairs_TN.sum(0)), dim=1),
        fence_2=F.pad(goes_M.sum().to(torch.int32).view(1), (1, 0)),
    )
