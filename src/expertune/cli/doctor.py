"""`expertune doctor`: what is installed, what the machine has, which expert backends run here and why others do not."""

import importlib.util
import platform
from importlib import metadata

from rich.console import Console
from rich.table import Table

import expertune
from expertune.layers.backends import AUTO, BACKENDS, note_about, pick_backend, unavailable_reason

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "pydantic",
    "typer",
    "rich",
    "tensorboard",
    "wandb",
    "deep_ep",
)


def print_doctor(console: Console) -> None:
    """Print three tables: versions, devices, backends."""
    versions = Table("package", "version", title="versions")
    versions.add_row("expertune", expertune.__version__)
    versions.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        versions.add_row(package, _version(package))
    console.print(versions)
    devices = Table("device", "what", title="devices")
    for name, what in _devices():
        devices.add_row(name, what)
    console.print(devices)
    backends = Table("experts_implementation", "runs here", "what it is, or why it cannot run", title="expert backends")
    backends.add_row(AUTO, "yes", f"picks the best that runs: here {pick_backend()}")
    for backend in BACKENDS:
        reason = unavailable_reason(backend.name)
        notes = (backend.summary, note_about(backend.name))
        backends.add_row(backend.name, "no" if reason else "yes", reason or "; ".join(filter(None, notes)))
    console.print(backends)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if importlib.util.find_spec(package) is None:
            return "not installed"
        sources = metadata.packages_distributions().get(package, [])  # under another name, as deep_ep is
        return ", ".join(f"{source} {metadata.version(source)}" for source in sources) or "installed, no version"


def _devices() -> list[tuple[str, str]]:
    import os

    import torch

    devices = [("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        return [*devices, ("cuda", f"no usable NVIDIA GPU (torch is built for: {built})")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices.append(
            (
                f"cuda:{index}",
                f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
                f"{gpu.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}",
            )
        )
    return devices
