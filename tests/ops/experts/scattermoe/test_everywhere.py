"""The fused expert MLP wherever training puts it: checkpointing, hooks, autocast, odd layouts, streams, graphs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertune.layers.layout import lora_from_peft
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.reference import reference_expert_mlp
from expertune.ops.experts.scattermoe import products
from expertune.ops.experts.scattermoe.mlp import scattermoe_expert_mlp
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.ops.experts.types import Activation, ExpertProjection
from expertune.ops.plan import build_plan
from tests.comparing import assert_agrees
from tests.ops.experts.cases import Case, Problem, clamped_glu, make_problem, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
SMALL = LinearTile(rows=16, columns=32, k_step=16, num_warps=4, num_stages=2)
TINY = Case(tokens=9, experts=3, hidden=16, intermediate=16)
# one shape for the tests on a GPU alone: each new rank, dtype or form of a tensor compiles kernels anew
REAL = Case(
    tokens=512, top_k=4, experts=16, hidden=1024, intermediate=768, rank=16,
    dtype=torch.bfloat16, adapter_dtype=torch.float32,
)  # fmt: skip


def mlp(
    problem: Problem,
    x_TH: Tensor | None = None,
    weights_TK: Tensor | None = None,
    *,
    activation: Activation = SWIGLU,
    tile: LinearTile | None = SMALL,
) -> Tensor:
    """The output for the problem's routing; another x or other routing weights may take the place of its own."""
    plan = build_plan(problem.expert_ids_TK, problem.case.experts, sentinels=problem.case.sentinels)
    x_TH = problem.x_TH if x_TH is None else x_TH
    weights_TK = problem.weights_TK if weights_TK is None else weights_TK
    return scattermoe_expert_mlp(x_TH, weights_TK, plan, problem.up, problem.down, activation, tile=tile)


def run(problem: Problem, **options: object) -> dict[str, Tensor]:
    return problem.collect(mlp(problem, **options))  # type: ignore[arg-type]


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


# Autograd's ways.


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(use_reentrant: bool) -> None:
    problem = make_problem(TINY, DEVICE)
    want, calls = run(problem), []

    def block(x_TH: Tensor, weights_TK: Tensor) -> Tensor:
        calls.append(1)
        return mlp(problem, x_TH, weights_TK)

    y_TH = checkpoint(block, problem.x_TH, problem.weights_TK, use_reentrant=use_reentrant)
    assert_same_bits(problem.collect(y_TH), want)
    assert len(calls) == 2, "nothing was recomputed"


@pytest.mark.parametrize("activation", [SWIGLU, swiglu], ids=["known", "function"])
def test_backward_twice_gives_the_same_gradients(activation: Activation) -> None:
    problem = make_problem(TINY, DEVICE)
    want = run(problem, activation=activation)
    y_TH = mlp(problem, activation=activation)
    leaves = list(problem.leaves.values())
    for retain in (True, True, False):
        grads = torch.autograd.grad(y_TH, leaves, problem.dy_TH, retain_graph=retain)
        assert_same_bits(dict(zip((f"d{name}" for name in problem.leaves), grads, strict=True)), {
            key: value for key, value in want.items() if key != "y"
        })  # fmt: skip
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y_TH, leaves, problem.dy_TH)


def test_saved_on_the_host_gives_the_same_bits() -> None:
    problem = make_problem(TINY, DEVICE)
    want = run(problem)
    with torch.autograd.graph.save_on_cpu():
        y_TH = mlp(problem)
    assert_same_bits(problem.collect(y_TH), want)


@pytest.mark.parametrize("activation", [SWIGLU, clamped_glu], ids=["known", "function"])
def test_saved_are_the_inputs_and_h_and_u_alone(activation: Activation) -> None:
    problem = make_problem(replace(TINY, bias=True), DEVICE)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TH = mlp(problem, activation=activation)
    given = [problem.x_TH, problem.weights_TK]
    for projection in (problem.up, problem.down):
        assert projection.bias_EY is not None
        assert projection.lora is not None
        given += [projection.weight_EYX, projection.bias_EY, projection.lora.a_ERX, projection.lora.b_EYR]
    given_bytes = {tensor.untyped_storage().data_ptr() for tensor in given}
    own_bytes = sum(num_bytes for pointer, num_bytes in saved.items() if pointer not in given_bytes)
    rows, padded_rank = 9 * 2, 16
    assert own_bytes == rows * (2 * 16 + 2 * padded_rank) * 4, "h [S, J], u1 and u2 [S, R']"
    assert y_TH.untyped_storage().data_ptr() not in saved


