"""`expertune tune` at the command line."""

from pathlib import Path

import pytest
import torch
import typer
from transformers import OlmoeConfig
from typer.testing import CliRunner, Result

from expertune.bench.cases import Case
from expertune.bench.rivals import Step
from expertune.bench.timing import ClockTimer, Timing
from expertune.cli.tune import tune
from expertune.ops.experts.scattermoe.tiling import LinearTile
from expertune.tune import run as tune_run
from expertune.tune.cache import Machine, read_entries

MACHINE = Machine("a GPU", "9.0", "scattermoe.linear", "0" * 16, "3.6.0", "2.11.0", "0.1.0")
FAST = LinearTile(rows=64, columns=64)


def call(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(tune)
    return CliRunner(env={"COLUMNS": "80", "FORCE_COLOR": ""}).invoke(app, list(arguments))


class FakeStep:
    def __init__(self, tile: LinearTile) -> None:
        self.ms = 1.0 if tile == FAST else 2.0

    def __call__(self) -> tuple[torch.Tensor, ...]:
        return (torch.ones(2),) * 7


class FakeTimer(ClockTimer):
    def idle(self, step: Step) -> Timing:
        return Timing(0.0, 0.0)

    def queued(self, step: Step, host_ms: float) -> float:
        assert isinstance(step, FakeStep)
        return step.ms


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Case]:
    """The CPU in the place of the GPU, made-up times, a cache folder of its own; the cases that are measured."""
    measured: list[Case] = []
    real = tune_run.run_tune

    def run(cases: list[Case], *arguments: object, **options: object) -> object:
        measured.extend(cases)
        return real(cases, *arguments, **options, candidates=(FAST,), step_of=lambda _p, tile: FakeStep(tile))  # type: ignore[arg-type]

    monkeypatch.setattr("expertune.tune.run.find_gpu", lambda: (torch.device("cpu"), FakeTimer()))
    monkeypatch.setattr("expertune.tune.cache.this_machine", lambda _device: MACHINE)
    monkeypatch.setattr("expertune.tune.run.run_tune", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return measured


def test_the_winner_is_where_training_looks(cases: list[Case], tmp_path: Path) -> None:
    result = call("--shape", "4,32,16,2", "--tokens", "12", "--tokens", "64", "--rank", "8")
    assert result.exit_code == 0, result.output
    assert [(case.tokens, case.rank) for case in cases] == [(12, 8), (64, 8)]
    path = tmp_path / "xdg" / "expertune" / "tiles.json"
    assert [(entry.tile, entry.shape.dtype) for entry in read_entries(path)] == [(FAST, "bfloat16")] * 2
    assert f"kept 2 in {path}" in result.output
    assert "note: training reads" not in result.output


def test_a_file_of_ones_own_is_not_where_training_looks(cases: list[Case], tmp_path: Path) -> None:
    result = call("--shape", "4,32,16,2", "--tokens", "12", "--cache", str(tmp_path / "mine.json"))
    assert result.exit_code == 0, result.output
    assert len(read_entries(tmp_path / "mine.json")) == 1
    assert "note: training reads" in result.output


def test_a_dry_run_writes_nothing(cases: list[Case], tmp_path: Path) -> None:
    result = call("--shape", "4,32,16,2", "--tokens", "12", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "dry run: nothing was written" in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_sizes_of_a_model(cases: list[Case], tmp_path: Path) -> None:
    config = OlmoeConfig(num_experts=4, hidden_size=32, intermediate_size=16, num_experts_per_tok=2)
    config.save_pretrained(tmp_path / "model")
    result = call("--model", str(tmp_path / "model"), "--tokens", "12", "--rank", "4", "--rank", "32")
    assert result.exit_code == 0, result.output
    sizes = [(each.shape.num_experts, each.shape.hidden, each.shape.intermediate, each.shape.top_k) for each in cases]
    assert sizes == [(4, 32, 16, 2)] * 2
    assert [case.rank for case in cases] == [4, 32]


def test_a_cache_that_cannot_be_written_is_said_before_measuring(cases: list[Case], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("--shape", "OLMoE", "--cache", str(tmp_path / "file" / "tiles.json"))
    assert result.exit_code == 2
    assert "tiles.json cannot be written" in result.output
    assert cases == []


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("--shape", "OLMoE", "--cache", str(tmp_path / "tiles.json"))
    assert result.exit_code == 2
    assert "error: expertune tune needs an NVIDIA GPU" in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--model, --shape: say what to tune for"),
        (("--shape", "Mixtral-8x22B"), "--shape: there is no 'Mixtral-8x22B'; the nearest is Mixtral-8x7B"),
    ],
)
def test_a_wrong_call_is_refused(arguments: tuple[str, ...], says: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert f"error: {says}" in result.output


@pytest.mark.usefixtures("cases")
def test_a_model_that_is_none(tmp_path: Path) -> None:
    result = call("--model", str(tmp_path))
    assert result.exit_code == 2
    assert "error: --model: " in result.output
