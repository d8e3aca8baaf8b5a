"""The ledger counts what is alive: each storage once, from its birth to its death, in the kind of its place."""

import torch
from torch.utils.checkpoint import checkpoint

from expertune.estimate.ledger import (
    EXPERTS,
    KEPT,
    OTHER_GRADIENTS,
    PASSING,
    RECOMPUTED,
    ROUND_BYTES,
    Ledger,
    bytes_of,
    rounded,
)

KIB = 1024


def kib(count: int) -> torch.Tensor:
    """A new tensor of so many KiB."""
    return torch.empty(count * KIB, dtype=torch.uint8)


def test_sizes_are_rounded_as_the_allocator_rounds_them() -> None:
    assert [rounded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert ROUND_BYTES == 512


def test_a_storage_counts_once_and_until_it_dies() -> None:
    with Ledger() as ledger:
        first = kib(8)
        view = first[1:].view(-1)
        assert ledger.alive == {KEPT: 8 * KIB}
        del first
        assert ledger.alive == {KEPT: 8 * KIB}, "the view still holds it"
        del view
        assert ledger.alive == {KEPT: 0}
        second = kib(2)
    assert ledger.peak_bytes == 8 * KIB
    assert bytes_of([second, second[1:]]) == 2 * KIB


def test_the_peak_is_of_what_lives_at_one_time() -> None:
    with Ledger() as ledger:
        a = kib(4)
        b = kib(16)
        del a
        c = kib(8)
        del b, c
        d = kib(1)
    assert ledger.peak_bytes == 24 * KIB
    del d


def test_what_was_there_before_does_not_count() -> None:
    before = torch.zeros(256, 256, requires_grad=True)
    with Ledger() as ledger:
        transposed = before.t()
        assert sum(ledger.alive.values()) == 0
        product = before @ transposed
        assert ledger.alive[KEPT] == rounded(product.nbytes)


def test_kinds_are_those_of_the_place() -> None:
    weight = torch.randn(64, 64, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        with ledger.checkpointed():
            return (x @ weight).exp().sin()

    with Ledger() as ledger:
        ledger.mark_gradient(weight, OTHER_GRADIENTS)
        x = torch.randn(64, 64, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False)
        assert set(ledger.alive) == {KEPT}
        with ledger.scope(EXPERTS, passing=True):
            kept_on = kib(4)
            passing = kib(4)
            del passing
            assert ledger.alive[EXPERTS] == 4 * KIB
        assert ledger.alive[EXPERTS] == 0, "what outlives the block is of its place"
        ledger.in_backward = True
        y.sum().backward()
        seen = {kind for moment in ledger.moments for kind, size in moment.items() if size}
        assert ledger.alive[OTHER_GRADIENTS] == rounded(weight.nbytes)
    assert {KEPT, RECOMPUTED, PASSING} <= seen
    del kept_on


def test_a_moment_that_another_covers_is_not_kept() -> None:
    with Ledger() as ledger:
        for size in (1, 2, 3, 2, 1):
            tensor = kib(size)
            del tensor
    assert ledger.moments == [{KEPT: 3 * KIB}]
