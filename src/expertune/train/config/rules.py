"""Keys that contradict each other, the machine or this version; each problem names the keys and the way out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import MappingProxyType

from expertune.train.config.model_keys import DatasetConfig
from expertune.train.config.parallel_rules import check_parallel
from expertune.train.config.problems import Problem, nearest
from expertune.train.config.schema import TrainConfig

_OURS = ("expertune", "torch_grouped", "scattermoe", "sonicmoe")
_TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_ATTENTION_SHORT = MappingProxyType({"flash": "flash_attention_2", "flex": "flex_attention", "sdp": "sdpa"})
_BACKEND_FLAGS = ("scattermoe", "sonicmoe")
_BITSANDBYTES = ("adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit")
_TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")


def experts_backend_problem(name: str) -> str | None:
    """Why an expert backend of expertune's cannot run on this machine, or None if it can."""
    from expertune.layers.backends import unavailable_reason

    return unavailable_reason(name)


def package_missing(name: str) -> bool:
    """Whether a Python package is not installed; it is not imported."""
    return importlib.util.find_spec(name) is None


def check_rules(config: TrainConfig, given: frozenset[str]) -> list[Problem]:
    """List every contradiction. given: the top-level keys that were set; a default contradicts nothing."""
    return [
        *_experts(config, given),
        *_adapter(config),
        *_data(config, given),
        *_schedule(config, given),
        *_precision(config, given),
        *_starting_point(config),
        *_packages(config),
        *check_parallel(config),
    ]


def _experts(config: TrainConfig, given: frozenset[str]) -> Iterator[Problem]:
    chosen, chosen_key = config.experts_implementation, "experts_implementation"
    if config.use_scattermoe and config.use_sonicmoe:
        yield Problem(("use_scattermoe", "use_sonicmoe"), "both are true; need at most one; remove one of them")
        return
    for backend in _BACKEND_FLAGS:
        flag = getattr(config, f"use_{backend}")
        if flag and chosen_key in given and chosen != backend:
            yield Problem(
                (f"use_{backend}", chosen_key),
                f"use_{backend} is true and {chosen_key} is {chosen}; remove one of them",
            )
            return
        if flag is False and chosen_key in given and chosen == backend:
            yield Problem(
                (f"use_{backend}", chosen_key), f"use_{backend} is false and {chosen_key} is {chosen}; remove one"
            )
            return
        if flag:
            chosen, chosen_key = backend, f"use_{backend}"
    if chosen not in (*_OURS, *_TRANSFORMERS):
        near = nearest(chosen, (*_OURS, *_TRANSFORMERS))
        yield Problem(
            (chosen_key,),
            f"got {chosen}; need one of {', '.join(_OURS)} (expertune's), {', '.join(_TRANSFORMERS)} (Transformers')"
            + (f"; the nearest is {near}" if near else "; expertune picks the best that can run here"),
        )
    elif chosen in _OURS:
        reason = experts_backend_problem(chosen)
        if reason is not None:
            yield Problem((chosen_key,), reason)
    if config.sonicmoe_lora is not None and chosen != "sonicmoe":
        yield Problem(
            ("sonicmoe_lora",),
            f"got {config.sonicmoe_lora}; it is how sonicmoe applies adapters, and experts_implementation is {chosen}; "
            "say use_sonicmoe: true, or remove it",
            depends=("experts_implementation", "use_sonicmoe", "use_scattermoe"),
        )


def _adapter(config: TrainConfig) -> Iterator[Problem]:
    experts_adapted = config.lora_target_parameters is None or len(config.lora_target_parameters) > 0
    if config.lora_model_dir is None and config.lora_dropout > 0 and (experts_adapted or config.lora_router):
        yield Problem(
            ("lora_dropout",),
            f"got {config.lora_dropout:g}; need 0, because PEFT has no dropout for expert parameters; say "
            "lora_dropout: 0, or lora_target_parameters: [] to adapt attention only",
            depends=("lora_target_parameters", "lora_router", "lora_model_dir"),
        )
    nothing = config.lora_target_modules == [] and not experts_adapted and not config.lora_router
    if nothing and not config.lora_modules_to_save:
        yield Problem(
            ("lora_target_modules", "lora_target_parameters"),
            "both are empty, so nothing would train; remove one of them",
        )


