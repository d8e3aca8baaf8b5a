"""PEFT's expert adapters, handed to the experts unfolded.

PEFT adapts a 3-D parameter with a `ParamWrapper` around the experts module (one for each parameter, nested). In its
forward, `_activate_lora` replaces the parameter by `W + s B A` for every expert. Where the experts run on one of our
backends, the same context manager leaves the parameter alone and makes the adapter known to the experts' forward
instead. Merging, disabling, saving, loading and the state dict's keys stay PEFT's own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

from torch import nn

from expertune.integrations.backends import IMPLEMENTATIONS
from expertune.layers.layout import is_experts_module, lora_from_peft, projection_names, sum_loras
from expertune.ops.experts.types import ExpertLora


@dataclass(frozen=True)
class _Active:
    experts: nn.Module
    parameter: str
    lora: ExpertLora


# The adapters of the wrappers that are on the call stack now. A context variable: each thread has its own, and the
# recomputation of a checkpointed layer, in whatever thread, goes through the wrappers again.
_ACTIVE: ContextVar[tuple[_Active, ...]] = ContextVar("expertune_active_adapters", default=())


def active_lora(experts: nn.Module, parameter: str) -> ExpertLora | None:
    """The adapter that PEFT applies to a parameter of this experts module in the forward that is running, if any."""
    for active in _ACTIVE.get():
        if active.experts is experts and active.parameter == parameter:
            return active.lora
    return None


def unfused_reason(wrapper: Any) -> str | None:
    """Say why PEFT's own fold is used for a ParamWrapper though its experts run on our backend; None if it is not.

    wrapper: a `peft.tuners.lora.layer.ParamWrapper` around an experts module.
    """
    experts, name = wrapper.get_base_layer(), wrapper.parameter_name
    if name not in projection_names(experts):
        return f"{name} is not one of the projections {' and '.join(projection_names(experts))}"
    if not wrapper.get_param().is_floating_point() or wrapper.get_param().element_size() < 2:
        return f"{name} is stored as {wrapper.get_param().dtype}"
    return None


def install() -> None:
    """Teach PEFT's ParamWrapper to hand adapters to our experts. Once is enough; more often does no harm."""
    from peft.tuners.lora.layer import ParamWrapper

    if not hasattr(ParamWrapper._activate_lora, "expertune_original"):
        ParamWrapper._activate_lora = _handing_over(ParamWrapper._activate_lora)


def uninstall() -> None:
    """Give PEFT's ParamWrapper its own method back."""
    from peft.tuners.lora.layer import ParamWrapper

    ParamWrapper._activate_lora = getattr(
        ParamWrapper._activate_lora, "expertune_original", ParamWrapper._activate_lora
    )


_ActivateLora = Callable[[Any, list[str]], AbstractContextManager[None]]


def _handing_over(original: _ActivateLora) -> _ActivateLora:
    @wraps(original)
    @contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        adapters = [name for name in active_adapters or () if name in self.lora_A]
        if not (adapters and is_experts_module(experts) and _runs_on_ours(experts)):
            with original(self, active_adapters):
                yield
            return
        reason = unfused_reason(self)
        if reason is not None:
            _warn_once(f"expertune leaves an adapter to PEFT's fold, which is slower: {reason}")
            with original(self, active_adapters):
                yield
            return
        loras = [
            lora_from_peft(
                self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts, float(self.scaling[name])
            )
            for name in adapters
        ]
        token = _ACTIVE.set((*_ACTIVE.get(), _Active(experts, self.parameter_name, sum_loras(loras))))
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    _activate_lora.expertune_original = original  # type: ignore[attr-defined]
    return _activate_lora


def _runs_on_ours(experts: nn.Module) -> bool:
    config = getattr(experts, "config", None)
    return getattr(config, "_experts_implementation", None) in IMPLEMENTATIONS


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
