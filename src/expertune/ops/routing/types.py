"""What a router decides, and how it is told to decide. See `ops.routing.select` for the arithmetic."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen", "sigmoid_of_chosen"]
"""How logits become scores.

softmax: over all experts. sigmoid, sqrt_softplus: each expert by itself. These select on the scores (plus the bias).
softmax_of_chosen (gpt-oss), sigmoid_of_chosen: select on the logits (plus the bias) and score the chosen ones alone.
"""

OF_CHOSEN: tuple[Score, ...] = ("softmax_of_chosen", "sigmoid_of_chosen")
"""The scores that select on logits."""


@dataclass(frozen=True)
class RoutingRule:
    """How a router chooses K of E experts for each token and weighs them.

    top_k: K. score: see `Score`. normalize: whether the K weights are divided by their sum (plus `epsilon`).
    scaling: the factor of all weights, after that. num_groups, top_groups: experts lie in `num_groups` groups of equal
    size, and only those of the best `top_groups` groups can be chosen; 1 and 1: no groups. group_experts: a group's
    score is the sum of its best so many experts (2 in DeepSeek-V3, 1 in DeepSeek-V2). other_groups: what the experts of
    the other groups count as; -inf is never chosen (A.X-K2 says 0, which beats a negative score plus bias).
    """

    top_k: int
    score: Score = "softmax"
    normalize: bool = False
    epsilon: float = 0.0
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_experts: int = 2
    other_groups: float = float("-inf")

    @property
    def has_groups(self) -> bool:
        """Whether some group of experts is left out."""
        return self.top_groups < self.num_groups

    def check(self, num_experts: int) -> None:
        """Raise ValueError, naming the field, if the rule cannot choose among so many experts."""
        if self.score not in get_args(Score):
            raise ValueError(f"score: got {self.score!r}, need one of {', '.join(get_args(Score))}")
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k: got {self.top_k}, need 1 to {num_experts} (the number of experts)")
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(f"num_groups: got {self.num_groups}, need a divisor of {num_experts} experts")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups: got {self.top_groups}, need 1 to {self.num_groups} (the number of groups)")
        if not self.has_groups:
            return
        group_size = num_experts // self.num_groups
        if not 1 <= self.group_experts <= group_size:
            raise ValueError(f"group_experts: got {self.group_experts}, need 1 to {group_size} (experts of a group)")
        if self.top_k > self.top_groups * group_size:
            raise ValueError(
                f"top_k: got {self.top_k}, but {self.top_groups} groups of {group_size} have "
                f"{self.top_groups * group_size} experts"
            )


@dataclass(frozen=True)
class Routing:
    """The experts of each token.

    weights_TK: [T, K], fp32 or the dtype that was asked for. expert_ids_TK: [T, K] int64, all in 0..E-1 and different
    in a row. logits_TE: [T, E], as the router computed them: what auxiliary losses take.

    The flat form has a slot for each (token, expert) pair, `slot = token * K + k`: the same numbers in the same order.
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    logits_TE: Tensor

    @property
    def weights_S(self) -> Tensor:
        """[T * K], the weight of each slot: a view of `weights_TK` where that is contiguous."""
        return self.weights_TK.reshape(-1)

    @property
    def expert_of_slot_S(self) -> Tensor:
        """[T * K] int32, the expert of each slot."""
        return self.expert_ids_TK.reshape(-1).to(torch.int32)

    @property
    def token_of_slot_S(self) -> Tensor:
        """[T * K] int32, the token of each slot, ascending."""
        num_tokens, top_k = self.expert_ids_TK.shape
        tokens_T = torch.arange(num_tokens, dtype=torch.int32, device=self.expert_ids_TK.device)
        return tokens_T.unsqueeze(1).expand(num_tokens, top_k).reshape(-1)

    def load_E(self, num_experts: int) -> Tensor:
        """[E] int64, the number of tokens of each expert; the sum is T * K. Without a host synchronisation."""
        ids_S = self.expert_ids_TK.reshape(-1)
        return torch.zeros(num_experts, dtype=torch.int64, device=ids_S.device).scatter_add_(
            0, ids_S.long(), torch.ones_like(ids_S, dtype=torch.int64)
        )
