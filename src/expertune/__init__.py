"""expertune: fast, exact LoRA fine-tuning of Mixture-of-Experts language models.

Importing it registers the expert backends with Transformers and teaches PEFT to hand expert adapters to them:

    import expertune
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="expertune")
    config = LoraConfig(target_parameters=expertune.get_target_parameters(model), ...)

Nothing changes for a model that uses another experts implementation.
"""

from typing import Any

from expertune.integrations.on_import import when_imported

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "audit_adapter",
    "check_peft_model",
    "get_attention_modules",
    "get_target_parameters",
    "register",
    "unregister",
]


def register() -> None:
    """Register the backends and the adapter hook; done at import. Idempotent."""
    when_imported("transformers.integrations.moe", _install_experts)
    when_imported("transformers.modeling_utils", _install_refusals)
    when_imported("peft.tuners.lora.layer", _install_adapters)


def unregister() -> None:
    """Undo `register`: Transformers and PEFT are as if expertune had not been imported."""
    from expertune.integrations import adapters, experts, refusals

    experts.uninstall()
    refusals.uninstall()
    adapters.uninstall()


def _install_experts() -> None:
    from expertune.integrations import experts

    experts.install()


def _install_refusals() -> None:
    from expertune.integrations import refusals

    refusals.install()


def _install_adapters() -> None:
    from expertune.integrations import adapters

    adapters.install()


def __getattr__(name: str) -> Any:
    if name in ("get_target_parameters", "get_attention_modules", "check_peft_model"):
        from expertune.integrations import targets

        return getattr(targets, name)
    if name == "audit_adapter":
        from expertune.integrations.audit import audit_adapter

        return audit_adapter
    raise AttributeError(f"module 'expertune' has no attribute {name!r}")


register()
