"""On a GPU newer than Hopper: Hopper's kernel stays out, and the tile of the table compiles for the other one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expertune.ops import triton_launch
from expertune.ops.experts.scattermoe.hopper import takes
from expertune.ops.experts.scattermoe.tiling import fitting_rows

SHARED_KIB = {100: 227, 103: 227, 120: 99}  # of a block: CUDA C++ Programming Guide, technical specifications
PROGRAM = """
import sys
sys.path.insert(0, "{benchmarks}")
import registers
from expertune.ops.experts.scattermoe.tiling import fitting_rows
tile = fitting_rows({capability}, {shared_bytes}, 2)[0].tile
types, constants = registers.arguments(tile, rank=16, gather=True, transposed=False)
options = {{"num_warps": tile.num_warps, "num_stages": tile.num_stages}}
print(registers.compile_and_read(registers._expert_linear_kernel, types, constants, options, {arch}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_KIB)
def test_the_kernel_that_runs_there_compiles_without_spills(arch: int) -> None:
    benchmarks = Path(__file__).parents[4] / "benchmarks"
    code = PROGRAM.format(
        benchmarks=benchmarks, capability=divmod(arch, 10), shared_bytes=SHARED_KIB[arch] * 1024, arch=arch
    )
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    _, _, spilled, _, _, shared, *_ = done.stdout.split()
    assert int(spilled) == 0
    assert int(shared) <= SHARED_KIB[arch] * 1024


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0)])
def test_hoppers_kernel_stays_out(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert not triton_launch.is_hopper.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr("expertune.ops.experts.scattermoe.hopper.is_hopper", lambda _: False)
    x_NX, weight = torch.empty(8, 256, dtype=torch.bfloat16), torch.empty(2, 256, 256, dtype=torch.bfloat16)
    assert not takes(x_NX, None, weight, None, None)


def test_a_small_gpu_gets_no_tile_of_hoppers() -> None:
    assert fitting_rows((12, 0), 99 * 1024, 2)[0].tile.hopper is False
