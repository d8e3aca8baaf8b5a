"""The random problem: routing, layout of the adapters, seeds."""

import pytest
import torch

from expertune.bench.cases import Case, ExpertShape
from expertune.bench.problem import draw_problem, draw_routing
from tests.bench.conftest import tiny_problem

TOKENS, SHAPE = 4000, ExpertShape("", 32, 8, 8, 4)


def share_of_experts(routing: str) -> torch.Tensor:
    """Share of all rows that each expert gets, most first."""
    ids_TK = draw_routing(Case(SHAPE, TOKENS, 4, routing), torch.Generator().manual_seed(0))
    assert ids_TK.shape == (TOKENS, SHAPE.top_k)
    return torch.bincount(ids_TK.flatten(), minlength=SHAPE.num_experts).sort(descending=True).values / ids_TK.numel()


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize("shape", [SHAPE, ExpertShape("", 8, 8, 8, 8)])
def test_the_experts_of_a_token_are_distinct(routing: str, shape: ExpertShape) -> None:
    ids_TK = draw_routing(Case(shape, 500, 4, routing), torch.Generator().manual_seed(1))
    assert ids_TK.dtype == torch.int64
    assert 0 <= int(ids_TK.min()) <= int(ids_TK.max()) < shape.num_experts
    assert all(len(set(ids)) == shape.top_k for ids in ids_TK.tolist())


def test_uniform_routing_is_balanced_but_for_chance() -> None:
    shares = share_of_experts("uniform")
    assert shares.max() < 1.3 / SHAPE.num_experts
    assert shares.min() > 0.7 / SHAPE.num_experts


def test_zipf_routing_is_skewed_as_its_law_says() -> None:
    shares = share_of_experts("zipf")
    # The first choice is in proportion to 1/n; without replacement no expert can have more than 1/K of the rows.
    assert 0.15 < shares[0] <= 1 / SHAPE.top_k
    assert shares[0] > 10 * shares[-1]
    places = 1 / torch.arange(1, SHAPE.num_experts + 1)
    one = draw_routing(Case(ExpertShape("", 32, 8, 8, 1), TOKENS, 4, "zipf"), torch.Generator().manual_seed(2))
    first_choice = torch.bincount(one.flatten(), minlength=32).sort(descending=True).values / TOKENS
    assert torch.allclose(first_choice, places / places.sum(), atol=0.03)


def test_popular_experts_are_others_with_another_seed() -> None:
    case = Case(SHAPE, TOKENS, 4, "zipf")
    popular = {
        int(draw_routing(case, torch.Generator().manual_seed(seed)).flatten().mode().values) for seed in range(8)
    }
    assert len(popular) > 3


def test_the_same_seed_draws_the_same_problem_and_another_does_not() -> None:
    case = tiny_problem().case
    one, same, other = (draw_problem(case, seed=seed, device=torch.device("cpu")) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one.leaves, same.leaves, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.leaves, other.leaves, strict=True))


def test_adapters_are_fp32_in_pefts_layout_and_lora_b_is_not_zero() -> None:
    problem = tiny_problem(torch.bfloat16)
    up, down = problem.projections()
    shape, rank = problem.case.shape, problem.case.rank
    for projection, a, b in ((up, problem.a_up, problem.b_up), (down, problem.a_down, problem.b_down)):
        assert projection.lora is not None
        assert a.dtype == b.dtype == torch.float32
        assert projection.lora.a_ERX.data_ptr() == a.data_ptr()
        assert torch.equal(projection.lora.a_ERX[3, 5], a[3 * rank + 5])
        assert torch.equal(projection.lora.b_EYR[3, :, 5], b[:, 5 * shape.num_experts + 3])
        assert (b != 0).all()
    assert problem.x_TH.dtype == problem.weights_TK.dtype == problem.gate_up_EJH.dtype == torch.bfloat16
    assert torch.allclose(problem.weights_TK.float().sum(dim=1), torch.ones(problem.case.tokens), atol=1e-2)
