"""Sizes of grids and blocks, on the host. No Triton: tables of tiles are read where it is not installed."""


def cdiv(number: int, by: int) -> int:
    """Divide, rounding up. Triton's own is a function of its language: 4 us a call."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number` (which is at least 1)."""
    return 1 << (number - 1).bit_length()
