"""SwiGLU with the adapters' work in its pass: against the formulas and the separate kernels, on a Hopper GPU."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.scattermoe import between
from expertune.ops.experts.scattermoe.gate_hopper import (
    AdapterSide,
    _add_dp,
    swiglu_backward_sums,
    swiglu_thin,
    takes,
)
from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
from expertune.ops.experts.scattermoe.tiles import build_row_tables
from expertune.ops.experts.scattermoe.tiling import ONE_PASS_RANK, LinearTile
from expertune.ops.experts.types import ExpertLora
from expertune.ops.plan import ExpertPlan, build_plan
from expertune.ops.triton_launch import is_hopper
from tests.comparing import assert_agrees, relative_error
from tests.ops.experts.cases import Case, make_problem

ON_HOPPER = torch.cuda.is_available() and is_hopper(torch.device("cuda"))


@dataclass(frozen=True)
class Rows:
    """Sizes and options of random rows between the projections."""

    tokens: int = 700
    experts: int = 5
    top_k: int = 2
    width: int = 128
    rank1: int = 16
    rank2: int = 16
    dtype: torch.dtype = torch.bfloat16
    chunk_rows: int = 1024
    sentinels: bool = False
    all_on_first: bool = False


CASES = {
    "plain": Rows(),
    "fp16": Rows(dtype=torch.float16),
    "rank 3": Rows(rank1=3, rank2=3),
    "rank 64": Rows(rank1=64, rank2=64),
    "two ranks": Rows(rank1=32, rank2=16),
    "columns beyond a block": Rows(width=80),
    "fewer columns than a block": Rows(width=16),
    "several chunks": Rows(chunk_rows=64),
    "several chunks, rank 64": Rows(chunk_rows=64, rank1=64, rank2=40, width=208),
    "sentinels": Rows(sentinels=True),
    "one token": Rows(tokens=1),
    "all on one expert": Rows(top_k=1, all_on_first=True),
    "more rows than a chunk": Rows(tokens=5000, experts=3),
}


@dataclass(frozen=True)
class Drawn:
    """What the kernels take, and the formulas in fp32."""

    case: Rows
    plan: ExpertPlan
    h_SJ: Tensor
    da_SI: Tensor
    p_S: Tensor
    u1: AdapterSide
    v2: AdapterSide

    @property
    def live(self) -> int:
        return int(self.plan.row_fence_F[-1])

    def forward(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        gate, up = self.h_SJ[: self.live].to(dtype).chunk(2, dim=1)
        a_SI = torch.nn.functional.silu(gate) * up
        lora_a_ERI = self.v2.lora.a_ERX.to(dtype)
        u2 = [a_SI[rows] @ lora_a_ERI[expert].T for expert, rows in enumerate(self.blocks())]
        return {"a": a_SI, "u2": torch.cat(u2)}

    def backward(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        live, p_S1 = self.live, self.p_S[: self.live, None].to(dtype)
        h_SJ = self.h_SJ[:live].to(dtype).requires_grad_()
        gate, up = h_SJ.chunk(2, dim=1)
        a_SI, da_SI = torch.nn.functional.silu(gate) * up, self.da_SI[:live].to(dtype)
        (dh_SJ,) = torch.autograd.grad(a_SI, h_SJ, da_SI * p_S1)
        u1_SR, v2_SR = (side.thin_SR[:live, : side.lora.rank].to(dtype) for side in (self.u1, self.v2))
        pa_SI = (p_S1 * a_SI).detach()
        return {
            "dh": dh_SJ,
            "dp": (da_SI * a_SI).sum(1).detach(),
            "dA2": self.v2.lora.scaling * torch.stack([v2_SR[rows].T @ pa_SI[rows] for rows in self.blocks()]),
            "dB1": self.u1.lora.scaling * torch.stack([u1_SR[rows].T @ dh_SJ[rows] for rows in self.blocks()]),
        }

    def blocks(self) -> list[slice]:
        fence = self.plan.row_fence_F.tolist()
        return [slice(fence[expert], fence[expert + 1]) for expert in range(self.case.experts)]


def draw(case: Rows) -> Drawn:
    """Random values; the last expert gets no row, and what lies beyond the ranks is zero, as thin products leave it."""
    scores_TE = torch.rand(case.tokens, case.experts, device="cuda")
    scores_TE[:, -1] = -1
    scores_TE[:, 0] += 2 * case.all_on_first
    ids_TK = scores_TE.topk(case.top_k, dim=-1).indices
    if case.sentinels:
        ids_TK[::3] = -1
    plan = build_plan(ids_TK, case.experts, sentinels=case.sentinels)
    num_rows, width = plan.num_rows, case.width

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    def side(rank: int, num_in: int, num_out: int) -> AdapterSide:
        padded = max(16, 1 << (rank - 1).bit_length())
        thin_SR = torch.zeros(num_rows, padded, device="cuda", dtype=case.dtype)
        thin_SR[:, :rank] = normal(num_rows, rank)
        a, b = (normal(case.experts, *shape, dtype=torch.float32) for shape in ((rank, num_in), (num_out, rank)))
        return AdapterSide(thin_SR, ExpertLora(a, b, scaling=0.7))

    u1, v2 = side(case.rank1, 24, 2 * width), side(case.rank2, width, 24)
    p_S = torch.rand(num_rows, device="cuda").to(case.dtype)
    return Drawn(case, plan, normal(num_rows, 2 * width), normal(num_rows, width), p_S, u1, v2)


def run_backward(drawn: Drawn, *, reuse: bool = False) -> dict[str, Tensor]:
    case, plan = drawn.case, drawn.plan
    chunks = build_row_tables(plan, 128, case.chunk_rows).chunks
    h_SJ = drawn.h_SJ.clone()
    dh_SJ, dweights_TK, da2_ERI, db1_ERJ = swiglu_backward_sums(
        h_SJ, drawn.da_SI, drawn.p_S, drawn.v2, drawn.u1, plan, chunks, weights_dtype=torch.float32, reuse=reuse
    )
    assert (dh_SJ.data_ptr() == h_SJ.data_ptr()) is reuse
    dp_S = dweights_TK.reshape(-1)[plan.slot_of_row_S]
    assert not dp_S[drawn.live :].any(), "sentinels"
    return {"dh": dh_SJ[: drawn.live], "dp": dp_S[: drawn.live], "dA2": da2_ERI, "dB1": db1_ERJ}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="a GPU of compute capability 9 is needed")
@pytest.mark.usefixtures("nan_filled_memory")
class TestOnHopper:
    @pytest.mark.parametrize("name", CASES)
    @torch.no_grad()
    def test_forward(self, name: str) -> None:
        drawn = draw(CASES[name])
        lora_a_ERI = drawn.v2.lora.a_ERX.to(drawn.case.dtype)
        padded = drawn.v2.thin_SR.shape[1]
        packed_ERI = torch.zeros(drawn.case.experts, padded, drawn.case.width, device="cuda", dtype=drawn.case.dtype)
        packed_ERI[:, : drawn.v2.lora.rank] = lora_a_ERI
        a_SI, u2_SR = swiglu_thin(drawn.h_SJ, packed_ERI, build_row_tables(drawn.plan, 128).tiles)
        want, plain = drawn.forward(), drawn.forward(drawn.case.dtype)
        got = {"a": a_SI[: drawn.live], "u2": u2_SR[: drawn.live, : drawn.v2.lora.rank]}
        assert not u2_SR[: drawn.live, drawn.v2.lora.rank :].any()
        for key, value in got.items():
            assert_agrees(f"{name}: {key}", value, want[key], dtype=drawn.case.dtype, same_dtype=plain[key])

    @pytest.mark.parametrize("reuse", [False, True], ids=["dh apart", "dh over h"])
    @pytest.mark.parametrize("name", CASES)
    def test_backward(self, name: str, reuse: bool) -> None:
        drawn = draw(CASES[name])
        want, plain = drawn.backward(), drawn.backward(drawn.case.dtype)
        got = run_backward(drawn, reuse=reuse)
        for key, value in got.items():
            assert_agrees(f"{name}: {key}", value, want[key], dtype=drawn.case.dtype, same_dtype=plain[key])
        for key in ("dA2", "dB1"):
            assert not got[key][-1].any(), "an expert without rows"

    def test_the_same_bits_every_time(self) -> None:
        drawn = draw(CASES["several chunks, rank 64"])
        first = run_backward(drawn)
        for _ in range(3):
            assert all(torch.equal(value, first[key]) for key, value in run_backward(drawn).items())

    @pytest.mark.parametrize("rank", [16, ONE_PASS_RANK])
    def test_a_whole_mlp_takes_it_and_agrees_with_the_separate_kernels(self, rank: int) -> None:
        case = Case(dtype=torch.bfloat16, adapter_dtype=torch.float32, tokens=900, hidden=512, intermediate=256)
        problem = make_problem(replace(case, rank=rank), "cuda")
        plan = build_plan(problem.expert_ids_TK, case.experts)
        results = {}
        for hopper in (True, False):
            tile = LinearTile(halves=True, hopper=hopper)
            with (
                patch.object(between, "swiglu_thin", wraps=swiglu_thin) as forward,
                patch.object(between, "swiglu_backward_sums", wraps=swiglu_backward_sums) as backward,
            ):
                y_TH = scattermoe_expert_mlp(
                    problem.x_TH, problem.weights_TK, plan, problem.up, problem.down, SWIGLU, tile=tile
                )
                results[hopper] = problem.collect(y_TH)
            assert forward.called is backward.called is hopper
        reference = problem.reference(torch.float32)
        for key, value in reference.items():
            ours, apart = (relative_error(results[hopper][key], value) for hopper in (True, False))
            assert ours < 1.1 * apart + 1e-4, key

    def test_frozen_matrices_and_full_fine_tuning_go_the_other_way(self) -> None:
        case = Case(
            dtype=torch.bfloat16, adapter_dtype=torch.float32, tokens=300, hidden=512, intermediate=256, rank=16
        )
        tile = LinearTile(halves=True, hopper=True)
        for base_grad, frozen in ((True, ""), (False, "up_lora_b"), (False, "down_lora_a")):
            problem = make_problem(replace(case, base_grad=base_grad), "cuda")
            if frozen:
                problem.leaves.pop(frozen).requires_grad_(False)
            plan = build_plan(problem.expert_ids_TK, case.experts)
            y_TH = scattermoe_expert_mlp(
                problem.x_TH, problem.weights_TK, plan, problem.up, problem.down, SWIGLU, tile=tile
            )
            got, want, plain = problem.collect(y_TH), problem.reference(torch.float32), problem.reference(case.dtype)
            assert got.keys() == want.keys()
            for key, value in want.items():
                assert_agrees(key, got[key], value, dtype=case.dtype, same_dtype=plain[key])


def test_never_on_another_device() -> None:
    assert not takes(torch.empty(8, 256, dtype=torch.bfloat16), 16, 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter; the GPU's tests run it as a part")
def test_parts_of_dp_are_added_in_order() -> None:
    plan = build_plan(torch.tensor([[0, 1], [-1, 1], [1, 0]]), 2, sentinels=True)
    dp_NS = torch.randn(3, 6)
    dweights_TK = torch.zeros(3, 2)
    _add_dp((1,), dp_NS, plan.slot_of_row_S, dweights_TK, plan.row_fence_F, 2, 6, 3, 8)
    want_TK = torch.zeros(6)
    want_TK[plan.slot_of_row_S[:5]] = dp_NS.sum(0)[:5]
    torch.testing.assert_close(dweights_TK, want_TK.view(3, 2))
    assert dweights_TK[1, 0] == 0


def test_compiles_for_hopper_without_spills() -> None:
    script = Path(__file__).parents[4] / "benchmarks" / "registers.py"
    command = [sys.executable, "-W", "ignore", str(script), "--gate", "--ranks", "16", "32", str(ONE_PASS_RANK)]
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 0, done.stderr
    variants = [re.findall(r"(\d+) (?:registers|B)", line) for line in done.stdout.splitlines() if "registers" in line]
    assert len(variants) == 6
    for registers, spilled, shared in variants:
        assert int(registers) < 256
        assert int(spilled) == 0
        assert int(shared) < 48 * 1024  # several programs on a multiprocessor
