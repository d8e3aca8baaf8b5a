"""The package sonic-moe is called as Transformers calls it, and skipped by name where it cannot run."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.bench import sonic_rival
from expertune.bench.problem import Problem
from expertune.bench.rivals import Unavailable
from expertune.bench.sonic_rival import sonic_moe_folded
from expertune.bench.truth import reference_step, relative_errors
from tests.comparing import FLOOR

ENUMS = "from enum import Enum\n\n\nclass ActivationType(Enum):\n    SWIGLU = 'swiglu'\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name and interface, on a machine that is believed to have a Hopper GPU; returns its folder."""
    folder = tmp_path / "sonicmoe"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "enums.py").write_text(ENUMS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Problem, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in [name for name in sys.modules if name.split(".")[0] == "sonicmoe"]:
        monkeypatch.delitem(sys.modules, name)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "sonicmoe"]:
        del sys.modules[name]


def in_plain_torch(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    E: int,
    stream_id: int | None,
    activation_type: object,
    concat_layout: bool,
) -> tuple[Tensor, Tensor]:
    """The function's contract: w1 [2I, H, E] with gate rows first, w2 [H, I, E], token indices sorted, int32."""
    assert (b1, b2, E, concat_layout) == (None, None, w1.shape[2], True)
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert bool((token_indices.diff() >= 0).all())
    assert w1.permute(2, 0, 1).is_contiguous()
    assert w2.permute(2, 0, 1).is_contiguous()
    y = torch.zeros_like(x)
    for row, (token, expert) in enumerate(zip(token_indices.tolist(), expert_indices.tolist(), strict=True)):
        gate, up = (x[token] @ w1[:, :, expert].T).chunk(2)
        out = (F.silu(gate) * up) @ w2[:, :, expert].T
        y = y.index_add(0, token_indices[row : row + 1].long(), (router_scores[row] * out).unsqueeze(0))
    return y, expert_indices.bincount(minlength=E)


@pytest.mark.usefixtures("package")
def test_its_step_is_the_truth_by_the_contract_of_its_function(problem: Problem) -> None:
    library = sonic_rival._library(problem)
    library.moe_general_routing_inputs = in_plain_torch  # type: ignore[attr-defined]
    errors = relative_errors(sonic_moe_folded(problem)(), reference_step(problem))
    assert max(errors) < FLOOR[torch.float32]


def test_what_cannot_be_imported_is_named(package: Path, problem: Problem) -> None:
    (package / "__init__.py").write_text("import quack_that_is_not_there\n")
    with pytest.raises(Unavailable, match="sonicmoe cannot be imported: No module named 'quack_that_is_not_there'"):
        sonic_moe_folded(problem)


@pytest.mark.usefixtures("package")
def test_on_an_older_gpu_it_is_skipped_by_name(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(Unavailable, match=r"its kernels need a GPU of compute capability 9\.0 or newer"):
        sonic_moe_folded(problem)


@pytest.mark.usefixtures("package")
def test_on_the_cpu_it_is_skipped_by_name(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "on_gpu", False)
    with pytest.raises(Unavailable, match="its kernels need a GPU"):
        sonic_moe_folded(problem)


def test_where_it_is_not_installed_it_is_skipped_by_name(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(Unavailable, match="the package sonic-moe is not installed"):
        sonic_moe_folded(problem)
