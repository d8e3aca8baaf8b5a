"""How many processes each axis of the mesh has. Imports no torch: a configuration is checked with it at once."""

from dataclasses import dataclass

from expertune.errors import ConfigError

DEEP_EP_SIZES = (2, 4, 8)
"""Processes that DeepEP's kernels within one machine are made for."""


@dataclass(frozen=True)
class ParallelSizes:
    """The sizes of the mesh [replicate, shard, expert]; every process has a batch of its own, whatever its place.

    expert: processes that divide the experts of each layer among them (`expert_parallel_size`).
    shard: processes that divide each weight among them, FSDP2 (`dp_shard_size`).
    replicate: copies of all that (`dp_replicate_size`).
    """

    expert: int = 1
    shard: int = 1
    replicate: int = 1

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.expert * self.shard * self.replicate

    def arithmetic(self) -> str:
        """The product as a message shows it."""
        return (
            f"expert_parallel_size {self.expert} x dp_shard_size {self.shard} x dp_replicate_size {self.replicate} "
            f"= {self.world}"
        )


def sizes_for(world: int, *, expert: int, shard: int, replicate: int | None) -> ParallelSizes:
    """The sizes that fill `world` processes; replicate: None takes what the other two leave.

    Raises ConfigError, with the arithmetic, if they do not multiply to `world`.
    """
    if replicate is None:
        left, rest = divmod(world, expert * shard)
        if rest:
            raise ConfigError(
                f"expert_parallel_size, dp_shard_size: {expert} x {shard} = {expert * shard} does not divide the "
                f"{in_words(world)}; {_way_out(expert * shard)}"
            )
        return ParallelSizes(expert, shard, left)
    sizes = ParallelSizes(expert, shard, replicate)
    if sizes.world != world:
        raise ConfigError(
            f"expert_parallel_size, dp_shard_size, dp_replicate_size: {sizes.arithmetic()}, and there "
            f"{'is' if world == 1 else 'are'} {in_words(world)}; {_way_out(sizes.world)}"
        )
    return sizes


def local_experts(num_experts: int, sizes: ParallelSizes, layer: str) -> int:
    """Experts of one layer that each process of the expert axis owns; ConfigError if they do not divide."""
    each, rest = divmod(num_experts, sizes.expert)
    if rest:
        raise ConfigError(
            f"expert_parallel_size: {layer} has {num_experts} experts, and {num_experts} / {sizes.expert} = {each} "
            f"remainder {rest}; need a size that divides them: "
            f"{', '.join(map(str, divisors(num_experts)))}"
        )
    return each


def in_words(world: int) -> str:
    """A number of processes."""
    return "1 process" if world == 1 else f"{world} processes"


def _way_out(needed: int) -> str:
    return f"start {needed} with `expertune launch CONFIG --nproc {needed}`, or change the sizes"


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    return [each for each in range(1, number + 1) if number % each == 0]
