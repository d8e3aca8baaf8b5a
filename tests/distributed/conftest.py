"""Processes that live as long as the session: starting them costs more than most cases."""

from collections.abc import Iterator

import pytest

from tests.distributed.processes import Crew, crew


@pytest.fixture(scope="session")
def two() -> Iterator[Crew]:
    with crew(2) as started:
        yield started


@pytest.fixture(scope="session")
def four() -> Iterator[Crew]:
    with crew(4) as started:
        yield started
