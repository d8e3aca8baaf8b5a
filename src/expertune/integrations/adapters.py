"""PEFT's adapters of 3-D expert parameters and of routers, applied unfolded.

PEFT adapts a parameter with a `ParamWrapper` around its module (one for each parameter, nested). In its forward,
`_activate_lora` replaces the parameter by `W + s B A` for every expert. Where the experts run on one of our backends,
the same context manager leaves the parameter alone: the experts' adapters are made known to their forward, and a
router's is a second linear (`integrations.routers`). Merging, disabling, saving, loading, the state dict's keys and
what is refused stay PEFT's own.

A wrapper cannot see which implementation a router's experts run on, nor that experts are not in Transformers'
interface: after PEFT has put its wrappers into a model, each is told the configuration of the experts that it belongs
to. Wrappers from before `import expertune` are not, and PEFT folds their router's adapters.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor, nn

from expertune.errors import BackendError
from expertune.integrations.notices import warn_once
from expertune.integrations.routers import SecondLinear
from expertune.integrations.targets import routers
from expertune.layers.backends import IMPLEMENTATIONS
from expertune.layers.layout import is_experts_module, lora_from_peft, projection_names, sum_loras
from expertune.ops.experts.types import ExpertLora


@dataclass(frozen=True)
class _Active:
    experts: nn.Module
    parameter: str
    lora: ExpertLora
    readers: list[str] = field(default_factory=list)  # not empty once the experts have taken it


class _OfThisThread(threading.local):
    active: tuple[_Active, ...] = ()


# The adapters of the wrappers that are on the call stack of this thread. The recomputation of a checkpointed layer, in
# whatever thread, goes through the wrappers again. Not a ContextVar: torch.compile cannot trace one (2.13).
_NOW = _OfThisThread()
_INSTALLING = threading.Lock()


def active_lora(experts: nn.Module, parameter: str) -> ExpertLora | None:
    """The adapter that PEFT applies to a parameter of this experts module in the forward that is running, if any."""
    for active in _NOW.active:
        if active.experts is experts and active.parameter == parameter:
            active.readers.append(parameter)
            return active.lora
    return None


def unfused_reason(wrapper: Any) -> str | None:
    """Say why PEFT's own fold is used for a ParamWrapper though its model's experts run on our backend; None if not.

    wrapper: a `peft.tuners.lora.layer.ParamWrapper` in a model whose experts run on one of our backends.
    """
    module, name = wrapper.get_base_layer(), wrapper.parameter_name
    if not is_experts_module(module) and not _is_router(wrapper):
        owner = f"{type(module).__name__}.{name}"
        return f"{owner} belongs neither to experts in Transformers' experts interface nor to a router"
    if is_experts_module(module) and name not in projection_names(module):
        return f"{name} is not one of the projections {' and '.join(projection_names(module))}"
    if not wrapper.get_param().is_floating_point() or wrapper.get_param().element_size() < 2:
        return f"{name} is stored as {wrapper.get_param().dtype}"
    return None


def install() -> None:
    """Teach PEFT to hand adapters to our experts. Once is enough; more often does no harm.

    A second copy of this module (a fresh import after the first was dropped) takes the place of the first.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner

    with _INSTALLING:
        if getattr(ParamWrapper._activate_lora, "expertune_state", None) is not _NOW:
            _give_back()
            ParamWrapper._activate_lora = _hooked(ParamWrapper._activate_lora, _handing_over)
            BaseTuner.inject_adapter = _hooked(BaseTuner.inject_adapter, _telling_wrappers)


def uninstall() -> None:
    """Give PEFT its own methods back."""
    import peft.tuners.lora.layer  # noqa: F401 - before the lock: the import may have `install` called

    with _INSTALLING:
        _give_back()


def _give_back() -> None:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner

    for owner, method in ((ParamWrapper, "_activate_lora"), (BaseTuner, "inject_adapter")):
        hooked = getattr(owner, method)
        setattr(owner, method, getattr(hooked, "expertune_original", hooked))


def _hooked(original: Any, hook: Callable[[Any], Any]) -> Any:
    replacement: Any = wraps(original)(hook(original))
    replacement.expertune_original, replacement.expertune_state = original, _NOW
    return replacement


_ActivateLora = Callable[[Any, list[str]], AbstractContextManager[None]]


def _handing_over(original: _ActivateLora) -> _ActivateLora:
    @contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters or () if name in self.lora_A]
        ours = bool(adapters) and _runs_on_ours(self)
        reason = unfused_reason(self) if ours else None
        if reason is not None:
            warn_once(f"expertune leaves an adapter to PEFT's fold, which is slower: {reason}")
        if not ours or reason is not None:
            with original(self, active_adapters):
                yield
            return
        loras = [
            lora_from_peft(
                self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts, float(self.scaling[name])
            )
            for name in adapters
        ]
        with _second_linear(self, adapters, loras) if _is_router(self) else _handed_over(self, sum_loras(loras)):
            yield

    return _activate_lora


@contextmanager
def _handed_over(wrapper: Any, lora: ExpertLora) -> Iterator[None]:
    before, experts = _NOW.active, wrapper.get_base_layer()
    active = _Active(experts, wrapper.parameter_name, lora)
    _NOW.active = (*before, active)
    try:
        yield
    finally:
        _NOW.active = before
    if not active.readers:
        raise BackendError(
            f"{type(experts).__name__}: its configuration says experts_implementation="
            f"{experts.config._experts_implementation!r}, but something else computed the experts, without the adapter "
            f"of {wrapper.parameter_name}. Is its forward, or the entry in ALL_EXPERTS_FUNCTIONS, replaced?"
        )


@contextmanager
def _second_linear(wrapper: Any, adapters: list[str], loras: list[ExpertLora]) -> Iterator[None]:
    weight, name = wrapper.get_param(), type(wrapper.get_base_layer()).__name__

    def fold() -> Tensor:
        return weight + sum(wrapper.get_delta_weight(adapter) for adapter in adapters)

    second = SecondLinear(weight, loras, fold, name)
    with second:
        yield
    if not second.applied:
        raise BackendError(
            f"{name}: its forward does not use its weight where torch can see it, so its adapter is lost"
        )


def _telling_wrappers(original: Callable[..., None]) -> Callable[..., None]:
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, model, *args, **kwargs)
        _tell_wrappers(model)

    return inject_adapter


def _tell_wrappers(model: nn.Module) -> None:
    """Leave with every ParamWrapper the configuration of its experts, and whether it adapts a router's weight."""
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    if not wrappers:
        return
    config_of_router = {id(router): experts.config for _, router, experts in routers(model)}
    for wrapper in wrappers:
        module = wrapper.get_base_layer()
        is_router = id(module) in config_of_router and wrapper.parameter_name == "weight"
        wrapper.expertune_is_router = is_router
        wrapper.expertune_config = (
            config_of_router[id(module)] if is_router else getattr(module, "config", getattr(model, "config", None))
        )


def _is_router(wrapper: Any) -> bool:
    return bool(getattr(wrapper, "expertune_is_router", False))


def _runs_on_ours(wrapper: Any) -> bool:
    module = wrapper.get_base_layer()
    config = module.config if is_experts_module(module) else getattr(wrapper, "expertune_config", None)
    return getattr(config, "_experts_implementation", None) in IMPLEMENTATIONS
