"""Axolotl's subpackage is found and imported without running the packages above it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertune.bench import axolotl_rival
from expertune.bench.axolotl_rival import axolotl, axolotl_fused
from expertune.bench.problem import Problem
from expertune.bench.rivals import Unavailable

RUNS_ON_IMPORT = "raise ImportError('this needs the whole trainer')\n"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package like Axolotl, whose upper packages cannot be imported; returns the folder of the kernels."""
    for name in [name for name in sys.modules if name.split(".")[0] == "axolotl"]:
        monkeypatch.delitem(sys.modules, name)
    kernels = tmp_path / "axolotl" / "integrations" / "kernels" / "libs" / "scattermoe_lora"
    kernels.mkdir(parents=True)
    for folder in list(kernels.parents)[:4]:
        (folder / "__init__.py").write_text(RUNS_ON_IMPORT)
    (kernels / "__init__.py").write_text("from .layers import WHAT\n")
    absolute = "from axolotl.integrations.kernels.libs.scattermoe_lora.deeper import WHAT\n"
    (kernels / "layers.py").write_text(absolute)
    (kernels / "deeper.py").write_text("WHAT = 'the kernels'\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield kernels
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "axolotl":
            del sys.modules[name]


def on_a_gpu(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """The problem, believed to be on a GPU."""
    monkeypatch.setattr(type(problem), "on_gpu", True)
    return problem


def test_the_kernels_are_imported_alone(installed: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    library = axolotl_rival._library(on_a_gpu(problem, monkeypatch))
    assert library.WHAT == "the kernels"
    assert axolotl_rival._library(problem, "layers").__name__.endswith("scattermoe_lora.layers")


def test_what_cannot_be_imported_is_named(installed: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    (installed / "layers.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(Unavailable, match=r"scattermoe_lora.layers cannot be imported: No module named 'a_package"):
        axolotl_rival._library(on_a_gpu(problem, monkeypatch), "layers")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("build", [axolotl, axolotl_fused])
def test_on_the_cpu_it_is_skipped_by_name(build: object, problem: Problem) -> None:
    with pytest.raises(Unavailable, match="its Triton kernels need a GPU"):
        build(problem)  # type: ignore[operator]


def test_where_it_is_not_installed_it_is_skipped_by_name(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(Unavailable, match="the package axolotl is not installed"):
        axolotl(problem)
