"""Both ways of applying the adapter against the fp32 oracle: interpreted, and on Hopper in its own kernel."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.scattermoe import products as products_module
from expertune.ops.experts.scattermoe.tiling import TILES, LinearTile
from expertune.ops.experts.sonicmoe import mlp as mlp_module
from expertune.ops.experts.sonicmoe.mlp import Adapter, sonicmoe_expert_mlp
from expertune.ops.plan import build_plan
from expertune.ops.triton_launch import is_hopper
from tests.comparing import assert_agrees
from tests.ops.experts.cases import CASES, Case, Problem, clamped_glu, make_problem, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_HOPPER = DEVICE == "cuda" and is_hopper(torch.device("cuda"))
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
SMALL = LinearTile(rows=16, columns=32, k_step=16, num_warps=4, num_stages=2)
BOTH: tuple[Adapter, ...] = ("low_rank", "materialize")
# The interpreter multiplies bf16 as if its bits were integers; 64 experts take it half a minute: scattermoe's has them.
LEFT_OUT = {name for name in CASES if "bf16" in name or name == "many experts"} if DEVICE == "cpu" else set()
# Interpreted, low_rank runs what scattermoe's tests run in every case.
LOW_RANK = ("plain", "full fine-tuning", "sentinels, bias, base grad") if DEVICE == "cpu" else tuple(CASES)
NAMED = [
    (name, adapter) for name in CASES for adapter in BOTH
    if name not in LEFT_OUT and (adapter == "materialize" or name in LOW_RANK)
]  # fmt: skip


def run(problem: Problem, adapter: Adapter, tile: LinearTile | None = SMALL) -> dict[str, Tensor]:
    case = problem.case
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    gate = SWIGLU if case.activation is swiglu else case.activation
    y_TH = sonicmoe_expert_mlp(
        problem.x_TH, problem.weights_TK, plan, problem.up, problem.down, gate, adapter=adapter, tile=tile
    )
    return problem.collect(y_TH)


def assert_right(name: str, problem: Problem, got: dict[str, Tensor]) -> None:
    dtype = problem.case.dtype
    truth, plain = problem.reference(torch.float32), problem.reference(dtype)
    assert got.keys() == truth.keys(), "a gradient is missing or was computed for nothing"
    for key, want in truth.items():
        assert got[key].dtype == (problem.x_TH if key == "y" else problem.leaves[key[1:]]).dtype
        assert_agrees(f"{name}: {key}", got[key], want, dtype=dtype, same_dtype=plain[key])


@pytest.mark.parametrize(("name", "adapter"), NAMED)
def test_output_and_gradients_agree_with_the_reference(name: str, adapter: Adapter) -> None:
    problem = make_problem(CASES[name], DEVICE)
    assert_right(name, problem, run(problem, adapter))


def test_without_adapters_there_is_no_difference() -> None:
    first, second = (run(make_problem(CASES["no adapter"], DEVICE), adapter) for adapter in BOTH)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The weights that were folded."""
    seen: list[torch.Size] = []
    fold = mlp_module.fold_projection
    monkeypatch.setattr(mlp_module, "fold_projection", lambda p: seen.append(p.weight_EYX.shape) or fold(p))
    return seen


