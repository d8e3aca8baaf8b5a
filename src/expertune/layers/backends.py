"""The expert backends by name: what each is, and why it cannot run here if it cannot.

Light on purpose: torch is imported only to ask about a device, so that a configuration is checked in milliseconds.
"""

from dataclasses import dataclass
from importlib.util import find_spec

AUTO = "expertune"
TORCH_GROUPED = "torch_grouped"
SCATTERMOE = "scattermoe"


@dataclass(frozen=True)
class Backend:
    """One way to compute the experts.

    name: as in `experts_implementation`. summary: one line for `expertune doctor`.
    min_capability: the CUDA capability it needs, None for any device. package: a package that it needs beside ours.
    released: whether this version contains it.
    """

    name: str
    summary: str
    min_capability: tuple[int, int] | None = None
    package: str | None = None
    released: bool = True


BACKENDS = (
    Backend("sonicmoe", "kernels for Hopper and newer, adapters unfolded", min_capability=(9, 0), released=False),
    Backend(SCATTERMOE, "fused Triton kernels, adapters unfolded", min_capability=(8, 0), package="triton"),
    Backend(TORCH_GROUPED, "torch's grouped products on any device, adapters unfolded"),
)
"""Best first: the order in which `expertune` (auto) tries them."""

IMPLEMENTATIONS = (AUTO, *(backend.name for backend in BACKENDS if backend.released))
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
    problems = [] if backend.released else [f"{name} is not part of this version of expertune"]
    problems += _device_problems(backend, device_type)
    if backend.package is not None and find_spec(backend.package) is None:
        problems.append(f"{name} needs the package {backend.package}, which is not installed")
    return f"{'; '.join(problems)}. Use {setting}: {AUTO}" if problems else None


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
