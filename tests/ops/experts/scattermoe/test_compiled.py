"""torch.compile with fullgraph=True: the same bits as eager, for any number of tokens; the ops by torch's opcheck."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.ops import counting_sort
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.scattermoe import compiled
from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.torch_grouped import flatten_projection
from expertune.ops.plan import build_plan
from tests.comparing import assert_agrees
from tests.ops.experts.cases import Case, Problem, clamped_glu, make_problem, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
SMALL = LinearTile(rows=16, columns=32, k_step=16, num_warps=4, num_stages=2)
TINY = Case(tokens=9, experts=3, hidden=16, intermediate=16)
CASES = {
    "adapters, a known gate": TINY,
    "everything trained, any function": replace(
        TINY, base_grad=True, bias=True, transposed=True, activation=clamped_glu, sentinels=True
    ),
    "one adapter, any function": replace(TINY, down_lora=False, activation=clamped_glu),
}


def routed_mlp(problem: Problem, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, tile: LinearTile | None) -> Tensor:
    case = problem.case
    plan = build_plan(ids_TK, case.experts, sentinels=case.sentinels)
    activation = SWIGLU if case.activation is swiglu else case.activation
    return scattermoe_expert_mlp(x_TH, weights_TK, plan, problem.up, problem.down, activation, tile=tile)


def call(function: object, problem: Problem, tile: LinearTile | None = SMALL) -> dict[str, Tensor]:
    y_TH = function(problem, problem.x_TH, problem.expert_ids_TK, problem.weights_TK, tile)  # type: ignore[operator]
    return problem.collect(y_TH)


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys(), "a gradient is missing or was computed for nothing"
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_any_number_of_tokens(name: str) -> None:
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    function = torch.compile(routed_mlp, fullgraph=True, dynamic=True, backend=backend)
    num_frames = []
    for tokens in (9, 14):
        problem = make_problem(replace(CASES[name], tokens=tokens), DEVICE)
        assert_same_bits(call(function, problem), call(routed_mlp, problem))
        num_frames.append(backend.frame_count)
    assert num_frames[0] > 0
    assert num_frames[0] == num_frames[1], "the number of tokens was compiled in"


def test_no_token_and_shapes_compiled_in() -> None:
    torch.compiler.reset()
    function = torch.compile(routed_mlp, fullgraph=True, dynamic=False, backend="aot_eager")
    for tokens in (0, 5):
        problem = make_problem(replace(TINY, tokens=tokens), DEVICE)
        assert_same_bits(call(function, problem), call(routed_mlp, problem))


def test_only_what_requires_a_gradient_gets_one() -> None:
    torch.compiler.reset()
    problem = make_problem(TINY, DEVICE)
    want = call(routed_mlp, problem)
    for name in ("x", "weights", "up_lora_a"):
        problem.leaves.pop(name).requires_grad_(False).grad = None
    got = call(torch.compile(routed_mlp, fullgraph=True, backend="aot_eager"), problem)
    assert_same_bits(got, {key: value for key, value in want.items() if key not in ("dx", "dweights", "dup_lora_a")})
    assert problem.x_TH.grad is None


def test_autocast_changes_nothing() -> None:
    torch.compiler.reset()
    eye_II = torch.eye(16, device=DEVICE)

    def with_a_product(h_SJ: Tensor) -> Tensor:
        return swiglu(h_SJ) @ eye_II

    for activation in (clamped_glu, with_a_product):
        problem = make_problem(TINY, DEVICE)
        problem.case = replace(TINY, activation=activation)
        want = call(routed_mlp, problem)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = call(torch.compile(routed_mlp, fullgraph=True, backend="aot_eager"), problem)
        if activation is with_a_product:  # its backward is traced under the autocast around the graph: torch's own way
            assert torch.equal(got["y"], want["y"])
        else:
            assert_same_bits(got, want)


def test_the_sort_is_one_op() -> None:
    torch.compiler.reset()
    ids_TK = torch.randint(-1, 6, (11, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = torch.compile(counting_sort.sort_slots, fullgraph=True, backend="aot_eager")(ids_TK, 5)
    assert all(torch.equal(*pair) for pair in zip(got, counting_sort.sort_slots(ids_TK, 5), strict=True))


def test_eager_code_dispatches_none_of_our_ops() -> None:
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.add(func.namespace)
            return func(*args, **(kwargs or {}))

    with Watch():
        call(routed_mlp, make_problem(TINY, DEVICE))
    assert "aten" in seen
    assert "expertune" not in seen


OPS = ("sort_slots", "expert_up", "expert_up_backward", "expert_down", "expert_down_backward")


@pytest.mark.parametrize("bare", [False, True], ids=["everything", "bare"])
@pytest.mark.parametrize("name", OPS)
def test_an_op_is_what_torch_asks_of_ops(name: str, bare: bool) -> None:
    """Schema, fakes with static and dynamic shapes, autograd, no result that shares memory with an input."""
    case = replace(TINY, tokens=5, base_grad=not bare, bias=not bare, up_lora=not bare, down_lora=not bare)
    problem = make_problem(case, DEVICE)
    plan = build_plan(problem.expert_ids_TK, 3)
    up, down = ([*flatten_projection(projection), 0.7] for projection in (problem.up, problem.down))
    routing = [[plan.slot_of_row_S, plan.row_of_slot_S, plan.token_of_row_S, plan.row_fence_F], 2, False]
    tile, gate = [getattr(SMALL, field) for field in compiled.TILE_FIELDS], "" if bare else "swiglu"
    with torch.no_grad():
        h_SJ, u1_SR = compiled.expert_up(problem.x_TH, *up, *routing, tile)
        h_SJ = (h_SJ[:, :16].contiguous() if bare else h_SJ).requires_grad_()
        _, u2_SR = compiled.expert_down(h_SJ, problem.weights_TK, *down, *routing, gate, tile)
    op, args = {
        "sort_slots": (counting_sort._sort_op, (problem.expert_ids_TK, 3)),
        "expert_up": (compiled.expert_up, (problem.x_TH, *up, *routing, tile)),
        "expert_up_backward": (
            compiled.expert_up_backward,
            (torch.randn(10, 32, device=DEVICE), problem.x_TH, u1_SR, *up, *routing, tile, [True, *[not bare] * 4]),
        ),
        "expert_down": (compiled.expert_down, (h_SJ, problem.weights_TK, *down, *routing, gate, tile)),
        "expert_down_backward": (
            compiled.expert_down_backward,
            (
                problem.dy_TH,
                h_SJ,
                problem.weights_TK,
                u2_SR,
                *down,
                *routing,
                gate,
                tile,
                [True, True, *[not bare] * 4],
            ),
        ),
    }[name]
    if name.endswith("backward"):
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
    torch.library.opcheck(op, args)


@pytest.mark.gpu
@pytest.mark.parametrize("known_gate", [True, False])
def test_inductor_on_a_gpu(known_gate: bool) -> None:
    torch.compiler.reset()
    case = Case(tokens=512, top_k=4, experts=16, hidden=1024, intermediate=768, rank=16, dtype=torch.bfloat16)
    case = replace(case, adapter_dtype=torch.float32, activation=swiglu if known_gate else clamped_glu)
    function = torch.compile(routed_mlp, fullgraph=True)
    for tokens in (512, 700):
        problem = make_problem(replace(case, tokens=tokens), "cuda")
        want, got = call(routed_mlp, problem, None), call(function, problem, None)
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert_agrees(key, got[key], value, dtype=torch.bfloat16)
