"""The benchmark of several processes runs in its tiny form."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expertune.distributed.mesh import join_mesh
from expertune.distributed.sizes import ParallelSizes
from tests.distributed.processes import Crew

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measure(sizes: ParallelSizes, model: str, routers: str) -> dict[str, Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import expert_parallel

    setting = expert_parallel.Setting(
        machine="", model=model, layers=2, tokens=64, rows=2, shard=sizes.shard, backend="torch_grouped",
        checkpointing=True, routers=routers, overlap=True, deep_ep=False, steps=2, tiny=True,
    )  # fmt: skip
    return expert_parallel.measure(setting, join_mesh(sizes, "cpu", timeout_s=30), torch.device("cpu"))


@pytest.mark.parametrize("routers", ["balanced", "even"])
@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "GLM-4.5-Air"])
def test_it_measures_and_compares_with_one_process(model: str, routers: str, two: Crew, tmp_path: Path) -> None:
    row, other = two.run(measure, ParallelSizes(expert=2), model, routers)
    assert row["tokens_per_s_per_gpu"] == other["tokens_per_s_per_gpu"], "the slowest process counts in all"
    assert 1.0 <= row["max_pairs_share"] <= 2.0
    assert float(row["last_loss"]) < float(row["first_loss"]) + 0.1
    sys.path.insert(0, str(BENCHMARKS))
    import expert_parallel

    output = tmp_path / "ep.csv"
    one = row | {"processes": 1, "tokens_per_s_per_gpu": 2 * row["tokens_per_s_per_gpu"], "device": "a"}
    expert_parallel.append(one, output)
    expert_parallel.append(row | {"device": "a"}, output)
    expert_parallel.append(row | {"device": "b"}, output)
    with output.open(newline="") as file:
        assert [each["ratio_to_one"] for each in csv.DictReader(file)] == ["1.000", "0.500", ""]


def test_balanced_routers_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import expert_parallel

    router = SimpleNamespace(top_k=2, norm_topk_prob=True)
    logits_TE = torch.randn(512, 8) + 20 * torch.arange(8)  # without balance all choose experts 6 and 7
    same_TE, weights_TK, ids_TK = expert_parallel.balance(router, None, (logits_TE, torch.ones(512, 2), None))
    assert same_TE is logits_TE
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(512))
    counts_E = torch.bincount(ids_TK.flatten(), minlength=8)
    assert counts_E.max() < 1.5 * counts_E.float().mean()


def test_experts_by_lot_have_the_same_work_and_the_routers_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import expert_parallel

    router = SimpleNamespace(top_k=2, norm_topk_prob=False, weight=torch.zeros(8, 16))
    logits_TE = torch.randn(4096, 8) + 20 * torch.arange(8)
    _, weights_TK, ids_TK = expert_parallel.draw(router, None, (logits_TE, torch.ones(4096, 2), None))
    torch.testing.assert_close(weights_TK, logits_TE.softmax(-1).gather(1, ids_TK))
    expert_parallel.draw_choice(router, (torch.zeros(2, 2048, 16),))
    for chosen_TK in (ids_TK, router.e_score_correction_bias.topk(2).indices):
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=8)
        assert counts_E.max() < 1.15 * counts_E.float().mean()
        assert (chosen_TK[:, 0] != chosen_TK[:, 1]).all()


def test_the_bias_of_a_choice_balances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import expert_parallel

    router = SimpleNamespace(weight=torch.randn(8, 16) / 10, e_score_correction_bias=torch.zeros(8))
    hidden = torch.randn(2, 256, 16) + 3 * torch.randn(16)  # what all have in common chooses for all
    expert_parallel.balance_choice(router, (hidden,))
    scores_TE = (hidden.flatten(0, 1) @ router.weight.T).sigmoid()

    def busiest(scores_TE: torch.Tensor) -> float:
        counts_E = torch.bincount(scores_TE.topk(2).indices.flatten(), minlength=8).float()
        return float(counts_E.max() / counts_E.mean())

    assert busiest(scores_TE + router.e_score_correction_bias) < 0.8 * busiest(scores_TE)
