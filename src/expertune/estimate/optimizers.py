"""What an optimizer keeps for each trained parameter, and what its update holds for a moment."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from expertune.errors import ConfigError

_BLOCK = 4 / 256  # bitsandbytes, torchao: an fp32 scale for 256 values of 8 bits
_BLOCK_4BIT = 4 / 128

# Bytes of state for each parameter: fp32 moments unless quantised. Paged states count: they are used every step.
_KEPT: Mapping[str, float] = MappingProxyType(
    {
        "adamw_torch": 8,
        "adamw_torch_fused": 8,
        "adamw_torch_8bit": 2 * (1 + _BLOCK),
        "adamw_torch_4bit": 2 * (0.5 + _BLOCK_4BIT),
        "adamw_8bit": 2 * (1 + _BLOCK),
        "adamw_bnb_8bit": 2 * (1 + _BLOCK),
        "paged_adamw_32bit": 8,
        "paged_adamw_8bit": 2 * (1 + _BLOCK),
        "adafactor": 0,  # a row and a column of each matrix: below a hundredth of the adapter
        "ademamix": 12,
        "ademamix_8bit": 3 * (1 + _BLOCK),
        "lion_32bit": 4,
        "lion_8bit": 1 + _BLOCK,
        "paged_lion_32bit": 4,
        "paged_lion_8bit": 1 + _BLOCK,
        "rmsprop": 4,
        "sgd": 0,
        "adagrad": 4,
    }
)
# Those whose update over all tensors at once (torch's foreach) makes a copy as large as the parameters.
_COPYING = ("adamw_torch", "rmsprop", "adagrad")


@dataclass(frozen=True)
class OptimizerBytes:
    """kept: bytes of state for each trained parameter. passing: copies of the parameters that an update makes."""

    name: str
    kept: float
    passing: float


def optimizer_bytes(name: str) -> OptimizerBytes:
    """By Transformers' name; raises ConfigError for one that is not in the table."""
    if name not in _KEPT:
        raise ConfigError(f"optimizer: got {name}; the estimate knows {', '.join(_KEPT)}")
    return OptimizerBytes(name, _KEPT[name], float(name in _COPYING))
