"""Registers, spills and shared memory of our kernels, compiled for a GPU that need not be there.

    python benchmarks/registers.py                # sm_90, bf16, rank 16 and 64, the tile of the table
    python benchmarks/registers.py --hopper       # the kernel written for Hopper, which has one tile
    python benchmarks/registers.py --gate         # SwiGLU with the adapters' work in its pass, for Hopper
    python benchmarks/registers.py --routing      # of routing and the plan; --variants: all that routing.py tries
    python benchmarks/registers.py --capability 80 --tile 128 128 32 --warps 8 --stages 3 --no-descriptors

A spill shows here in seconds, before a GPU is asked for: each byte of it is a trip to memory in the main loop. ptxas is
the one that Triton brings; the figures are those of the Triton that is installed.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from expertune.ops import plan
from expertune.ops.experts.scattermoe import gate_hopper
from expertune.ops.experts.scattermoe.hopper import NUM_WARPS, _hopper_linear_kernel
from expertune.ops.experts.scattermoe.linear import BLOCK_RANK, GROUP_TILES, _expert_linear_kernel
from expertune.ops.experts.scattermoe.tiles import CHUNK_ROWS
from expertune.ops.experts.scattermoe.tiling import (
    HOPPER_TILE,
    LinearTile,
    RowsTile,
    pick_backward_tile,
    pick_forward_tile,
)
from expertune.ops.plan import ExpertPlan
from expertune.ops.triton_launch import Launcher

POINTER_TYPES = {torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
POINTERS = {
    "x_ptr": "*bf16", "row_index_ptr": "*i64", "w_ptr": "*bf16", "u_ptr": "*bf16", "lora_b_ptr": "*bf16",
    "out_ptr": "*bf16", "tiles_ptr": "*i32",
}  # fmt: skip
DIVISIBLE_BY_16 = {*POINTERS, "stride_x", "num_in", "num_out", "stride_w_expert", "stride_b_expert"}


def arguments(tile: LinearTile, rank: int, gather: bool, transposed: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """(types of the runtime arguments, values of the constants) of one variant, without bias and scatter."""
    with_descriptors = tile.descriptors
    constants: dict[str, Any] = {
        "bias_ptr": None, "out_index_ptr": None, "stride_w_out" if transposed else "stride_w_in": 1, "stride_b_rank": 1,
        "X_DESCRIPTOR": with_descriptors and not gather, "W_DESCRIPTOR": with_descriptors,
        "OUT_DESCRIPTOR": with_descriptors, "GATHER": gather, "SCATTER": False, "HAS_BIAS": False, "RANK": rank,
        "TRANSPOSED": transposed, "DTYPE": tl.bfloat16, "PRECISION": "tf32", "BLOCK_S": tile.rows,
        "BLOCK_Y": tile.columns, "BLOCK_X": tile.k_step, "BLOCK_R": min(rank, BLOCK_RANK), "WHOLE": True,
        "GROUP": GROUP_TILES, "HALVES": tile.halves,
    }  # fmt: skip
    weight_block = [1, tile.k_step, tile.columns] if transposed else [1, tile.columns, tile.k_step]
    blocks = {
        "x_desc": [tile.rows, tile.k_step],
        "w_desc": weight_block,
        "out_desc": [1, 1, tile.rows, tile.columns],
    }
    used = {"x_desc": not gather, "w_desc": True, "out_desc": True}
    types = {"scaling": "fp32", **POINTERS}
    for name, block in blocks.items():
        if with_descriptors and used[name]:
            types[name] = f"tensordesc<bf16[{', '.join(map(str, block))}]>".replace(" ", "")
        else:
            constants[name] = None
    for name in _expert_linear_kernel.arg_names:
        if name not in types and name not in constants:
            types[name] = "i32"
    return types, constants


def hopper_arguments(rank: int, gather: bool, transposed: bool, bias: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """`arguments` for the kernel of `hopper`."""

    def descriptor(*block: int) -> str:
        return f"tensordesc<bf16{list(block)},{gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)!r}>"

    rows, columns, step = HOPPER_TILE
    types = {name: kind for name, kind in POINTERS.items() if name not in ("w_ptr", "lora_b_ptr", "out_ptr")}
    types |= {
        "scaling": "fp32", "bias_ptr": "*bf16", "x_desc": descriptor(rows, step),
        "w_desc": descriptor(step, columns) if transposed else descriptor(columns, step),
        "b_desc": descriptor(rank, columns) if transposed else descriptor(columns, rank),
        "out_desc": descriptor(1, 1, rows, columns // 2),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "GATHER": gather, "HAS_BIAS": bias, "RANK": rank, "TRANSPOSED": transposed, "B_TRANSPOSED": transposed,
        "DTYPE": gl.bfloat16,
    }  # fmt: skip
    for name in ([] if bias else ["bias_ptr"]) + (["x_desc"] if gather else ["row_index_ptr"]):
        types.pop(name)
        constants[name] = None
    for name in _hopper_linear_kernel.arg_names:
        if name not in types and name not in constants:
            types[name] = "i32"
    return types, constants


def gate_arguments(kernel: Any, rank: int, tile: RowsTile) -> tuple[dict[str, str], dict[str, Any]]:
    """`arguments` for a kernel of `gate_hopper`."""
    constants: dict[str, Any] = {
        "RANK": rank, "RANK1": rank, "RANK2": rank, "TILE_ROWS": 128, "CHUNK_S": CHUNK_ROWS, "DTYPE": gl.bfloat16,
        "BLOCK_S": tile.rows, "BLOCK_X": tile.columns,
    }  # fmt: skip
    rows = ("h_ptr", "a_ptr", "da_ptr", "dh_ptr", "p_ptr", "u1_ptr", "u2_ptr", "v2_ptr", "lora_a_ptr")
    tables = ("tiles_ptr", "chunks_ptr", "row_fence_ptr", "counters_ptr")
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(rows, "*bf16") | dict.fromkeys(tables, "*i32")
    types |= {"scaling1": "fp32", "scaling2": "fp32"}
    names = kernel.arg_names
    types = {name: types.get(name, "i32") for name in names if name not in constants}
    return types, {name: value for name, value in constants.items() if name in names}


def assemble(ptx: str, arch: str) -> str:
    """What ptxas says: of the ones that Triton brings, the first that knows this version of PTX."""
    complaints = []
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        for ptxas in sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
            command = [str(ptxas), "-v", f"--gpu-name={arch}", str(source), "-o", str(binary)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stderr
            complaints.append(f"{ptxas.name}: {done.stderr or done.stdout}")
    raise SystemExit("\n".join(complaints) or "Triton brings no ptxas here")


def compile_and_read(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    capability: int,
    divisible: Collection[str] = DIVISIBLE_BY_16,
) -> str:
    """Compile one variant and say what ptxas says."""
    names = kernel.arg_names
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name in types},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    said = assemble(compiled.asm["ptx"], f"sm_{capability}" + ("a" if capability >= 90 else ""))
    registers, spills = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    return f"{registers[0]:>4} registers {spills[0]:>6} B spilled {compiled.metadata.shared:>7} B shared"


def compile_launch(jit: Any, args: Sequence[Any], num_warps: int, capability: int) -> str:
    """Compile what a `Launcher` would launch with these arguments, specialised as Triton specialises."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for parameter, arg in zip(jit.params, args, strict=True):
        name, general = parameter.name, parameter.do_not_specialize
        if parameter.is_constexpr or arg is None or (isinstance(arg, int) and arg == 1 and not general):
            constants[name] = arg
            continue
        is_tensor = isinstance(arg, torch.Tensor)
        types[name] = POINTER_TYPES[arg.dtype] if is_tensor else "fp32" if isinstance(arg, float) else "i32"
        if not general and not isinstance(arg, float) and (arg.data_ptr() if is_tensor else arg) % 16 == 0:
            divisible.append(name)
    options = {"num_warps": num_warps} | ({"launch_pdl": True} if capability >= 90 else {})
    return compile_and_read(jit, types, constants, options, capability, divisible)


