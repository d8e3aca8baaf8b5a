"""The expert MLP over several processes equals the oracle on all tokens at once: values and every gradient."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertune.distributed.collectives import Wire
from expertune.distributed.dispatch import ExpertShard, return_from_experts, send_to_experts
from expertune.distributed.mesh import EXPERT, join_mesh
from expertune.distributed.sizes import ParallelSizes
from expertune.integrations import experts
from expertune.integrations.experts import SHARD
from expertune.layers.running import run_expert_mlp
from expertune.ops.experts.gates import SWIGLU
from expertune.ops.experts.reference import reference_expert_mlp
from expertune.ops.experts.types import ExpertLora, ExpertProjection
from expertune.ops.plan import ExpertPlan, build_plan
from tests.comparing import assert_agrees
from tests.distributed.processes import Crew

EXPERTS, HIDDEN, WIDTH, RANK, TOP_K = 8, 32, 16, 4, 2


@dataclass(frozen=True)
class Case:
    """tokens: of each process. ids: how tokens choose, see `_ids`."""

    tokens: tuple[int, ...]
    ids: str = "random"
    backend: str = "torch_grouped"
    dtype: torch.dtype = torch.float32


CASES = {
    "even": Case((6, 6)),
    "uneven": Case((7, 3)),
    "one process has no token": Case((0, 5)),
    "the other has no token": Case((4, 0)),
    "nobody has a token": Case((0, 0)),
    "all tokens to the first process": Case((5, 4), "first"),
    "all tokens to the last process": Case((5, 4), "last"),
    "every token to its neighbour": Case((3, 3), "across"),
    "one expert takes all": Case((5, 2), "one"),
    "no token, and none arrives": Case((0, 5), "last"),
    "in Triton's interpreter": Case((3, 1), backend="scattermoe"),
    "in Triton's interpreter, none arrives": Case((0, 3), "last", backend="scattermoe"),
    "in fp64": Case((4, 3), dtype=torch.float64),
    "four processes": Case((4, 0, 7, 1)),
    "four processes, all tokens to the last": Case((4, 0, 7, 1), "last"),
}


def _ids(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    """[T, K], distinct experts in each row."""
    tokens, size = case.tokens[rank], len(case.tokens)
    each = EXPERTS // size
    if case.ids == "one":
        return torch.tensor([[EXPERTS - 1, 0]]).expand(tokens, TOP_K).clone()
    offset, among = {
        "random": (0, EXPERTS),
        "first": (0, each),
        "last": (EXPERTS - each, each),
        "across": ((rank + 1) % size * each, each),
    }[case.ids]
    return offset + torch.rand(tokens, among, generator=generator).argsort(1)[:, :TOP_K]


def make_problem(case: Case) -> dict[str, Any]:
    """The whole problem, the same in every process: projections in full, inputs and upstream gradients by rank."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(case.dtype)

    def projection(out: int, width: int) -> ExpertProjection:
        lora = ExpertLora(random(EXPERTS, RANK, width), random(EXPERTS, out, RANK), 2.0)
        return ExpertProjection(random(EXPERTS, out, width), None, lora)

    ranks = range(len(case.tokens))
    return {
        "up": projection(2 * WIDTH, HIDDEN),
        "down": projection(HIDDEN, WIDTH),
        "x": [random(case.tokens[rank], HIDDEN) for rank in ranks],
        "ids": [_ids(case, rank, generator) for rank in ranks],
        "weights": [torch.rand(case.tokens[rank], TOP_K, generator=generator).to(case.dtype) for rank in ranks],
        "dy": [random(case.tokens[rank], HIDDEN) for rank in ranks],
    }


def _slice(projection: ExpertProjection, experts: slice) -> ExpertProjection:
    lora = projection.lora
    assert lora is not None
    mine = replace(
        lora,
        a_ERX=lora.a_ERX[experts].clone().requires_grad_(),
        b_EYR=lora.b_EYR[experts].clone().requires_grad_(),
    )
    return ExpertProjection(projection.weight_EYX[experts].clone(), None, mine)


def _loras(up: ExpertProjection, down: ExpertProjection) -> list[Tensor]:
    assert up.lora is not None
    assert down.lora is not None
    return [up.lora.a_ERX, up.lora.b_EYR, down.lora.a_ERX, down.lora.b_EYR]


def dispatched(case: Case) -> dict[str, Any]:
    """In one process of several: its own tokens, its own experts."""
    size = len(case.tokens)
    mesh = join_mesh(ParallelSizes(expert=size), "cpu", timeout_s=30)
    rank, each = mesh.index(EXPERT), EXPERTS // size
    shard = ExpertShard(mesh.wire(EXPERT, "the test's layer"), rank, each)
    return through(shard, case)


