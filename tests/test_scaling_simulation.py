"""docs/scaling.md has the tables of the simulation, and the simulation counts what it says it counts."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = ROOT / "benchmarks" / "scaling_simulation.py"
    spec = importlib.util.spec_from_file_location("scaling_simulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_docs_have_the_simulations_tables(simulation: ModuleType) -> None:
    docs = simulation.DOCS.read_text(encoding="utf-8")
    inside = docs.partition(simulation.START)[2].partition(simulation.END)[0]
    assert inside.strip() == simulation.tables()


def test_a_token_counts_once_for_each_place(simulation: ModuleType) -> None:
    places = torch.tensor([[3, 1, 3, 3], [2, 2, 0, 2], [0, 1, 2, 3]])
    first = simulation._first_of(places)
    assert first.tolist() == [
        [True, True, False, False],
        [True, False, True, False],
        [True, True, True, True],
    ]


def test_copies_are_those_of_a_loop(simulation: ModuleType) -> None:
    model, group = simulation.DEEPSEEK, 64
    traffic = simulation.traffic_of(model, group)
    to_node = to_others = to_nodes = 0
    ids = simulation.route(model).tolist()
    for token, experts in enumerate(ids):
        own = token % group
        here = own // simulation.GPUS_OF_A_NODE
        gpus = {expert // (model.num_experts // group) for expert in experts} - {own}
        nodes = [gpu // simulation.GPUS_OF_A_NODE for gpu in gpus]
        to_node += sum(node == here for node in nodes)
        to_others += sum(node != here for node in nodes)
        to_nodes += len(set(nodes) - {here})
    counted = [traffic.to_node, traffic.to_others, traffic.nodes]
    assert counted == pytest.approx([each / len(ids) for each in (to_node, to_others, to_nodes)])


def test_node_limited_routing_reaches_four_nodes_at_most(simulation: ModuleType) -> None:
    nodes = simulation.route(simulation.DEEPSEEK) // 32  # 8 nodes of 32 experts: a group each
    reached = simulation._first_of(nodes).sum(dim=1)
    assert int(reached.max()) <= 4
    free = simulation._first_of(simulation.route(simulation.FREE) // 32).sum(dim=1)
    assert int(free.max()) > 4


def test_the_correction_bias_evens_the_load(simulation: ModuleType) -> None:
    biased = simulation.traffic_of(simulation.DEEPSEEK, 64).balance
    generator = torch.Generator().manual_seed(0)
    offsets = simulation.POPULARITY * torch.randn(256, generator=generator)
    logits = torch.randn(simulation.SIMULATED_TOKENS, 256, generator=generator) + offsets
    plain = simulation.select_experts(logits, simulation.DEEPSEEK.rule).expert_ids_TK
    rows = torch.bincount((plain // 4).flatten(), minlength=64).double()
    assert biased < 1.2 < float(rows.max() / rows.mean())


def test_the_experts_time_is_the_measured_one(simulation: ModuleType) -> None:
    row = simulation.simulate(simulation.QWEN3, 8, 8)
    assert row.experts_ms == pytest.approx(2.68, abs=0.01), "the README's 2.7 ms"
    assert simulation.measured_layer_ms() == pytest.approx(241.5 / 12)


def test_a_group_within_a_node_sends_nothing_out_of_it(simulation: ModuleType) -> None:
    assert simulation.traffic_of(simulation.QWEN3, 8).to_others == 0
    assert simulation.exchange_ms(simulation.QWEN3, 1.0, 0.0, 1.0) == pytest.approx(
        1000 * 8192 * 4096 / simulation.NVLINK
    )
