"""Auxiliary losses of routers: load balancing and the z-loss, over one layer or several.

    load balancing = E * sum over e of f_e P_e     f_e: slots of expert e per token; P_e: mean softmax(logits)_e
    z              = mean over tokens of logsumexp(logits)^2

f and P are means over the tokens of all layers together. f gets no gradient. An even load gives K.

Sources: Fedus, Zoph, Shazeer, Switch Transformers, 2021, https://arxiv.org/abs/2101.03961 (equations 4 to 6);
Zoph et al., ST-MoE, 2022, https://arxiv.org/abs/2202.08906 (equation 5).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.ops.routing.types import Routing


def load_balancing_loss(routing: Routing | Sequence[Routing], *, attention_mask: Tensor | None = None) -> Tensor:
    """The load-balancing loss, as Transformers' `load_balancing_loss_func`.

    routing: of one layer, or of each of several with the same E and T; their ids are taken, not chosen once more, so
    that a correction bias or groups count here too (Transformers counts the K largest logits).
    attention_mask: [T] or any shape of T numbers, batch first: 1 for a token that counts, 0 for padding.
    Returns a scalar, fp32 (fp64 for fp64 logits); 0 without any token. Multiply by its coefficient yourself.
    """
    layers = _layers(routing)
    dtype, device = _dtype(layers), layers[0].logits_TE.device
    num_experts = layers[0].logits_TE.shape[1]
    count_T = _counts(layers[0], attention_mask, dtype, device)
    load_E = torch.zeros(num_experts, dtype=dtype, device=device)
    probability_E = torch.zeros_like(load_E)
    for layer in layers:
        ids_S = layer.expert_ids_TK.to(device).reshape(-1)
        load_E = load_E.scatter_add(0, ids_S, count_T.repeat_interleave(layer.expert_ids_TK.shape[1]))
        probability_E = probability_E + count_T @ layer.logits_TE.to(device, dtype).softmax(dim=-1)
    num_rows = (count_T.sum() * len(layers)).clamp(min=1)
    return (load_E / num_rows * (probability_E / num_rows)).sum() * num_experts


def z_loss(routing: Routing | Sequence[Routing], *, attention_mask: Tensor | None = None) -> Tensor:
    """The router z-loss, which keeps logits small; the arguments and what it returns as in `load_balancing_loss`."""
    layers = _layers(routing)
    dtype, device = _dtype(layers), layers[0].logits_TE.device
    count_T = _counts(layers[0], attention_mask, dtype, device)
    total = torch.zeros((), dtype=dtype, device=device)
    for layer in layers:
        total = total + count_T @ layer.logits_TE.to(device, dtype).logsumexp(dim=-1).square()
    return total / (count_T.sum() * len(layers)).clamp(min=1)


def _layers(routing: Routing | Sequence[Routing]) -> Sequence[Routing]:
    layers = [routing] if isinstance(routing, Routing) else list(routing)
    if not layers:
        raise ValueError("routing: got no layer, need at least one")
    shapes = {tuple(layer.logits_TE.shape) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"routing: got layers with logits of {sorted(shapes)}, need one shape [tokens, experts]")
    return layers


def _dtype(layers: Sequence[Routing]) -> torch.dtype:
    return torch.promote_types(layers[0].logits_TE.dtype, torch.float32)


def _counts(layer: Routing, attention_mask: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T], how much each token counts."""
    num_tokens = layer.logits_TE.shape[0]
    if attention_mask is None:
        return torch.ones(num_tokens, dtype=dtype, device=device)
    if attention_mask.numel() != num_tokens:
        raise ValueError(f"attention_mask: got {tuple(attention_mask.shape)}, need {num_tokens} numbers, one a token")
    return attention_mask.reshape(-1).to(device, dtype)
