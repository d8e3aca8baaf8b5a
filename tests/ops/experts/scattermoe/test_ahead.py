"""The dry run compiles exactly the variants that a call launches, whatever its number of tokens."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from expertune.ops import counting_sort, triton_launch
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.scattermoe import ahead, combine, gate, linear, pack, sums, tiles
from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.torch_grouped import flatten_projection
from expertune.ops.plan import build_plan
from expertune.ops.triton_launch import Launcher
from tests.ops.experts.cases import Case, Problem, clamped_glu, make_problem, relu_squared, swiglu

BF16 = Case(
    hidden=64, intermediate=48, rank=16, dtype=torch.bfloat16, adapter_dtype=torch.float32, weights_dtype=torch.float32
)
CASES = {
    "swiglu": BF16,
    "function": replace(BF16, activation=clamped_glu),
    "not gated": replace(BF16, activation=relu_squared),
    "bias": replace(BF16, bias=True),
    "up only": replace(BF16, down_lora=False),
    "down only": replace(BF16, up_lora=False, activation=clamped_glu),
    "no adapter": replace(BF16, up_lora=False, down_lora=False),
    "transposed": replace(BF16, transposed=True),
    "adapters in bf16": replace(BF16, adapter_dtype=None, weights_dtype=None),
    "rank 5": replace(BF16, rank=5),
    "rank 64": replace(BF16, rank=64),
    "odd widths": replace(BF16, hidden=23, intermediate=13),
    "fp32": replace(BF16, dtype=torch.float32),
    "full fine-tuning": replace(BF16, base_grad=True, bias=True),
    "full, function, no adapter": replace(BF16, base_grad=True, up_lora=False, down_lora=False, activation=swiglu),
    "sentinels": replace(BF16, sentinels=True),
    "one of many experts": replace(BF16, experts=33, top_k=1),
}
FROZEN = ("x", "weights", "up_lora", "down_lora")
TILE = LinearTile(rows=32, columns=32, k_step=32, halves=True)
Keys = set[tuple[str, tuple[Any, ...]]]


@pytest.fixture
def keys_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Keys]:
    """What a function would launch on a Hopper GPU: kernels and keys. Nothing is computed: results are garbage."""
    seen: list[tuple[str, tuple[Any, ...]]] = []

    def record(launcher: Launcher, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3) -> None:
        for parameter, arg in zip(launcher.kernel.params, args, strict=True):
            is_number = not parameter.name.endswith(("_ptr", "_desc"))
            assert not (is_number and isinstance(arg, (Tensor, TensorDescriptor))), f"{launcher.kernel}: {parameter}"
        seen.append((launcher.kernel.__name__, launcher._key(args, 0, num_warps, num_stages)))

    for module in (combine, counting_sort, gate, linear, pack, sums, tiles):
        for name, value in vars(module).items():
            if isinstance(value, Launcher):
                kernel = value.kernel  # interpreted, where there is no GPU, and then without parameters
                compilable = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
                monkeypatch.setattr(module, name, Launcher(compilable))
    monkeypatch.setattr(Launcher, "__call__", record)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))

    def keys_of(function: Callable[[], object]) -> Keys:
        seen.clear()
        function()
        return set(seen)

    return keys_of


def tensors_of(problem: Problem) -> tuple[Tensor | None, ...]:
    projections = (*flatten_projection(problem.up), *flatten_projection(problem.down))
    return (problem.x_TH, problem.weights_TK, *projections)


def call_of(problem: Problem, tile: LinearTile = TILE) -> ahead.Call:
    return ahead.call_of(tensors_of(problem), known(problem), tile)


def dry_run(problem: Problem, *num_tokens: int) -> None:
    ahead.dry_run(call_of(problem), tensors_of(problem)[2:], *num_tokens)


def known(problem: Problem) -> Callable[[Tensor], Tensor]:
    return SWIGLU if problem.case.activation is swiglu and not problem.case.base_grad else problem.case.activation


def run(problem: Problem, tile: LinearTile = TILE) -> None:
    case = problem.case
    plan = build_plan(problem.expert_ids_TK, case.experts, sentinels=case.sentinels)
    y_TH = scattermoe_expert_mlp(
        problem.x_TH, problem.weights_TK, plan, problem.up, problem.down, known(problem), tile=tile
    )
    problem.collect(y_TH)


@pytest.mark.parametrize("name", CASES)
def test_what_a_call_launches_is_what_the_dry_run_compiled(name: str, keys_of: Callable[..., Keys]) -> None:
    case = CASES[name]
    dry = keys_of(lambda: dry_run(make_problem(case)))
    kernels = {kernel for kernel, _ in dry}
    assert kernels >= {"_row_tables_kernel", "_expert_linear_kernel", "_combine_kernel"}
    assert ("_expert_sum_kernel" in kernels) == (case.up_lora or case.down_lora)
    for tokens in (1, 37, 48, 2600):  # at 2600 an expert has several chunks
        problem = make_problem(replace(case, tokens=tokens))
        assert keys_of(lambda problem=problem: run(problem)) == dry, f"{tokens} tokens"


@pytest.mark.parametrize("tokens", [1, 63, 65, 1000])
def test_the_dry_runs_own_number_of_tokens_does_not_matter(tokens: int, keys_of: Callable[..., Keys]) -> None:
    problem = make_problem(CASES["bias"])
    assert keys_of(lambda: dry_run(problem, tokens)) == keys_of(lambda: dry_run(problem))


@pytest.mark.parametrize("name", ["swiglu", "function"])
@pytest.mark.parametrize("frozen", [*((name,) for name in FROZEN), FROZEN[:2], FROZEN[2:], FROZEN], ids=str)
def test_frozen_inputs(name: str, frozen: tuple[str, ...], keys_of: Callable[..., Keys]) -> None:
    problem = make_problem(CASES[name])
    for leaf in list(problem.leaves):
        if leaf.startswith(frozen):
            problem.leaves.pop(leaf).requires_grad_(False)
    for side in ("up", "down"):  # a view keeps the flag of its making
        projection = getattr(problem, side)
        if f"{side}_lora" in frozen:
            lora = replace(projection.lora, a_ERX=projection.lora.a_ERX.detach(), b_EYR=projection.lora.b_EYR.detach())
            setattr(problem, side, replace(projection, lora=lora))
    assert call_of(problem).backward == bool(problem.leaves)
    assert keys_of(lambda: dry_run(problem)) == keys_of(lambda: run(problem))


def test_without_autograd_only_the_forward(keys_of: Callable[..., Keys]) -> None:
    problem = make_problem(BF16)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not call_of(problem).backward
            dry = keys_of(lambda: dry_run(problem))
            assert dry == keys_of(lambda: run(problem))
    assert dry < keys_of(lambda: dry_run(problem))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x_TH: x_TH.t().contiguous().t(),
    "every other column": lambda x_TH: torch.stack([x_TH, x_TH], dim=-1).flatten(1)[:, ::2],
    "part of wider rows": lambda x_TH: torch.nn.functional.pad(x_TH, (8, 24))[:, 8:-24],
    "expanded": lambda x_TH: x_TH[:1].expand(x_TH.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_of_x(name: str, keys_of: Callable[..., Keys]) -> None:
    problem = make_problem(BF16)
    problem.x_TH = LAYOUTS[name](problem.x_TH)
    assert keys_of(lambda: dry_run(problem)) == keys_of(lambda: run(problem))


def test_the_sort_of_any_number_of_slots(keys_of: Callable[..., Keys]) -> None:
    def sort(tokens: int) -> Keys:
        return keys_of(lambda: counting_sort.sort_slots(torch.zeros(tokens, 3, dtype=torch.int64), 5))

    assert len(sort(64)) == 2
    assert all(sort(tokens) == sort(64) for tokens in (1, 2, 7, 16, 4099))


def test_one_dry_run_for_calls_that_differ_in_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ahead.Call] = []
    monkeypatch.setattr("torch.cuda.device", lambda _: nullcontext())
    monkeypatch.setattr(ahead, "dry_run", lambda call, _: calls.append(call))
    triton_launch._turn_of.cache_clear()

    def compile_ahead(tile: LinearTile = TILE, **changes: Any) -> int:
        problem = make_problem(replace(BF16, **changes))
        ahead.compile_ahead(tensors_of(problem), known(problem), tile)
        return len(calls)

    try:
        assert [compile_ahead(tokens=tokens) for tokens in (3, 3, 64, 65)] == [1, 1, 1, 1]
        others = [{"rank": 8}, {"bias": True}, {"transposed": True}, {"activation": clamped_glu}, {"top_k": 3}]
        assert [compile_ahead(**other) for other in others] == [2, 3, 4, 5, 6]
        assert compile_ahead(replace(TILE, num_stages=2)) == 7
        with torch.no_grad():
            assert compile_ahead() == 8
        assert compile_ahead(bias=True) == 8
    finally:
        triton_launch._turn_of.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "columns", "k_step"),  # tiles that nothing else runs with, so that their kernels are not compiled yet
    [("swiglu", 32, 32), ("function", 32, 64), ("bias", 64, 32), ("rank 64", 64, 64)],
)
def test_on_a_gpu_no_launch_compiles(name: str, columns: int, k_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by_a_dry_run: list[bool] = []
    tile = LinearTile(rows=64, columns=columns, k_step=k_step, num_warps=4, num_stages=2)
    build_plan(make_problem(CASES[name], "cuda").expert_ids_TK, BF16.experts)  # the sort, which comes before
    monkeypatch.setattr(
        knobs.runtime, "jit_cache_hook", lambda *, is_manual_warmup, **_: by_a_dry_run.append(is_manual_warmup)
    )
    run(make_problem(CASES[name], "cuda"), tile)
    assert by_a_dry_run
    assert all(by_a_dry_run)
    by_a_dry_run.clear()
    for tokens in (1, 48, 49, 3001):
        run(make_problem(replace(CASES[name], tokens=tokens), "cuda"), tile)
    assert not by_a_dry_run
