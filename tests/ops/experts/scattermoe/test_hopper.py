"""The kernel written for Hopper: the same bits as the other one, on a GPU; here, that it compiles without spills."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from expertune.ops.experts.scattermoe import hopper
from expertune.ops.experts.scattermoe import products as products_module
from expertune.ops.experts.scattermoe.hopper import takes
from expertune.ops.experts.scattermoe.pack import PackedLora
from expertune.ops.experts.scattermoe.products import Products, packed
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.types import ExpertProjection
from expertune.ops.plan import build_plan
from expertune.ops.triton_launch import is_hopper
from tests.comparing import assert_agrees
from tests.ops.experts.cases import Case, Problem, make_problem
from tests.ops.experts.scattermoe.plain import plain_linear

GPU = torch.cuda.is_available()
ON_HOPPER = GPU and is_hopper(torch.device("cuda"))
WITH, WITHOUT = LinearTile(halves=True, hopper=True), LinearTile(halves=True)
BF16 = Case(dtype=torch.bfloat16, adapter_dtype=torch.float32, tokens=700, hidden=512, intermediate=128, rank=16)
CASES = {
    "tiles of any fullness": BF16,
    "fp16": replace(BF16, dtype=torch.float16),
    "no adapter": replace(BF16, up_lora=False),
    "rank 3": replace(BF16, rank=3),
    "rank 32": replace(BF16, rank=32),
    "rank 64": replace(BF16, rank=64),
    "bias": replace(BF16, bias=True),
    "transposed": replace(BF16, transposed=True, rank=8),
    "transposed, bias": replace(BF16, transposed=True, bias=True),
    "the fewest steps": replace(BF16, hidden=256),
    "one step more": replace(BF16, hidden=320),
    "fewer columns than a tile": replace(BF16, intermediate=20),
    "columns beyond a tile": replace(BF16, intermediate=132),
    "one token": replace(BF16, tokens=1),
    "all on the first expert": replace(BF16, top_k=1, all_on_first=True),
    "every expert": replace(BF16, top_k=5),
    "many experts of few rows": replace(BF16, experts=200, tokens=300, top_k=4),
    "more tiles than multiprocessors": replace(BF16, tokens=9000, intermediate=512, top_k=4),
    "sentinels": replace(BF16, sentinels=True),
}


def results_of(problem: Problem, tile: LinearTile, *, grouped: bool) -> tuple[Tensor, Tensor]:
    """The projection, and its input gradient for random rows of the result's shape."""
    case = problem.case
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    products, lora = Products.of(plan, tile), packed(problem.up)
    x_NX = problem.x_TH.detach()
    x = products.rows_of(x_NX[plan.token_of_row_S] if grouped else x_NX, grouped=grouped)
    out_SY = products.forward(x, problem.up, lora, products.thin(x, lora.a_ERX) if lora else None)
    generator = torch.Generator("cuda").manual_seed(3)
    num_rows = plan.num_rows if grouped else plan.num_tokens
    dout_NY = torch.randn(num_rows, out_SY.shape[1], generator=generator, device="cuda").to(out_SY.dtype)
    dout = products.rows_of(dout_NY, grouped=grouped)
    v_SR = products.thin(dout, lora.b_EYR.transpose(1, 2)) if lora else None
    dx_SX = products.input_grad(dout, problem.up, lora, v_SR)
    of_experts = int(plan.row_fence_F[-1])  # sentinel rows are not written
    return out_SY[:of_experts], dx_SX[:of_experts]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launchers that products went through."""
    seen: list[str] = []

    def spied(name: str) -> Callable[..., Tensor]:
        launch = getattr(products_module, name)

        def spy(*args: object, **options: object) -> Tensor:
            seen.append(name)
            return launch(*args, **options)

        return spy

    for name in ("launch_hopper_linear", "launch_expert_linear"):
        monkeypatch.setattr(products_module, name, spied(name))
    return seen


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="a GPU of compute capability 9 is needed")
@pytest.mark.usefixtures("nan_filled_memory")
class TestOnHopper:
    @pytest.mark.parametrize("grouped", [False, True], ids=["gathered", "grouped"])
    @pytest.mark.parametrize("name", CASES)
    @torch.no_grad()
    def test_has_the_bits_of_the_other_kernel(self, name: str, grouped: bool, launches: list[str]) -> None:
        problem = make_problem(CASES[name], "cuda")
        got = results_of(problem, WITH, grouped=grouped)
        assert "launch_hopper_linear" in launches
        launches.clear()
        want = results_of(problem, WITHOUT, grouped=grouped)
        assert set(launches) == {"launch_expert_linear"}
        for ours, other in zip(got, want, strict=True):
            assert not ours.isnan().any()
            assert torch.equal(ours, other)

    @pytest.mark.parametrize("name", ["tiles of any fullness", "fp16", "bias", "transposed", "rank 64", "rank 3"])
    @torch.no_grad()
    def test_agrees_with_the_formula(self, name: str) -> None:
        case = CASES[name]
        problem = make_problem(case, "cuda")
        got, _ = results_of(problem, WITH, grouped=False)
        plan = build_plan(problem.expert_ids_TK, case.experts)
        want, plain = (
            plain_linear(problem.x_TH, problem.up, plan, grouped=False, output="grouped", dtype=dtype)
            for dtype in (torch.float32, case.dtype)
        )
        assert_agrees(name, got, want, dtype=case.dtype, same_dtype=plain)

    @torch.no_grad()
    def test_the_counter_is_zero_after_each_launch(self) -> None:
        problem = make_problem(CASES["more tiles than multiprocessors"], "cuda")
        plan = build_plan(problem.expert_ids_TK, problem.case.experts)
        products, lora = Products.of(plan, WITH), packed(problem.up)
        x = products.rows_of(problem.x_TH.detach(), grouped=False)
        assert lora is not None
        u_SR = products.thin(x, lora.a_ERX)
        first = products.forward(x, problem.up, lora, u_SR)
        for _ in range(5):
            assert torch.equal(products.forward(x, problem.up, lora, u_SR), first)
            assert int(products.tables.tiles.entries_4M[3, 1]) == 0

    @torch.no_grad()
    def test_is_captured_in_a_graph_and_replayed_with_another_routing(self) -> None:
        problem = make_problem(BF16, "cuda")
        products = Products.of(build_plan(problem.expert_ids_TK, problem.case.experts), WITH)
        x = products.rows_of(problem.x_TH.detach(), grouped=False)
        weight_only = ExpertProjection(problem.up.weight_EYX.detach())
        products.forward(x, weight_only, None, None)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = Products.of(build_plan(problem.expert_ids_TK, problem.case.experts), WITH)
            out_SY = replayed.forward(x, weight_only, None, None)
        problem.expert_ids_TK.copy_((problem.expert_ids_TK + 1) % problem.case.experts)
        graph.replay()
        now = Products.of(build_plan(problem.expert_ids_TK, problem.case.experts), WITHOUT)
        assert torch.equal(out_SY, now.forward(x, weight_only, None, None))

    def test_leaves_what_it_does_not_know_to_the_other_kernel(self) -> None:
        x_NX = torch.empty(100, 512, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(4, 256, 512, dtype=torch.bfloat16, device="cuda")

        def known(x_NX: Tensor = x_NX, weight: Tensor = weight, rank: int = 16) -> bool:
            lora = PackedLora(weight.new_empty(4, rank, 512), weight.new_empty(4, 256, rank), 1.0, rank)
            return takes(x_NX, None, weight, x_NX.new_empty(100, rank), lora.b_EYR)

        assert known()
        assert known(weight=torch.empty_like(weight).transpose(1, 2).contiguous().transpose(1, 2))
        assert not known(x_NX=x_NX.float(), weight=weight.float())
        assert not known(rank=128)
        assert not known(weight=weight[:, :, :500])  # no multiple of a step
        assert not known(weight=weight[:, :, :192])  # too few steps
        assert not known(weight=weight[:, :252])  # gaps between experts, and columns of no 16 bytes
        assert not known(weight=weight[:, :128])  # gaps between experts
        assert not known(x_NX=torch.empty(100, 516, dtype=torch.bfloat16, device="cuda")[:, 1:513])  # not aligned


def test_never_on_another_device() -> None:
    x_NX, weight = torch.empty(8, 256, dtype=torch.bfloat16), torch.empty(2, 256, 256, dtype=torch.bfloat16)
    assert not takes(x_NX, None, weight, None, None)


def test_a_tile_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hopper: its tile is \(128, 256, 64\), got \(64, 256, 64\)"):
        LinearTile(rows=64, hopper=True)


def test_compiles_for_hopper_without_spills() -> None:
    script = Path(__file__).parents[4] / "benchmarks" / "registers.py"
    command = [sys.executable, "-W", "ignore", str(script), "--hopper", "--ranks", "64", "--bias"]  # the most registers
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 0, done.stderr
    variants = [re.findall(r"(\d+) (?:registers|B)", line) for line in done.stdout.splitlines() if "registers" in line]
    assert len(variants) == 4
    operands = hopper.STAGES.value * (hopper.ROWS.value + hopper.COLUMNS.value) * hopper.STEP.value * 2
    for registers, spilled, shared in variants:
        assert 128 < int(registers) < 256  # the accumulator alone has 128
        assert int(spilled) <= (12 if triton.__version__.startswith("3.6.") else 0)  # bytes, with a bias
        assert operands < int(shared) <= 227 * 1024  # of a multiprocessor