def _data(config: TrainConfig, given: frozenset[str]) -> Iterator[Problem]:
    if config.test_datasets and config.val_set_size:
        yield Problem(
            ("val_set_size", "test_datasets"),
            "both name the held-out rows; need one; say val_set_size: 0 or remove the other",
        )
    if config.eval_sample_packing and not config.sample_packing:
        yield Problem(
            ("eval_sample_packing", "sample_packing"),
            "held-out rows cannot be packed where training rows are not; say sample_packing: true, or remove it",
        )
    if config.chat_template == "jinja" and config.chat_template_jinja is None:
        yield Problem(
            ("chat_template",),
            "got jinja, and chat_template_jinja is missing; need the template there, or the path of its file",
        )
    if config.chat_template_jinja is not None and "chat_template" in given and config.chat_template != "jinja":
        yield Problem(
            ("chat_template_jinja", "chat_template"),
            f"a template is given and chat_template is {config.chat_template}; say chat_template: jinja, or remove one",
        )
    if config.dataloader_prefetch_factor is not None and config.dataloader_num_workers == 0:
        yield Problem(
            ("dataloader_prefetch_factor",), "needs dataloader_num_workers of at least 1; set that, or remove it"
        )
    for name in ("datasets", "test_datasets"):
        for index, entry in enumerate(getattr(config, name) or ()):
            yield from _entry(entry, f"{name}[{index}]")


def _entry(entry: DatasetConfig, path: str) -> Iterator[Problem]:
    mappings = entry.message_property_mappings
    for part in ("role", "content"):
        old, new = getattr(entry, f"message_field_{part}"), getattr(mappings, part, None)
        if old is not None and new is not None and old != new:
            yield Problem(
                (f"{path}.message_field_{part}", f"{path}.message_property_mappings.{part}"),
                f"one says {old}, the other {new}; remove the older message_field_{part}",
            )
    columns = {
        "alpaca": ("field_instruction", "field_input", "field_output"),
        "completion": ("field",),
        "chat_template": ("field_messages", "roles", "message_property_mappings"),
    }
    for kind, names in columns.items():
        for name in names:
            wrong_type = entry.type is not None and entry.type != kind
            if entry.type == "prompt_completion" and kind == "chat_template" and name != "field_messages":
                continue  # a prompt and a completion can be lists of messages
            if wrong_type and getattr(entry, name) is not None:
                yield Problem(
                    (f"{path}.{name}", f"{path}.type"),
                    f"{name} belongs to type {kind} and type is {entry.type}; remove one",
                )


def _schedule(config: TrainConfig, given: frozenset[str]) -> Iterator[Problem]:
    if config.warmup_steps is not None and config.warmup_ratio is not None:
        yield Problem(("warmup_steps", "warmup_ratio"), "both are given; need one; remove the other, or set it to null")
    for what, heldout_needed in (("save", False), ("eval", True)):
        strategy = getattr(config, f"{what}_strategy")
        steps = getattr(config, f"{what}_steps")
        per_epoch = getattr(config, f"{what}s_per_epoch")
        names = (f"{what}_steps", f"{what}s_per_epoch")
        set_names = tuple(name for name, value in zip(names, (steps, per_epoch), strict=True) if value is not None)
        if len(set_names) == 2:
            yield Problem(names, "both are given; need one; remove the other, or set it to null")
        elif set_names and strategy not in (None, "steps"):
            yield Problem(
                (set_names[0], f"{what}_strategy"),
                f"{what}_strategy is {strategy}, so {set_names[0]} would not count; say {what}_strategy: steps, "
                "or remove one",
            )
        elif strategy == "steps" and not set_names:
            yield Problem((f"{what}_strategy",), f"got steps; need {names[0]} or {names[1]} with it")
        if heldout_needed and not config.has_heldout:
            wanted = [*set_names, *([f"{what}_strategy"] if strategy not in (None, "no") else [])]
            if config.eval_on_start and "eval_on_start" in given:
                wanted.append("eval_on_start")
            if wanted:
                yield Problem(
                    tuple(wanted),
                    "no rows are held out to measure a loss on; set val_set_size (for example 0.05) or test_datasets, "
                    f"or remove {'it' if len(wanted) == 1 else 'them'}",
                    depends=("val_set_size", "test_datasets"),
                )


