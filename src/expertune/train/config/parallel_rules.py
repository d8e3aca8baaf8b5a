"""What goes together with several processes, and what does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from expertune.distributed.sizes import DEEP_EP_SIZES
from expertune.train.config.problems import Problem
from expertune.train.config.schema import TrainConfig

SIZES = ("expert_parallel_size", "dp_shard_size", "dp_replicate_size")
_BY_VALUE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimizers that treat every value by itself, so that a part of a parameter is updated as it is in the whole."""


def check_parallel(config: TrainConfig) -> Iterator[Problem]:
    """Problems that the file alone shows: it says that there are several processes."""
    if config.expert_parallel_backend == "deep_ep":
        yield from _deep_ep(config)
    if config.fsdp_config:
        yield Problem(
            ("fsdp_config",), "FSDP2 has no options here: dp_shard_size says how many share each weight; remove it"
        )
    larger = tuple(name for name in SIZES if (getattr(config, name) or 1) > 1)
    if larger:
        yield from several_processes(config, larger)


def several_processes(config: TrainConfig, because: tuple[str, ...] = ()) -> Iterator[Problem]:
    """What a run in several processes cannot have. because: the keys that make them several, for the message."""
    if config.optimizer not in _BY_VALUE:
        yield Problem(
            ("optimizer", *because),
            f"got {config.optimizer}; need one of {', '.join(_BY_VALUE)} in several processes, which update each value "
            "by itself; say optimizer: adamw_torch_fused",
        )
    unsupported = {
        "torch_compile": config.torch_compile,
        "activation_offloading": config.activation_offloading,
        "lora_modules_to_save": bool(config.lora_modules_to_save),
        "fp16": config.fp16,
    }
    for name, is_set in unsupported.items():
        if is_set:
            yield Problem((name, *because), f"{name} is not supported in several processes; remove it")


def _deep_ep(config: TrainConfig) -> Iterator[Problem]:
    if importlib.util.find_spec("deep_ep") is None:
        yield Problem(
            ("expert_parallel_backend",),
            "got deep_ep, and the package deep_ep is not installed; remove the key to use NCCL's all-to-all",
        )
    if config.expert_parallel_size not in DEEP_EP_SIZES:
        yield Problem(
            ("expert_parallel_backend", "expert_parallel_size"),
            f"got deep_ep and {config.expert_parallel_size}; deep_ep works between 2, 4 or 8 processes of a machine; "
            "change the size, or remove expert_parallel_backend to use NCCL's all-to-all",
        )
    if config.fp16 or config.bf16 is False:
        yield Problem(
            ("expert_parallel_backend", "fp16" if config.fp16 else "bf16"),
            "got deep_ep, which adds up bf16 only; say bf16: true, or remove expert_parallel_backend to use NCCL's "
            "all-to-all",
        )
