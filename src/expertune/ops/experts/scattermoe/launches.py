"""What a kernel says of its launch to Triton's hooks: name, shape and tile, for `expertune.ops.records`.

Triton calls these only while a hook is installed, so they cost nothing otherwise.
"""

from typing import Any

from expertune.ops.records import LaunchDescription


@LaunchDescription
def describe_linear(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, str]:
    """A projection, its input gradient or a thin product."""
    way = "gathered" if args["GATHER"] else "grouped"
    way += ", transposed" if args["TRANSPOSED"] else ""
    return {
        "name": "expert_linear",
        "shape": f"X{args['num_in']} Y{args['num_out']} R{args['RANK']} {args['DTYPE']} {way}",
        "tile": f"{args['BLOCK_S']}x{args['BLOCK_Y']}x{args['BLOCK_X']}",
    }


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


@LaunchDescription
def describe_hopper_linear(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, str]:
    """A projection or its input gradient in the kernel of `hopper`."""
    way = "gathered" if args["GATHER"] else "grouped"
    way += ", transposed" if args["TRANSPOSED"] else ""
    return {
        "name": "hopper_linear",
        "shape": f"X{args['num_in']} Y{args['num_out']} R{args['RANK']} {args['DTYPE']} {way}",
        "tile": "128x256x64",
    }
