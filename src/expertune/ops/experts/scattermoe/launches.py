"""What a kernel says of its launch to Triton's hooks: name, shape and tile, for `expertune.ops.records`.

Triton calls these only while a hook is installed, so they cost nothing otherwise.
"""

from collections.abc import Callable
from typing import Any

from expertune.ops.experts.scattermoe.tiling import HOPPER_STAGES, HOPPER_TILE
from expertune.ops.records import LaunchDescription


def _linear(name: str, tile_of: Callable[[dict[str, Any]], str], **own: int) -> LaunchDescription:
    """For a kernel that is a projection, its input gradient or a thin product. own: what Triton does not know of it."""

    @LaunchDescription
    def describe(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
        way = ("gathered" if args["GATHER"] else "grouped") + (", transposed" if args["TRANSPOSED"] else "")
        shape = f"X{args['num_in']} Y{args['num_out']} R{args['RANK']} {args['DTYPE']} {way}"
        return {"name": name, "shape": shape, "tile": tile_of(args), **own}

    return describe


describe_linear = _linear("expert_linear", lambda args: f"{args['BLOCK_S']}x{args['BLOCK_Y']}x{args['BLOCK_X']}")
describe_hopper_linear = _linear(
    "hopper_linear", lambda _: "x".join(str(size) for size in HOPPER_TILE), num_stages=HOPPER_STAGES
)


def describe_rows(name: str, *sizes: str) -> LaunchDescription:
    """For a kernel over rows: `sizes` are the names of the arguments that make its shape."""

    @LaunchDescription
    def describe(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, str]:
        return {
            "name": name,
            "shape": " ".join(f"{size}={args[size]}" for size in sizes),
            "tile": "x".join(str(value) for key, value in args.items() if key.startswith("BLOCK_")),
        }

    return describe
