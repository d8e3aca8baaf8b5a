"""The expert backends by name: what each is, and why it cannot run here if it cannot.

Light on purpose: torch is imported only to ask about a device, so that a configuration is checked in milliseconds.
"""

import re
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Literal

AUTO = "expertune"
TORCH_GROUPED = "torch_grouped"
SCATTERMOE = "scattermoe"
SONICMOE = "sonicmoe"
SONICMOE_MATERIALIZE = "sonicmoe_materialize"
SONICMOE_ADAPTERS: MappingProxyType[str, Literal["low_rank", "materialize"]] = MappingProxyType(
    {SONICMOE: "low_rank", SONICMOE_MATERIALIZE: "materialize"}
)
"""The names of sonicmoe, and how each applies adapters. A name of its own for each way goes wherever a name does:
Transformers' interface, a model's configuration, `MoEBlock`, reports; nothing else has to be handed down."""


@dataclass(frozen=True)
class Backend:
    """One way to compute the experts.

    name: as in `experts_implementation`. summary: one line for `expertune doctor`.
    min_capability: the CUDA capability it needs, None for any device. needs_triton: Triton, with gluon.
    """

    name: str
    summary: str
    min_capability: tuple[int, int] | None = None
    needs_triton: bool = False


# On Hopper scattermoe runs the very kernels of sonicmoe, and elsewhere sonicmoe runs those of scattermoe: as long as no
# measurement tells them apart, auto stays with the one that also runs on older GPUs and takes the tiles of a tuning.
BACKENDS = (
    Backend(SCATTERMOE, "fused Triton kernels, adapters unfolded", min_capability=(8, 0), needs_triton=True),
    Backend(SONICMOE, "kernels for Hopper, adapters in their accumulator", min_capability=(9, 0), needs_triton=True),
    Backend(TORCH_GROUPED, "torch's grouped products on any device, adapters unfolded"),
    Backend(
        SONICMOE_MATERIALIZE,
        "sonicmoe's kernels on weights with the adapter folded in",
        min_capability=(9, 0),
        needs_triton=True,
    ),
)
"""In the order in which `expertune` (auto) tries them: the first that can run. torch_grouped always can, so that what
comes after it runs only when it is asked for."""

MIN_TRITON = (3, 6)
_GLUON = Path("experimental", "gluon", "language", "nvidia", "hopper")  # in Triton's package

IMPLEMENTATIONS = (AUTO, *(backend.name for backend in BACKENDS))
"""The names that expertune registers with Transformers."""


def unavailable_reason(
    name: str, device_type: str | None = None, *, setting: str = "experts_implementation"
) -> str | None:
    """Say why a backend cannot run, and the way out; None if it can.

    name: a backend's name, or "expertune", which always can. device_type: "cpu" or "cuda"; None: what this machine has.
    setting: what the person sets to choose a backend.
    Raises ValueError for a name that is no backend of expertune's.
    """
    if name == AUTO:
        return None
    backend = next((backend for backend in BACKENDS if backend.name == name), None)
    if backend is None:
        raise ValueError(f"{name!r} is no expert backend; there are {', '.join([AUTO, *(b.name for b in BACKENDS)])}")
    problems = _device_problems(backend, device_type) + _triton_problems(backend)
    return f"{'; '.join(problems)}. Use {setting}: {AUTO}" if problems else None


def note_about(name: str) -> str | None:
    """What to know about a backend that can run here, if there is something: sonicmoe off Hopper."""
    if name not in SONICMOE_ADAPTERS:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    if major == 9:
        return None
    return (
        f"its Hopper kernel does not run on {torch.cuda.get_device_name()} ({major}.{minor}): scattermoe's kernels "
        "run, which were not measured there"
    )


def pick_backend(device_type: str | None = None) -> str:
    """Name the best backend that can run on a device type; None means what this machine has."""
    return next(backend.name for backend in BACKENDS if unavailable_reason(backend.name, device_type) is None)


def _device_problems(backend: Backend, device_type: str | None) -> list[str]:
    if backend.min_capability is None:
        return []
    need = f"{backend.name} needs an NVIDIA GPU of compute capability {backend.min_capability[0]}.x or newer"
    if backend.min_capability[0] >= 9:
        need += " (Hopper)"
    import torch

    if device_type == "cpu" or not torch.cuda.is_available():
        where = "the model is on the CPU" if device_type == "cpu" else "this machine has no usable NVIDIA GPU"
        return [need, where]
    capability = torch.cuda.get_device_capability()
    if capability < backend.min_capability:
        return [need, f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"]
    return []


def _triton_problems(backend: Backend) -> list[str]:
    """Found by looking, for to import Triton takes as long as everything else here."""
    if not backend.needs_triton:
        return []
    spec = find_spec("triton")
    if spec is None:
        return [f"{backend.name} needs the package triton, which is not installed"]
    need = f"{backend.name} needs the package triton {'.'.join(map(str, MIN_TRITON))} or newer with its gluon dialect"
    version = _triton_version()
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers and tuple(map(int, numbers.groups())) < MIN_TRITON:
        return [need, f"triton {version} is installed"]
    if not any(Path(folder, _GLUON).exists() for folder in spec.submodule_search_locations or ()):
        return [need, f"triton {version or 'of no known version'} is installed, without gluon for Hopper"]
    return []


def _triton_version() -> str | None:
    for distribution in ("triton", "pytorch-triton"):  # the second comes with torch's nightly builds
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None
