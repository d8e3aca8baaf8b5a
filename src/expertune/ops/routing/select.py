"""Which experts a token goes to, and with which weights: the arithmetic of every router, in plain torch.

    s_e  = score of expert e                             softmax, sigmoid, sqrt(softplus); see `types.Score`
    c_e  = s_e + bias_e                                  what is chosen by; the bias has no part in the weights
    ids  = the K experts with the largest c              of the best groups only, where there are groups
    p_k  = s[ids_k]                                      softmax or sigmoid of the chosen logits in the `_of_chosen`
    p_k  = scaling * p_k / (sum p + epsilon)             the division only with `normalize`

In fp32, or fp64 for fp64 logits. Gradients reach the logits through p alone: no gradient goes through the choice.

Two rules hold in every backend:

- **Ties.** Of experts with equal c the lower index comes first, and so with groups. `torch.topk` promises no order;
  this uses a stable sort. The ids of a row are in the order of c, the best first.
- **NaN.** An expert whose c is NaN or -inf counts as the lowest finite number: it is chosen last, before only the
  experts of groups that are left out. So ids are always in range and different within a row. All weights of a row that
  has a NaN among its c, chosen or not, are NaN, so that the loss shows it. Infinite logits need no rule: +inf makes a
  softmax NaN and a sigmoid 1; -inf makes both 0, but a softmax over nothing but -inf is NaN.

Worked example, four tokens and four experts, K = 2, softmax, normalize:

    logits              scores                    ids     weights
    2  1  0  0          0.610 0.224 0.083 0.083   0  1    0.731 0.269
    0  0  0  0          0.25  0.25  0.25  0.25    0  1    0.5   0.5        all equal: the lower index first
    0  3  0  3          0.024 0.476 0.024 0.476   1  3    0.5   0.5
    0  nan  5  1        nan   nan   nan   nan     0  1    nan   nan        in range; the loss shows it

Source of the group-limited choice: DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, https://arxiv.org/abs/2412.19437
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.ops.routing.types import OF_CHOSEN, Routing, RoutingRule


def select_experts(
    logits_TE: Tensor,
    rule: RoutingRule,
    *,
    bias_E: Tensor | None = None,
    weights_dtype: torch.dtype = torch.float32,
) -> Routing:
    """Choose K of E experts for each token, and weigh them.

    logits_TE: [T, E] floating, the router's; any strides, T may be 0. rule: how to choose and weigh.
    bias_E: [E], the correction bias that is added to the scores for the choice alone; gets no gradient.
    weights_dtype: of the weights that come back; they are computed in fp32 (fp64 for fp64 logits) whatever it says.
    Deterministic; without a host synchronisation. Ties and NaN: see the top of this file.
    Raises ValueError on a wrong shape or dtype, or a rule that cannot choose among E experts.
    """
    check_arguments(logits_TE, rule, bias_E, weights_dtype)
    logits = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = _scores(logits, rule)
    choice_TE = scores_TE.detach()
    if bias_E is not None:
        choice_TE = choice_TE + bias_E.detach().to(logits.dtype)
    has_nan_T1 = choice_TE.isnan().any(dim=-1, keepdim=True)
    lowest = torch.finfo(logits.dtype).min
    choice_TE = torch.nan_to_num(choice_TE, nan=lowest, neginf=lowest, posinf=float("inf"))
    if rule.has_groups:
        choice_TE = _within_best_groups(choice_TE, rule)
    expert_ids_TK = _largest(choice_TE, rule.top_k)
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if rule.score in OF_CHOSEN:
        weights_TK = weights_TK.softmax(dim=-1) if rule.score == "softmax_of_chosen" else weights_TK.sigmoid()
    if rule.normalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + rule.epsilon)
    if rule.scaling != 1.0:
        weights_TK = weights_TK * rule.scaling
    weights_TK = weights_TK.masked_fill(has_nan_T1, float("nan"))
    return Routing(weights_TK.to(weights_dtype), expert_ids_TK, logits_TE)


def check_arguments(
    logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None, weights_dtype: torch.dtype = torch.float32
) -> None:
    """Raise ValueError, naming the argument, if these cannot be routed: the same for every backend."""
    if logits_TE.dim() != 2 or logits_TE.shape[1] < 1:
        raise ValueError(f"logits_TE: got shape {tuple(logits_TE.shape)}, need [tokens, experts]")
    if not logits_TE.is_floating_point():
        raise ValueError(f"logits_TE: got dtype {logits_TE.dtype}, need a floating-point one")
    rule.check(logits_TE.shape[1])
    if bias_E is not None and bias_E.shape != logits_TE.shape[1:]:
        raise ValueError(f"bias_E: got shape {tuple(bias_E.shape)}, need ({logits_TE.shape[1]},)")
    if not weights_dtype.is_floating_point:
        raise ValueError(f"weights_dtype: got {weights_dtype}, need a floating-point one")


def _scores(logits_TE: Tensor, rule: RoutingRule) -> Tensor:
    """What the choice is by: the scores, or the logits as they are for the `_of_chosen`."""
    if rule.score == "softmax":
        return logits_TE.softmax(dim=-1)
    if rule.score == "sigmoid":
        return logits_TE.sigmoid()
    if rule.score == "sqrt_softplus":
        return F.softplus(logits_TE).sqrt()
    return logits_TE


def _within_best_groups(choice_TE: Tensor, rule: RoutingRule) -> Tensor:
    """The same with the experts outside of the best groups at `rule.other_groups`."""
    choice_TGM = choice_TE.unflatten(1, (rule.num_groups, -1))  # M experts in each of G groups
    group_scores_TG = choice_TGM.topk(rule.group_experts, dim=-1).values.sum(dim=-1)
    best = _largest(group_scores_TG, rule.top_groups)
    is_best_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(1, best, True)
    return choice_TGM.masked_fill(~is_best_TG.unsqueeze(-1), rule.other_groups).flatten(1)


def _largest(values: Tensor, count: int) -> Tensor:
    """The columns of the `count` largest values of each row, the lower index first where values are equal."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()