def routing_launches(experts: int, *, variants: bool) -> dict[tuple[Any, ...], tuple[Any, Sequence[Any], int]]:
    """(kernel, arguments, warps) of all that routing and plan launch on fp32 logits; those that compile alike once."""
    import routing

    launches: dict[tuple[Any, ...], tuple[Any, Sequence[Any], int]] = {}

    def note(launcher: Any, _grid: Any, *args: Any, num_warps: int = 4, num_stages: int = 3) -> None:
        key = tuple(arg for arg, p in zip(args, launcher.kernel.params, strict=True) if p.is_constexpr or arg is None)
        launches.setdefault((launcher.kernel.fn.__name__, key, num_warps), (launcher.kernel, args, num_warps))

    def sort(ids_TK: torch.Tensor, num_experts: int, table_rows: tuple[int, int] | None = None) -> ExpertPlan:
        return plan._by_counting(ids_TK, num_experts, sentinels=False, table_rows=table_rows)

    with patch.object(Launcher, "__call__", note), patch.object(routing, "build_plan", sort):
        routing.launch_all(routing.Problem.of(8192, experts, torch.device("cpu")), variants=variants)
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--tile", type=int, nargs=3, default=(128, 256, 64), metavar=("ROWS", "COLUMNS", "K_STEP"))
    parser.add_argument("--warps", type=int, default=8)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=(16, 64))
    parser.add_argument("--no-descriptors", action="store_true")
    parser.add_argument("--hopper", action="store_true")
    parser.add_argument("--bias", action="store_true", help="with --hopper")
    parser.add_argument("--gate", action="store_true")
    parser.add_argument("--routing", action="store_true")
    parser.add_argument("--variants", action="store_true", help="with --routing")
    given = parser.parse_args()
    if given.routing:
        for experts in (64, 128, 256):
            for (name, constants, _), (jit, args, warps) in routing_launches(experts, variants=given.variants).items():
                said = compile_launch(jit, args, warps, given.capability)
                print(f"E {experts:<4} {name:<24} {warps} warps {said}  {constants}", flush=True)
        return
    if given.gate:
        for kernel, pick in (
            (gate_hopper._swiglu_thin_kernel, pick_forward_tile),
            (gate_hopper._swiglu_backward_sums_kernel, pick_backward_tile),
        ):
            for rank in given.ranks:
                types, constants = gate_arguments(kernel, rank, pick(rank))
                aligned = [name for name in types if name.endswith("_ptr") or name == "width"]
                options = {"num_warps": pick(rank).num_warps}
                figures = compile_and_read(kernel, types, constants, options, given.capability, aligned)
                print(f"{kernel.fn.__name__:<30} rank {rank:<4} {figures}", flush=True)
        return
    for halves in (True,) if given.hopper else (False, True):
        tile = LinearTile(
            *given.tile, given.warps, given.stages, descriptors=not given.no_descriptors, halves=halves
        )  # fmt: skip
        for rank in given.ranks:
            for name, gather, transposed in (
                ("up", True, False), ("down", False, False), ("da", True, True), ("dx", False, True),
            ):  # fmt: skip
                if given.hopper:
                    kernel, options = _hopper_linear_kernel, {"num_warps": NUM_WARPS.value}
                    types, constants = hopper_arguments(rank, gather, transposed, given.bias)
                else:
                    kernel, options = (
                        _expert_linear_kernel,
                        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
                    )
                    types, constants = arguments(tile, rank, gather, transposed)
                figures = compile_and_read(kernel, types, constants, options, given.capability)
                print(f"{name:<5} rank {rank:<4} {'halves' if halves else '':<7} {figures}", flush=True)


if __name__ == "__main__":
    main()
