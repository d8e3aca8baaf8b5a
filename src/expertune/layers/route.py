"""Routing and shared experts of a Transformers-style MoE block, by its attributes alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.layers.backends import AUTO
from expertune.layers.router import read_router
from expertune.layers.running import backend_for, run_select_experts
from expertune.ops.routing.types import Routing

SHARED = ("shared_expert", "shared_experts", "shared_mlp")


def route(block: Any, hidden: Tensor) -> Routing:
    """The experts that a block's own router chooses for each token, and the weights that it passes to its experts.

    block: a Transformers-style MoE block, with `gate` or `router`. What the router says is read from the gate, the
    block or the configuration (`layers.router`); adapters of PEFT are applied as a second linear.
    hidden: [..., H], what the block gets.

    On a GPU with Triton the choice is one launch. Equal to the block's router in fp32; where the block computes logits
    in bf16 these are more exact, as they are in fp32 always. The multiplicative noise that Mixtral can put on hidden
    states in training is the caller's to apply.
    Raises ValueError, naming the attribute, if something is missing or the router is no rule over logits.
    """
    router = read_router(block)
    logits_TE = router.logits(hidden.reshape(-1, hidden.shape[-1]))
    backend = backend_for(AUTO, logits_TE.device.type, logits_TE.dtype, "backend")
    return run_select_experts(backend, logits_TE, router.rule, bias_E=router.correction_E, weights_dtype=torch.float32)


def shared_experts(block: Any, hidden: Tensor, *, gated: bool = True) -> Tensor | None:
    """What a block's shared experts add for every token: alone, without the routed ones; None if it has none.

        y = sigmoid(g x) * mlp(x)        the sigmoid only where there is a `shared_expert_gate`, and with `gated`

    block: looked at for `shared_expert`, `shared_experts` and `shared_mlp`. hidden: [..., H]; the result has its shape.
    gated: False leaves the gate out, for a caller that applies it.
    Raises ValueError for shared experts that need more than hidden states (Inkling's are weighed by its router).
    """
    shared = next((module for name in SHARED if (module := getattr(block, name, None)) is not None), None)
    if shared is None:
        return None
    if type(shared).__name__.startswith("InklingShared"):
        raise ValueError(f"{type(shared).__name__} takes its weights from the router, not from hidden states alone")
    output: Tensor = shared(hidden)
    gate = getattr(block, "shared_expert_gate", None)
    return output if gate is None or not gated else F.sigmoid(gate(hidden)) * output
