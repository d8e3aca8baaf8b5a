"""A small problem for the tests of this folder, and no question to git about the commit."""

from collections.abc import Iterator

import pytest
import torch

from expertune.bench.cases import Case, ExpertShape
from expertune.bench.problem import Problem, draw_problem

TINY = ExpertShape("tiny", 5, 32, 16, 2)


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertune.bench.results.commit_of", lambda _folder: "abc1234+")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take 100 times as long on threads that wait for a busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def problem() -> Problem:
    return tiny_problem()


def tiny_problem(dtype: torch.dtype = torch.float32, rank: int = 8, routing: str = "uniform") -> Problem:
    return draw_problem(Case(TINY, 13, rank, routing), seed=3, device=torch.device("cpu"), dtype=dtype)
