"""The code in docs/moe_block.md runs as it stands, top to bottom."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs"


def test_moe_block() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "moe_block.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    exec(compile("\n".join(blocks), "moe_block.md", "exec"), {})