def test_scaling_zero_equals_no_adapter() -> None:
    problem, bare = make_problem(TINY, DEVICE), make_problem(TINY, DEVICE)

    def with_lora(projection: ExpertProjection, keep: bool) -> ExpertProjection:
        assert projection.lora is not None
        return replace(projection, lora=replace(projection.lora, scaling=0.0) if keep else None)

    problem.up, problem.down = with_lora(problem.up, True), with_lora(problem.down, True)
    bare.up, bare.down = with_lora(bare.up, False), with_lora(bare.down, False)
    got, want = run(problem), run(bare)
    adapters = {key: value for key, value in got.items() if "lora" in key}
    assert len(adapters) == 4
    assert not any(value.any() for value in adapters.values())
    assert_same_bits({key: value for key, value in got.items() if key not in adapters}, want)


def test_fp32_adapters_get_fp32_gradients() -> None:
    # the interpreter multiplies bf16 as if its bits were integers
    case = REAL if DEVICE == "cuda" else replace(TINY, dtype=torch.float16, adapter_dtype=torch.float32)
    got = run(make_problem(case, DEVICE), tile=None if DEVICE == "cuda" else SMALL)
    adapters = {key: value for key, value in got.items() if "lora" in key}
    assert len(adapters) == 4
    for key, value in adapters.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.to(case.dtype).float()), f"{key} was rounded on the way"


def test_autocast_changes_nothing() -> None:
    eye_II = torch.eye(16, device=DEVICE)

    def with_a_product(h_SJ: Tensor) -> Tensor:
        gate, up = h_SJ.chunk(2, dim=-1)
        return F.silu(gate) * (up @ eye_II)

    problem = make_problem(replace(TINY, base_grad=True, bias=True), DEVICE)
    for activation in (SWIGLU, with_a_product):
        want = run(problem, activation=activation)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert (eye_II @ eye_II).dtype == torch.bfloat16
            got = run(problem, activation=activation)
        assert_same_bits(got, want)