def _precision(config: TrainConfig, given: frozenset[str]) -> Iterator[Problem]:
    if config.fp16 and config.bf16 is True:
        yield Problem(("bf16", "fp16"), "both are true; need one; bf16 is the better where the GPU has it")
    chosen = config.attn_implementation
    if chosen is not None and chosen not in _ATTENTION and "/" not in chosen:
        near = _ATTENTION_SHORT.get(chosen) or nearest(chosen, _ATTENTION)
        yield Problem(
            ("attn_implementation",),
            f"got {chosen}; need one of {', '.join(_ATTENTION)}, or the hub id of a kernel"
            + (f"; the nearest is {near}" if near else "; leave it out and Transformers chooses"),
        )
    if config.flash_attention is not None and chosen is not None:
        is_flash = chosen.startswith("flash_attention") or "flash" in chosen
        if config.flash_attention != is_flash:
            word = "true" if config.flash_attention else "false"
            yield Problem(
                ("flash_attention", "attn_implementation"),
                f"flash_attention is {word} and attn_implementation is {chosen}; remove flash_attention",
            )
    for name in ("torch_compile_backend", "torch_compile_mode"):
        if getattr(config, name) is not None and not config.torch_compile:
            yield Problem((name,), "counts only with torch_compile: true; set that, or remove it")
    if (
        config.gradient_checkpointing_kwargs
        and not config.gradient_checkpointing
        and "gradient_checkpointing" not in given
    ):
        yield Problem(
            ("gradient_checkpointing_kwargs",), "counts only with gradient_checkpointing: true; set that, or remove it"
        )


def _starting_point(config: TrainConfig) -> Iterator[Problem]:
    if config.resume_from_checkpoint is not None and config.lora_model_dir is not None:
        yield Problem(
            ("resume_from_checkpoint", "lora_model_dir"),
            "both say where to start; keep resume_from_checkpoint to go on with the same run, or lora_model_dir to "
            "start a new one from its adapter",
        )
    if config.resume_from_checkpoint is not None and config.auto_resume_from_checkpoints:
        yield Problem(
            ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
            "one names a checkpoint, the other asks for the newest; remove one of them",
        )


def _packages(config: TrainConfig) -> Iterator[Problem]:
    needed = {name: (name, f"pip install {name}") for name in ("wandb", "mlflow", "trackio", "comet_ml", "swanlab")}
    needed["tensorboard"] = ("tensorboard", "pip install 'expertune[tensorboard]'")
    wanted = dict.fromkeys(config.report_to or (), "report_to")
    if config.report_to is None:
        wanted |= {name: f"use_{name}" for name in ("tensorboard", "wandb") if getattr(config, f"use_{name}")}
        if config.wandb_project is not None and config.use_wandb is None and config.wandb_mode != "disabled":
            wanted["wandb"] = "wandb_project"
    else:
        for name in ("tensorboard", "wandb"):
            if getattr(config, f"use_{name}") and name not in config.report_to:
                listed = ", ".join(config.report_to) or "none"
                yield Problem(
                    (f"use_{name}", "report_to"),
                    f"use_{name} is true and report_to is {listed}; add {name} to report_to",
                )
    for name, owner in wanted.items():
        package, command = needed[name]
        if package_missing(package):
            yield Problem((owner,), f"{name} is not installed; run `{command}`, or say report_to: none")
    for package, optimizers in (("bitsandbytes", _BITSANDBYTES), ("torchao", _TORCHAO)):
        listed_here = config.optimizer in optimizers or (
            package == "bitsandbytes" and config.optimizer.startswith("paged_")
        )
        if listed_here and package_missing(package):
            yield Problem(
                ("optimizer",),
                f"{config.optimizer} needs {package}, which is not installed; run `pip install {package}`, or say "
                "optimizer: adamw_torch_fused",
            )
