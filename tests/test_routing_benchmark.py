"""The benchmark of routing runs in the interpreter, and a wrong kernel ends it."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.bench.timing import ClockTimer
from expertune.ops import plan
from expertune.ops.plan import ExpertPlan

FILE = Path(__file__).parents[1] / "benchmarks" / "routing.py"
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off beside a GPU")


def by_counting(ids_TK: Tensor, num_experts: int, *, table_rows: tuple[int, int] | None = None) -> ExpertPlan:
    return plan._by_counting(ids_TK, num_experts, sentinels=False, table_rows=table_rows)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With plans by the kernels, which a GPU's ids would get."""
    spec = importlib.util.spec_from_file_location("routing_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name, value in {"ROUNDS": 2, "VARIANT_ROUNDS": 2, "CALLS": 1, "WARM_UPS": 1}.items():
        monkeypatch.setattr(module, name, value)
    build_plan = plan.build_plan
    monkeypatch.setattr(
        module, "build_plan", lambda ids, experts, **k: (by_counting if k else build_plan)(ids, experts, **k)
    )
    return module


def test_it_runs(benchmark: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    benchmark.SELECT_SETS[1:] = [{"NUM_WARPS": 2, "THREAD_EXPERTS": 16, "MIN_LANES": 2}]
    benchmark.PLAN_SETS[1:] = [{"TILE": 64}]
    another = tmp_path / "another.py"
    another.write_text("from expertune.ops.plan import build_plan\n")
    rows = benchmark.run([16], [16], CPU, ClockTimer(), another, True)
    assert {(row["what"], row["way"]) for row in rows} >= {
        ("softmax", "fused"), ("sigmoid", "transformers"), ("plan", "two launches"), ("plan", "another"),
        ("constants of plan", "as it is"), ("constants of plan", "TILE=64"),
    }  # fmt: skip
    assert len({tuple(row) for row in rows}) == 1  # one header for all
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[-2:]] == ["smallest gain, queued", "smallest gain, idle"]
    assert sum("another" in line for line in said) == 1


def rolled(select: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = select(*args)
        return weights_TK.roll(1, 1), ids_TK

    return wrong


def without_gradient(launch: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: torch.zeros_like(launch(*args))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("_launch_select", rolled, "softmax: weights"),
        ("_launch_select_backward", without_gradient, "softmax: gradient"),
    ],
)
def test_a_wrong_router_ends_it(
    name: str, change: Callable[..., Any], words: str, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.fused, name, change(getattr(benchmark.fused, name)))
    with pytest.raises(SystemExit, match=words):
        benchmark.check(benchmark.Problem.of(16, 16, CPU), {})


def test_a_wrong_plan_ends_it(benchmark: ModuleType) -> None:
    def wrong_rows(ids_TK: Tensor, num_experts: int) -> ExpertPlan:
        right = by_counting(ids_TK, num_experts)
        right.slot_of_row_S[[0, 1]] = right.slot_of_row_S[[1, 0]]
        return right

    def wrong_table(ids_TK: Tensor, num_experts: int) -> ExpertPlan:
        right = by_counting(ids_TK, num_experts, table_rows=(benchmark.TILE_ROWS, benchmark.CHUNK_ROWS))
        assert right.tables is not None
        right.tables.tiles.entries_4M[2, 0] += 1
        return right

    problem = benchmark.Problem.of(16, 16, CPU)
    with pytest.raises(SystemExit, match="rows: slot_of_row_S is not"):
        benchmark.check_planner("rows", wrong_rows, problem)
    with pytest.raises(SystemExit, match="table: a table of 128 rows is wrong"):
        benchmark.check_planner("table", wrong_table, problem)
