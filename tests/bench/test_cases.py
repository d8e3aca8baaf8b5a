"""The names on the command line: what they select, and what is said of a wrong one."""

import pytest

from expertune.bench.cases import SHAPES, Case, ExpertShape, find_shape, select_cases
from expertune.errors import ConfigError


def test_without_arguments_every_model_and_three_batches_of_the_first() -> None:
    cases = [(case.shape.name, case.tokens, case.rank, case.routing) for case in select_cases()]
    assert cases[:3] == [("Qwen3-30B-A3B", tokens, 16, "uniform") for tokens in (8192, 1024, 32768)]
    assert cases[3:] == [(shape.name, 8192, 16, "uniform") for shape in SHAPES[1:]]


def test_every_combination_once_in_the_order_given() -> None:
    cases = select_cases(["olmoe", "8,64,32,2", "OLMoE"], [16, 4], [8], ["zipf", "uniform"])
    sizes = ExpertShape("8x64x32x2", 8, 64, 32, 2)
    assert len(cases) == 8
    assert cases[0] == Case(find_shape("OLMoE"), 16, 8, "zipf")
    assert cases[-1] == Case(sizes, 4, 8, "uniform")


def test_a_named_shape_alone_has_the_usual_tokens() -> None:
    assert [case.tokens for case in select_cases(["Qwen3-30B-A3B"])] == [8192]


def test_flops_are_those_of_both_products_and_their_input_gradients() -> None:
    rows, hidden, intermediate = 10 * 2, 64, 32
    forward = 2 * rows * (hidden * 2 * intermediate + intermediate * hidden)
    assert ExpertShape("", 8, hidden, intermediate, 2).base_flops(10) == 2 * forward


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Qwen3-30B", "the nearest is Qwen3-30B-A3B; there are Qwen3-30B-A3B, GLM-4.5-Air"),
        ("llama", "there is no 'llama'; there are"),
        ("8,64,32", "need four whole numbers E,H,I,K"),
        ("8,64,-32,2", "need four whole numbers"),
        ("8,64,0,2", "of at least 1"),
        ("4,64,32,8", "8 experts per token (K) are more than 4 experts (E)"),
    ],
)
def test_a_wrong_shape_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        select_cases([text])
    assert str(error.value).startswith("--shape: ")
    assert says in str(error.value)


def test_a_wrong_routing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--routing: there is no 'zip'; the nearest is zipf; there are uniform, zipf"):
        select_cases(routings=["zip"])