def test_materialize_folds_once_a_forward_and_once_more_in_a_recomputation(folds: list[torch.Size]) -> None:
    problem = make_problem(Case(), DEVICE)
    want = run(problem, "materialize")
    assert len(folds) == 2  # up and down
    folds.clear()
    plan = build_plan(problem.expert_ids_TK, problem.case.experts)

    def forward(x_TH: Tensor, weights_TK: Tensor) -> Tensor:
        return sonicmoe_expert_mlp(
            x_TH, weights_TK, plan, problem.up, problem.down, SWIGLU, adapter="materialize", tile=SMALL
        )

    got = problem.collect(checkpoint(forward, problem.x_TH, problem.weights_TK, use_reentrant=False))
    assert len(folds) == 4
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_low_rank_forms_no_weight_and_no_dense_gradient(
    folds: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense: list[int] = []
    monkeypatch.setattr(products_module, "grouped_outer", lambda *_: dense.append(1))
    run(make_problem(Case(), DEVICE), "low_rank")
    assert folds == []
    assert dense == []


@pytest.mark.parametrize("adapter", BOTH)
@pytest.mark.parametrize("name", ["plain", "transposed, bias, interleaved"])
def test_it_is_traced_as_one_graph_to_the_same_bits(name: str, adapter: Adapter) -> None:
    torch.compiler.reset()
    problem = make_problem(replace(CASES[name], tokens=9), DEVICE)
    want = run(problem, adapter)
    gate = SWIGLU if problem.case.activation is swiglu else problem.case.activation

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        plan = build_plan(ids_TK, problem.case.experts)
        return sonicmoe_expert_mlp(x_TH, weights_TK, plan, problem.up, problem.down, gate, adapter=adapter, tile=SMALL)

    got = problem.collect(compiled(problem.x_TH, problem.expert_ids_TK, problem.weights_TK))
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def test_a_wrong_way_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter: got 'folded', need one of low_rank, materialize"):
        run(make_problem(Case(), DEVICE), "folded")  # type: ignore[arg-type]


def test_a_wrong_shape_is_refused_before_anything_is_folded(folds: list[torch.Size]) -> None:
    problem = make_problem(Case(), DEVICE)
    problem.x_TH = problem.x_TH[:, 1:]
    with pytest.raises(ValueError, match="x_TH: got shape"):
        run(problem, "materialize")
    assert folds == []


def test_the_table_has_hoppers_kernel_for_hopper() -> None:
    """What makes `low_rank` run in it without being told."""
    rows = [row for row in TILES if row.item_bytes == 2 and row.capability == (9, 0)]
    assert rows
    assert all(row.tile.hopper for row in rows)
    assert rows[-1].max_rows_per_expert is None


WIDE = Case(
    tokens=700, top_k=3, experts=6, hidden=512, intermediate=256, rank=16, dtype=torch.bfloat16,
    adapter_dtype=torch.float32, weights_dtype=torch.float32,
)  # fmt: skip
ON_GPU = {
    "concatenated": WIDE,
    "interleaved, transposed, bias, clamped": replace(WIDE, activation=clamped_glu, transposed=True, bias=True),
    "interleaved": replace(WIDE, activation=clamped_glu),
    "transposed": replace(WIDE, transposed=True),
    "bias": replace(WIDE, bias=True),
    "up only": replace(WIDE, down_lora=False),
    "down only": replace(WIDE, up_lora=False),
    "no adapter": replace(WIDE, up_lora=False, down_lora=False),
    "empty experts": replace(WIDE, experts=64, tokens=9),
    "all on the first expert": replace(WIDE, top_k=1, all_on_first=True),
    "sentinels": replace(WIDE, sentinels=True),
    "sentinels, bias": replace(WIDE, sentinels=True, bias=True),
    "rank 3": replace(WIDE, rank=3),
    "rank 64": replace(WIDE, rank=64),
    "one token": replace(WIDE, tokens=1),
}
LEFT_TO_LINEAR = {
    "rank 128": replace(WIDE, rank=128),
    "odd widths": replace(WIDE, hidden=260, intermediate=100),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that the big products went through."""
    seen: list[str] = []

    def spied(name: str) -> Callable[..., Tensor]:
        launch = getattr(products_module, name)
        return lambda *a, **k: seen.append(name) or launch(*a, **k)

    for name in ("launch_hopper_linear", "launch_expert_linear"):
        monkeypatch.setattr(products_module, name, spied(name))
    return seen


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="a GPU of compute capability 9 is needed")
class TestOnHopper:
    @pytest.mark.parametrize("adapter", BOTH)
    @pytest.mark.parametrize("dtype", _DTYPES)
    @pytest.mark.parametrize("name", ON_GPU)
    def test_agrees_with_the_reference(self, name: str, dtype: str, adapter: Adapter, launches: list[str]) -> None:
        problem = make_problem(replace(ON_GPU[name], dtype=_DTYPES[dtype]), "cuda")
        got = run(problem, adapter, tile=None)
        assert set(launches) == {"launch_hopper_linear"}
        assert_right(name, problem, got)

    @pytest.mark.parametrize("adapter", BOTH)
    @pytest.mark.parametrize("name", LEFT_TO_LINEAR)
    def test_what_the_kernel_does_not_take_is_right_too(self, name: str, adapter: Adapter, launches: list[str]) -> None:
        problem = make_problem(LEFT_TO_LINEAR[name], "cuda")
        got = run(problem, adapter, tile=None)
        if adapter == "low_rank" or name == "odd widths":
            assert "launch_expert_linear" in launches
        assert_right(name, problem, got)

    def test_low_rank_forms_no_dense_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dense: list[int] = []
        monkeypatch.setattr(products_module, "grouped_outer", lambda *_: dense.append(1))
        run(make_problem(WIDE, "cuda"), "low_rank", tile=None)
        assert dense == []
