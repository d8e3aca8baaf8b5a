"""Every architecture of the installed Transformers with the experts decorator: equal to eager, and to PEFT's own fold.

The architectures are found, not listed: those of a new release are tested the day it is installed.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import expertune
from expertune.layers.layout import is_experts_module, projection_names
from tests.integrations.architectures import EXCEPTIONS, Architecture, architectures, build, outsiders
from tests.integrations.parity import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    TABLE_HEAD,
    check_parity,
    compare,
    run,
    with_expert_adapters,
)

UNKNOWN_ROUTERS = {"inkling", "zaya"}
"""Inkling's router scores its shared experts too, Zaya's is a network of its own: no [experts, hidden]."""
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
EVERY = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(
            each,
            id=str(each),
            marks=[pytest.mark.skip(reason=EXCEPTIONS[each.experts_name])] if each.experts_name in EXCEPTIONS else [],
        )
        for each in architectures()
    ],
)


@EVERY
def test_output_loss_and_every_gradient_equal_eager(architecture: Architecture) -> None:
    check_parity(architecture, adapters=False)


@EVERY
def test_with_adapters_equal_to_pefts_own_fold(architecture: Architecture) -> None:
    check_parity(architecture, adapters=True)


@EVERY
def test_targets_are_found_and_an_error_of_a_thousandth_is_noticed(architecture: Architecture) -> None:
    """The canary: experts whose output is off by 1e-3, element by element, must fail in output and gradients."""
    base = build(architecture, "expertune")
    experts = [(name, module) for name, module in base.named_modules() if is_experts_module(module)]
    assert any(type(module) is architecture.experts_class for _, module in experts)
    targets = expertune.get_target_parameters(base)
    wanted = [f"{name}.{parameter}" for name, module in experts for parameter in projection_names(module)]
    assert all(name.endswith(tuple(f".{target}" for target in targets)) for name in wanted)
    if architecture.folder in UNKNOWN_ROUTERS:
        with pytest.raises(ValueError, match="its router is none that is recognised"):
            expertune.get_target_parameters(base, router=True)
    else:
        assert set(expertune.get_target_parameters(base, router=True)) > set(targets)
    model = with_expert_adapters(base)
    assert expertune.check_peft_model(model) == []
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(wanted)  # lora_A and lora_B of each, and nothing else
    right = run(architecture, model)
    hooks = [module.register_forward_hook(_off_by_a_thousandth) for _, module in experts]
    wrong = compare(run(architecture, model), right)
    assert wrong.output > 10 * OUTPUT_TOLERANCE
    assert wrong.gradient > 10 * GRADIENT_TOLERANCE
    for hook in hooks:
        hook.remove()


def _off_by_a_thousandth(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    return output * (1 + 1e-3 * noise)


def test_architectures_are_found() -> None:
    assert {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"} <= {each.folder for each in architectures()}
    assert len(EXCEPTIONS) <= 3, "the list of exceptions is to stay short"
    assert set(EXCEPTIONS) <= {each.experts_name for each in architectures()}


def test_the_page_lists_what_was_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    version, *counts = re.search(  # type: ignore[union-attr]
        r"^Transformers (\S+): (\d+) folders with (\d+) experts classes found, (\d+) passed, (\d+) excepted\.$",
        page,
        re.M,
    ).groups()
    if version != transformers.__version__:
        pytest.skip(f"docs/architectures.md is of Transformers {version}, {transformers.__version__} is installed")
    found = architectures()
    cells = [line.split(" | ") for line in page.partition(TABLE_HEAD)[2].splitlines()[2:] if line.startswith("| ")]
    passed = [each for each in found if each.experts_name not in EXCEPTIONS]
    assert [(row[0].removeprefix("| "), row[1], row[2]) for row in cells] == [
        (each.folder, each.experts_name, each.level) for each in passed
    ]
    folders = {each.folder for each in found}
    assert [int(count) for count in counts] == [len(folders), len(found), len(passed), len(EXCEPTIONS)]
    for name in EXCEPTIONS:
        assert f"{name}: {EXCEPTIONS[name]}" in page
    for folder, name in outsiders().items():
        assert f"- {folder}: {name}" in page
