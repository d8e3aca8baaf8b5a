"""README's operator example runs as it stands, and its commands exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_operator_example_runs() -> None:
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "grouped_expert_mlp" in code)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["y_TH"].shape == (64, 128)
    assert len(block.strip().splitlines()) <= 10


def test_every_path_it_names_exists() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("https://") or (ROOT / path).exists(), path
    for script in re.findall(r"(benchmarks/\w+\.py|examples/[\w/]+\.py)", README):
        assert (ROOT / script).is_file(), script