def odd_start(tensor: Tensor) -> Tensor:
    """The same values, contiguous, at an address that is no multiple of 16 bytes."""
    return F.pad(tensor.reshape(-1), (1, 0))[1:].view(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "every other column": lambda tensor: torch.stack([tensor, tensor], dim=-1).flatten(1)[:, ::2],
    "part of wider rows": lambda tensor: F.pad(tensor, (3, 5))[:, 3:-5],
    "misaligned": odd_start,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_of_x_weights_and_dy(name: str) -> None:
    problem, lay = make_problem(TINY, DEVICE), LAYOUTS[name]
    want = run(problem)
    x_TH, weights_TK = lay(problem.x_TH), lay(problem.weights_TK)
    problem.dy_TH = lay(problem.dy_TH)
    assert not problem.dy_TH.is_contiguous() or problem.dy_TH.data_ptr() % 16
    got = problem.collect(mlp(problem, x_TH, weights_TK))
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert_agrees(key, got[key], value, dtype=torch.float32)


def test_expanded_gradients_and_rows() -> None:
    problem = make_problem(TINY, DEVICE)
    problem.dy_TH = torch.ones_like(problem.dy_TH)
    want = run(problem)
    for leaf in problem.leaves.values():
        leaf.grad = None
    mlp(problem).sum().backward()  # dy is one number, expanded
    assert_same_bits({f"d{name}": leaf.grad for name, leaf in problem.leaves.items() if leaf.grad is not None}, {
        key: value for key, value in want.items() if key != "y"
    })  # fmt: skip
    with torch.no_grad():
        row_TH = problem.x_TH[:1].expand(9, -1)
        assert torch.equal(mlp(problem, row_TH), mlp(problem, row_TH.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_x_in_another_dtype_than_the_weights(dtype: torch.dtype) -> None:
    problem = make_problem(TINY, DEVICE)
    problem.x_TH = problem.leaves["x"] = problem.x_TH.detach().to(dtype).requires_grad_()
    problem.dy_TH = problem.dy_TH.to(dtype)
    got = run(problem)
    problem.x_TH = problem.leaves["x"] = problem.x_TH.detach().float().requires_grad_()
    want = run(problem)
    assert got["y"].dtype == got["dx"].dtype == dtype
    assert got["dup_lora_a"].dtype == torch.float32
    assert_same_bits({key: value.float() for key, value in got.items()}, {
        key: value.to(dtype).float() if key in ("y", "dx") else value for key, value in want.items()
    })  # fmt: skip


def test_without_autograd() -> None:
    problem = make_problem(TINY, DEVICE)
    want = mlp(problem)
    assert want.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y_TH = mlp(problem)
        assert not y_TH.requires_grad
        assert torch.equal(y_TH, want.detach())


def test_each_gradient_alone_equals_that_of_all() -> None:
    problem = make_problem(replace(TINY, base_grad=True, bias=True), DEVICE)
    want = run(problem)
    leaves = dict(problem.leaves)
    assert len(leaves) == 10
    for name, leaf in leaves.items():
        for other in leaves.values():
            other.requires_grad_(other is leaf).grad = None
        problem.leaves = {name: leaf}
        assert_same_bits(run(problem), {key: want[key] for key in ("y", f"d{name}")})
        assert all(other.grad is None for other in leaves.values() if other is not leaf)


def test_several_chunks_of_an_expert_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "build_row_tables", partial(products.build_row_tables, chunk_rows=16))
    case = replace(TINY, tokens=40, experts=2, top_k=1, all_on_first=True)
    problem = make_problem(case, DEVICE)
    first, second, truth = run(problem), run(problem), problem.reference(torch.float32)
    assert_same_bits(first, second)
    for key, value in truth.items():
        assert_agrees(key, first[key], value, dtype=torch.float32)


def test_a_tensor_of_another_device_is_named() -> None:
    problem = make_problem(TINY, DEVICE)
    with pytest.raises(ValueError, match=r"weights_TK: on meta, x_TH is on"):
        mlp(problem, weights_TK=problem.weights_TK.to("meta"))
    assert problem.up.lora is not None
    problem.up = replace(problem.up, lora=replace(problem.up.lora, b_EYR=problem.up.lora.b_EYR.to("meta")))
    with pytest.raises(ValueError, match=r"up\.lora\.b_EYR: on meta"):
        mlp(problem)


# On a GPU alone.


def real_run(problem: Problem) -> dict[str, Tensor]:
    return run(problem, tile=None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(1, torch.bfloat16), (8, torch.float16), (32, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16)],
)
def test_ranks_on_a_real_width(rank: int, dtype: torch.dtype) -> None:
    problem = make_problem(replace(REAL, rank=rank, dtype=dtype), "cuda")
    truth, plain, got = problem.reference(torch.float32), problem.reference(dtype), real_run(problem)
    for key, want in truth.items():
        assert_agrees(f"rank {rank}: {key}", got[key], want, dtype=dtype, same_dtype=plain[key])


@pytest.mark.gpu
def test_real_chunks_give_the_same_bits() -> None:
    problem = make_problem(replace(REAL, tokens=6000, top_k=1, all_on_first=True), "cuda")  # 6 chunks of 1024 rows
    runs = [real_run(problem) for _ in range(3)]
    for one, other in pairwise(runs):
        assert_same_bits(one, other)


@pytest.mark.gpu
def test_kernels_run_on_the_stream_of_the_caller() -> None:
    problem = make_problem(REAL, "cuda")
    want, values = real_run(problem), problem.x_TH.detach().clone()
    with torch.no_grad():
        problem.x_TH.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: kernels of another stream would read the NaN
        with torch.no_grad():
            problem.x_TH.copy_(values)
        got = real_run(problem)
    torch.cuda.synchronize()
    assert_same_bits(got, want)


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward() -> None:
    static, other = make_problem(REAL, "cuda"), make_problem(replace(REAL, seed=1), "cuda")
    want = real_run(other)
    # Leaves that no earlier graph holds: a leaf's node in autograd keeps the stream it was made on, and to wait for
    # that stream breaks the capture. PEFT's views are made anew in each step for the same reason.
    static.leaves = {name: leaf.detach().requires_grad_() for name, leaf in static.leaves.items()}
    leaves = static.leaves

    def step() -> tuple[Tensor, ...]:
        for name in ("up", "down"):
            projection = getattr(static, name)
            a, b = leaves[f"{name}_lora_a"], leaves[f"{name}_lora_b"]
            lora = lora_from_peft(a, b, REAL.experts, projection.lora.scaling)
            setattr(static, name, replace(projection, lora=lora))
        y_TH = mlp(static, leaves["x"], leaves["weights"], tile=None)
        return y_TH.detach(), *torch.autograd.grad(y_TH, list(leaves.values()), static.dy_TH)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    before = [result.clone() for result in results]
    with torch.no_grad():
        static.expert_ids_TK.copy_(other.expert_ids_TK)
        static.dy_TH.copy_(other.dy_TH)
        for name, leaf in static.leaves.items():
            leaf.copy_(other.leaves[name])
        for mine, theirs in ((static.up, other.up), (static.down, other.down)):
            mine.weight_EYX.copy_(theirs.weight_EYX)
    for _ in range(2):
        graph.replay()
        assert_same_bits(dict(zip(("y", *(f"d{name}" for name in static.leaves)), results, strict=True)), want)
    assert not any(torch.equal(*pair) for pair in zip(before, results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "intermediate"), [(2048, 64), (64, 1024)], ids=["wide x", "wide h"])
def test_more_than_2_to_the_31_elements(hidden: int, intermediate: int) -> None:
    """1.1 M rows of 2048: offsets past 2^31 elements. dy is zero but for a few tokens, which the reference computes."""
    tokens, experts = 1_100_000, 4
    case = Case(tokens=8, top_k=1, experts=experts, hidden=hidden, intermediate=intermediate, dtype=torch.bfloat16)
    problem = make_problem(case, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, generator=generator, device="cuda", dtype=torch.bfloat16)
    chosen = torch.cat([
        torch.randint(tokens - 128, (128,), generator=generator, device="cuda").unique(),
        torch.arange(tokens - 128, tokens, device="cuda"),
    ])  # fmt: skip
    x_TH, weights_TK = draw(tokens, hidden), draw(tokens, 1)
    ids_TK = torch.randint(experts, (tokens, 1), generator=generator, device="cuda")
    dy_TH = torch.zeros_like(x_TH)
    dy_TH[chosen] = draw(len(chosen), hidden)
    assert tokens * max(hidden, 2 * intermediate) > 2**31

    def small(dtype: torch.dtype) -> dict[str, Tensor]:
        problem.x_TH, problem.weights_TK, problem.expert_ids_TK, problem.dy_TH = (
            tensor[chosen] for tensor in (x_TH, weights_TK, ids_TK, dy_TH)
        )
        problem.leaves |= {"x": problem.x_TH.requires_grad_(), "weights": problem.weights_TK.requires_grad_()}
        return problem.collect(
            reference_expert_mlp(
                problem.x_TH, problem.expert_ids_TK, problem.weights_TK, problem.up, problem.down, swiglu, dtype=dtype
            )
        )

    truth, plain = small(torch.float32), small(torch.bfloat16)
    problem.x_TH, problem.weights_TK, problem.expert_ids_TK, problem.dy_TH = x_TH, weights_TK, ids_TK, dy_TH
    problem.leaves |= {"x": x_TH.requires_grad_(), "weights": weights_TK.requires_grad_()}
    got = real_run(problem)
    for key, want in truth.items():
        value = got[key][chosen] if key in ("y", "dx", "dweights") else got[key]
        assert_agrees(key, value, want, dtype=torch.bfloat16, same_dtype=plain[key])


@pytest.mark.gpu
def test_the_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: the tensors lie on another than the current one")
    want, got = real_run(make_problem(REAL, "cuda:0")), real_run(make_problem(REAL, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert got["y"].device == torch.device("cuda:1")
    assert_same_bits({key: value.to("cuda:0") for key, value in got.items()}, want)
