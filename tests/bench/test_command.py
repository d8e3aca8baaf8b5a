"""`expertune bench` at the command line."""

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from expertune.bench.timing import ClockTimer
from expertune.cli.bench import bench


def call(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(bench)
    return CliRunner(env={"COLUMNS": "80", "FORCE_COLOR": ""}).invoke(app, list(arguments))


@pytest.fixture
def a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of the GPU."""
    monkeypatch.setattr("expertune.bench.run.find_gpu", lambda: (torch.device("cpu"), ClockTimer()))


@pytest.mark.usefixtures("a_device")
def test_a_small_run(tmp_path: Path) -> None:
    result = call(
        *("--shape", "4,32,16,2", "--tokens", "12", "--rank", "8", "--routing", "zipf", "--routing", "uniform"),
        *("--way", "torch_grouped", "--repeats", "2", "--output", str(tmp_path / "new" / "folder")),
    )
    assert result.exit_code == 0, result.output
    assert "4x32x16x2, 12 tokens, rank 8, zipf routing (case 1 of 2, seed " in result.output
    lines = (tmp_path / "new" / "folder" / "bench.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2
    assert ",bfloat16," in lines[1]


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("--output", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "error: expertune bench needs an NVIDIA GPU" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "Mixtral-8x22B"), "--shape: there is no 'Mixtral-8x22B'; the nearest is Mixtral-8x7B"),
        (("--shape", "1,2,3"), "--shape: got '1,2,3'; need four whole numbers"),
        (("--way", "unfused"), "--way: there is no 'unfused'; there are dense cuBLAS, scattermoe"),
        (("--routing", "skewed"), "--routing: there is no 'skewed'; there are uniform, zipf"),
    ],
)
def test_a_wrong_name_is_refused(arguments: tuple[str, ...], says: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert f"error: {says}" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--tokens", "--rank", "--repeats"])
def test_zero_is_refused(option: str) -> None:
    result = call(option, "0")
    assert result.exit_code == 2
    assert option in result.output
