"""Where a measurement was made: for the last columns of every CSV."""

import platform
import subprocess
from pathlib import Path

import peft
import torch
import transformers

import expertune


def environment() -> dict[str, str]:
    """Device, threads, versions and commit, "+" after the commit for a changed tree."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "expertune": expertune.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout

    source_changed = git("status", "--porcelain", "--", "../src", "../benchmarks/*.py").strip()
    return (git("rev-parse", "--short", "HEAD").strip() or "unknown") + ("+" if source_changed else "")