def through(shard: ExpertShard, case: Case) -> dict[str, Any]:
    """Out and back, and backward."""
    rank, each = shard.index, shard.num_local
    problem = make_problem(case)
    mine = slice(rank * each, (rank + 1) * each)
    up, down = _slice(problem["up"], mine), _slice(problem["down"], mine)
    x_TH, weights_TK = problem["x"][rank].requires_grad_(), problem["weights"][rank].requires_grad_()
    arrived = send_to_experts(x_TH, problem["ids"][rank], weights_TK, shard)
    plan = build_plan(arrived.expert_ids_RK, each, sentinels=True, num_live_rows=arrived.trip.num_pairs)
    y_RH = run_expert_mlp(case.backend, arrived.x_RH, arrived.weights_RK, plan, up, down, SWIGLU)
    y_TH = return_from_experts(y_RH, arrived)
    grads = torch.autograd.grad(y_TH, [x_TH, weights_TK, *_loras(up, down)], problem["dy"][rank])
    return {
        "y": y_TH.detach(),
        "dx": grads[0],
        "dweights": grads[1],
        "dloras": grads[2:],
        "rows": plan.num_rows,
        "arrived": len(arrived.x_RH),
    }


def assert_equals_the_oracle(got: list[dict[str, Any]], case: Case) -> None:
    """got: what `through` returned, by rank."""
    problem = make_problem(case)
    up, down = _slice(problem["up"], slice(None)), _slice(problem["down"], slice(None))
    x_TH = torch.cat(problem["x"]).requires_grad_()
    weights_TK, ids_TK = torch.cat(problem["weights"]).requires_grad_(), torch.cat(problem["ids"])
    inputs, dy_TH = [x_TH, weights_TK, *_loras(up, down)], torch.cat(problem["dy"])
    dtype = torch.promote_types(case.dtype, torch.float32)
    y_TH = reference_expert_mlp(x_TH, ids_TK, weights_TK, up, down, SWIGLU, dtype=dtype)
    want = [y_TH.detach(), *torch.autograd.grad(y_TH, inputs, dy_TH.to(y_TH.dtype))]
    same_dtype: list[Tensor | None] = [None] * len(want)
    if case.dtype == torch.bfloat16:
        y_TH = run_expert_mlp(case.backend, x_TH, weights_TK, build_plan(ids_TK, EXPERTS), up, down, SWIGLU)
        same_dtype = [y_TH.detach(), *torch.autograd.grad(y_TH, inputs, dy_TH)]
    for index, (one, near) in enumerate(zip(want, same_dtype, strict=True)):
        parts = [(each["y"], each["dx"], each["dweights"], *each["dloras"])[index] for each in got]
        assert_agrees(f"result {index}", torch.cat(parts), one, dtype=case.dtype, same_dtype=near)
    assert sum(each["rows"] for each in got) == ids_TK.numel(), "a token was dropped, or a sentinel costs a row"


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_oracle(name: str, two: Crew, four: Crew) -> None:
    case = CASES[name]
    assert_equals_the_oracle((two if len(case.tokens) == 2 else four).run(dispatched, case), case)


def test_a_token_travels_once_to_a_process(two: Crew) -> None:
    arrived = [each["arrived"] for each in two.run(dispatched, CASES["all tokens to the first process"])]
    assert arrived == [9, 0]  # 5 and 4 tokens, K = 2 experts each, one row


def of_the_experts(_: None) -> list[str]:
    """What an experts module of two experts, of four, does with tokens that arrive, and in a checkpointed backward."""
    mesh, events = join_mesh(ParallelSizes(expert=2), "cpu", timeout_s=30), []
    module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=2))
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.zero_()
    setattr(module, SHARD, ExpertShard(mesh.wire(EXPERT, "the test's layer"), mesh.index(EXPERT), 2))
    exchange, build = Wire.exchange_rows, experts.run_build_plan

    def exchanged(*args: Any) -> Tensor:
        events.append(args[-1])
        return exchange(*args)

    def built(*args: Any, **kwargs: Any) -> ExpertPlan:
        events.append("plan")
        return build(*args, **kwargs)

    with patch.object(Wire, "exchange_rows", exchanged), patch.object(experts, "run_build_plan", built):
        x_TH, ids_TK = torch.zeros(2, HIDDEN, requires_grad=True), torch.tensor([[0, 2], [1, 3]])
        arguments = "torch_grouped", module, x_TH, ids_TK, torch.ones(2, 2)
        checkpoint(experts.experts_forward, *arguments, use_reentrant=False).sum().backward()
    return events


def test_the_plan_is_made_once(two: Crew) -> None:
    forward = ["sending expert ids and routing weights", "sending tokens", "plan", "returning results"]
    backward = ["sending gradients of results", "sending tokens", "returning gradients of tokens"]
    assert two.run(of_the_experts, None) == [forward + backward] * 2


def out_of_range(_: None) -> str:
    mesh = join_mesh(ParallelSizes(expert=2), "cpu", timeout_s=30)
    shard = ExpertShard(mesh.wire(EXPERT, "the test's layer"), mesh.index(EXPERT), 4)
    with pytest.raises(ValueError) as caught:
        send_to_experts(torch.zeros(1, 4), torch.tensor([[8]]), torch.ones(1, 1), shard)
    return str(caught.value)


def test_an_expert_that_nobody_owns_is_refused(two: Crew) -> None:
    assert two.run(out_of_range, None)[0] == "expert_ids_TK: ids span 8 to 8, need 0 to 7"


def test_a_shard_knows_its_experts() -> None:
    assert ExpertShard(Wire(None, "", 1.0), index=2, num_local=4).experts == range(8, 12)
