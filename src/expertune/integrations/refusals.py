"""Models for which our names would be accepted and ignored: refused when they are loaded or built.

Transformers takes any registered `experts_implementation` for any model, and a model whose experts class does not carry
its decorator (Llama 4, DBRX, Switch, ...) never looks at it. A model without experts is only warned about, for there
the name has nothing to change.

So is sonicmoe where the machine cannot run it: at that point nothing has been downloaded. The other backends fail in
the first forward, for their models may be built on one machine, or device, and run on another.
"""

import re
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from expertune.errors import BackendError, UnsupportedModelError
from expertune.layers.backends import IMPLEMENTATIONS, SONICMOE_ADAPTERS, unavailable_reason
from expertune.layers.layout import is_experts_module

_EXPERTS_NAME = re.compile(r"(Experts|MoE|Moe)$")
_HOOKED = ("get_correct_experts_implementation", "from_pretrained")


def install() -> None:
    """Teach Transformers' models to refuse our names where they would be ignored. Once is enough; more does no harm."""
    from transformers.modeling_utils import PreTrainedModel

    if not hasattr(PreTrainedModel.from_pretrained, "expertune_original"):
        originals = {name: PreTrainedModel.__dict__[name] for name in _HOOKED}
        PreTrainedModel.get_correct_experts_implementation = _checking(originals["get_correct_experts_implementation"])
        PreTrainedModel.from_pretrained = classmethod(_checking_first(originals["from_pretrained"]))


def uninstall() -> None:
    """Give Transformers' models their own methods back."""
    from transformers.modeling_utils import PreTrainedModel

    for name in _HOOKED:
        hooked = getattr(PreTrainedModel, name)
        if hasattr(hooked, "expertune_original"):
            setattr(PreTrainedModel, name, hooked.expertune_original)


def experts_outside_of_the_interface(model_class: type[nn.Module]) -> str | None:
    """Name the experts class of a model that does not take part in Transformers' experts interface; None: it has none.

    model_class: any class of a model; what counts is the file that defines it.
    """
    names_there = vars(sys.modules[model_class.__module__]) if model_class.__module__ in sys.modules else {}
    classes = [value for value in names_there.values() if isinstance(value, type) and issubclass(value, nn.Module)]
    if any(_is_decorated(each) for each in classes):
        return None
    own = (each.__name__ for each in classes if each.__module__ == model_class.__module__)
    names = sorted(name for name in own if _EXPERTS_NAME.search(name))
    return min(names, key=lambda name: not name.endswith("Experts")) if names else None


def refuse_if_ignored(model_class: type[nn.Module], implementation: object) -> None:
    """Raise UnsupportedModelError if a model of this class would ignore one of our names.

    implementation: what was asked for: a name, or names by sub-configuration, or None.
    """
    name = _our_name(implementation)
    experts = experts_outside_of_the_interface(model_class) if name else None
    if experts is not None:
        raise UnsupportedModelError(
            f"{model_class.__name__}: experts_implementation={name!r} would be accepted and ignored, for its experts "
            f"({experts}) are not in Transformers' experts interface",
            "Load it without experts_implementation: the experts then run as Transformers has them, and attention can "
            "be adapted as in any model",
        )


def refuse_if_it_cannot_run(implementation: object) -> None:
    """Raise BackendError, naming what is needed and what is there, if sonicmoe was asked for and cannot run here."""
    name = _our_name(implementation)
    reason = unavailable_reason(name) if name is not None and name in SONICMOE_ADAPTERS else None
    if reason is not None:
        raise BackendError(f"experts_implementation={name!r}: {reason}")


def _our_name(implementation: object) -> str | None:
    names = implementation.values() if isinstance(implementation, dict) else [implementation]
    return next((name for name in names if name in IMPLEMENTATIONS), None)


def _is_decorated(module_class: type[nn.Module]) -> bool:
    """Whether a class carries Transformers' experts decorator, which wraps these two methods and adds a gate."""
    wrapped = (module_class.__init__, module_class.forward)
    return hasattr(module_class, "_apply_gate") and all(hasattr(method, "__wrapped__") for method in wrapped)


def _checking(original: Callable[..., str]) -> Callable[..., str]:
    """At construction and at `set_experts_implementation`, of a model and of each model inside it."""

    @wraps(original)
    def get_correct_experts_implementation(self: Any, requested_experts: str | None) -> str:
        refuse_if_ignored(type(self), requested_experts)
        refuse_if_it_cannot_run(requested_experts)
        return original(self, requested_experts)

    get_correct_experts_implementation.expertune_original = original  # type: ignore[attr-defined]
    return get_correct_experts_implementation


def _checking_first(original: Any) -> Callable[..., Any]:
    """At loading, before anything is downloaded; a model that turns out to have no experts is said to have none."""

    @wraps(original.__func__)
    def from_pretrained(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        asked = kwargs.get("experts_implementation", getattr(config, "_experts_implementation", None))
        refuse_if_ignored(cls, asked)
        refuse_if_it_cannot_run(asked)
        result = original.__func__(cls, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        name = _our_name(asked)
        if name and not any(is_experts_module(module) for module in model.modules()):
            warnings.warn(
                f"{type(model).__name__} has no experts: experts_implementation={name!r} changes nothing", stacklevel=2
            )
        return result

    from_pretrained.expertune_original = original  # type: ignore[attr-defined]
    return from_pretrained
