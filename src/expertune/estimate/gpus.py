"""How much memory a GPU gives to torch: its `total_memory`, less than the number in its name."""

from collections.abc import Mapping
from types import MappingProxyType

from expertune.bench.cases import unknown
from expertune.errors import ConfigError

GIB = 2**30

# GiB, rounded down, of what torch's out-of-memory messages call "total capacity". H200: the machine of our measurements
# ("about 139 GiB"). H100: 79.11, vllm-project/vllm/issues/27508. RTX 5090: 31.37, Wan-Video/Wan2.1/issues/465.
# RTX 4090: 23.68, zai-org/CogVideo/issues/36. The others are from memory of such messages and were not looked up:
# --memory-gib says what is so on a machine at hand.
GPU_GIB: Mapping[str, float] = MappingProxyType(
    {
        "A100-40GB": 39.3,
        "A100-80GB": 79.1,
        "B200": 178.3,
        "H100": 79.1,
        "H20": 95.0,
        "H200": 139.0,
        "L4": 21.9,
        "L40S": 44.3,
        "RTX 3090": 23.6,
        "RTX 4090": 23.5,
        "RTX 5090": 31.3,
    }
)


def memory_of(name: str) -> int:
    """Bytes of a GPU by its name, in any case; raises ConfigError with the nearest name if it is not in the table."""
    named = {known.lower().replace(" ", ""): gib for known, gib in GPU_GIB.items()}
    wanted = name.lower().replace(" ", "").removeprefix("nvidia")
    if wanted not in named:
        raise ConfigError(
            f"--gpu: {unknown(name, GPU_GIB)}; for any other say --memory-gib, what torch calls its total_memory"
        )
    return int(named[wanted] * GIB)
