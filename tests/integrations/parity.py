"""Our backend beside eager, and beside PEFT's own fold, on each tiny model; the table of what was measured.

    python -m tests.integrations.parity docs/architectures.md

measures every architecture and writes the page. One that fails is listed there with what went wrong.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

import expertune
from expertune.integrations import experts as our_experts
from expertune.integrations.gates import activation_of
from expertune.layers.layout import is_experts_module
from expertune.ops.experts.gates import SWIGLU
from tests.comparing import relative_error
from tests.integrations.architectures import EXCEPTIONS, SIZES, VOCAB, Architecture, architectures, build, outsiders
from tests.tiny import randomize_lora_b

OUTPUT_TOLERANCE = 1e-5
"""fp32, relative in norm, of the output and of the loss."""
GRADIENT_TOLERANCE = 5e-5
"""fp32, relative in norm, of every single gradient. Six seeds of every model gave at most 2.6e-5 (the decay rates of
Qwen3.5's linear attention, sums that cancel): there eager is as far from fp64 as we are. Most give 5e-7."""
GRADIENT_FLOOR = 1e-6
"""Times the largest gradient's norm: one smaller than that is rounding (a key's bias shifts all scores alike), and its
error is measured against this instead."""


def with_expert_adapters(model: PreTrainedModel) -> nn.Module:
    """Adapters of rank 4 on both projections of every expert, their B random."""
    targets = expertune.get_target_parameters(model)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets))
    randomize_lora_b(adapted)
    return adapted


@dataclass(frozen=True)
class Pass:
    """One forward and backward: what came out, and how the experts were computed."""

    output: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    expert_calls: int
    calls_of_ours: int
    folds: int


def run(architecture: Architecture, model: nn.Module) -> Pass:
    """Forward and backward on two sequences of 24 random tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (2, 24), generator=generator)
    labels = {"labels": ids} if architecture.level == "causal LM" else {}
    inputs = {"input_ids": ids}
    if architecture.experts_name == "Qwen3OmniMoeTalkerTextExperts":  # it embeds nothing by itself
        inputs = {"inputs_embeds": torch.randn(*ids.shape, SIZES["hidden_size"], generator=generator)}
    model.zero_grad()
    torch.manual_seed(0)  # for routers that are noisy in training
    with _counting(model) as counts:
        result = model(**inputs, use_cache=False, **labels)
        output = result.logits if "logits" in result else result.last_hidden_state
        loss = result.loss if labels else _distance(output, generator)
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Pass(output.detach(), loss.detach(), gradients, **counts)


def _distance(output: Tensor, generator: torch.Generator) -> Tensor:
    """A loss for models without one: no sum that cancels, every element with a gradient of its own."""
    return (output - torch.randn(output.shape, generator=generator)).square().mean()


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[str, Any]]:
    counts: dict[str, Any] = {}
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for module in model.modules()
        if is_experts_module(module)
    ]
    with (
        patch.object(our_experts, "run_build_plan", wraps=our_experts.run_build_plan) as plan,
        patch.object(parametrize, "register_parametrization", wraps=parametrize.register_parametrization) as fold,
    ):
        yield counts
    for hook in hooks:
        hook.remove()
    counts |= {"expert_calls": len(calls), "calls_of_ours": plan.call_count}
    counts |= {"folds": fold.call_count}


@dataclass(frozen=True)
class Parity:
    """The largest errors of our pass against that of eager, and the gradient that has it."""

    output: float
    gradient: float
    worst: str

    @property
    def largest(self) -> float:
        return max(self.output, self.gradient)


def compare(got: Pass, want: Pass) -> Parity:
    """Raises AssertionError where gradients exist on one side only."""
    assert got.gradients.keys() == want.gradients.keys()
    floor = GRADIENT_FLOOR * max(gradient.norm().item() for gradient in want.gradients.values())
    errors = {name: _error(got.gradients[name], gradient, floor) for name, gradient in want.gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    output = max(relative_error(got.output, want.output), relative_error(got.loss, want.loss))
    return Parity(output, errors[worst], worst)


def _error(got: Tensor, want: Tensor, floor: float) -> float:
    error, norm = relative_error(got, want), want.norm().item()
    return error * norm / floor if 0 < norm < floor else error


def parity(architecture: Architecture, *, adapters: bool) -> tuple[Parity, Pass, Pass]:
    """Run a model on `expertune` and the same one on `eager`; with adapters, the latter is PEFT's own fold."""
    model: nn.Module = build(architecture, "expertune")
    base = model
    if adapters:
        model = with_expert_adapters(model)
    ours = run(architecture, model)
    base.set_experts_implementation("eager")
    theirs = run(architecture, model)
    return compare(ours, theirs), ours, theirs


def gate_of(experts: nn.Module) -> str:
    """What is computed between the projections, in words, and what else is the module's own."""
    activation = type(experts.act_fn).__name__ if hasattr(experts, "act_fn") else ""
    activation = getattr(experts.act_fn, "__name__", activation) if activation == "function" else activation
    if not experts.has_gate:
        words = f"no gate, {activation}"
    elif activation_of(experts) is SWIGLU:
        words = "SwiGLU"
    elif type(experts)._apply_gate.__name__ == "_default_apply_gate":
        words = f"{activation} gate"
    else:
        words = "the module's own function"
    more = [
        words
        for flag, words in {"has_bias": "bias", "is_transposed": "transposed", "has_post_expert_norm": "norm"}.items()
        if getattr(experts, flag, False)
    ]
    return "; ".join([words, *more])


@dataclass(frozen=True)
class Row:
    """A line of the table: an architecture and its errors, or why there are none."""

    architecture: Architecture
    gate: str = ""
    plain: Parity | None = None
    adapted: Parity | None = None
    problem: str | None = None


def measure(architecture: Architecture) -> Row:
    """Compare one architecture both ways; whatever goes wrong becomes the row's problem."""
    if architecture.experts_name in EXCEPTIONS:
        return Row(architecture, problem=EXCEPTIONS[architecture.experts_name])
    try:
        model = build(architecture, "expertune")
        gate = gate_of(next(module for module in model.modules() if type(module) is architecture.experts_class))
        plain, adapted = (check_parity(architecture, adapters=adapters) for adapters in (False, True))
    except Exception as error:
        return Row(architecture, problem=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return Row(architecture, gate, plain, adapted)


def check_parity(architecture: Architecture, *, adapters: bool) -> Parity:
    """Raise AssertionError unless our pass ran on our backend, without a fold, and agrees with the other."""
    errors, ours, theirs = parity(architecture, adapters=adapters)
    assert ours.calls_of_ours == ours.expert_calls == theirs.expert_calls > 0
    assert theirs.calls_of_ours == 0
    assert ours.folds == 0
    assert (theirs.folds > 0) is adapters
    assert errors.output <= OUTPUT_TOLERANCE, errors
    assert errors.gradient <= GRADIENT_TOLERANCE, errors
    return errors


TABLE_HEAD = "| folder | experts | run as | between the projections | without adapters | with adapters |"


def write_table(path: Path) -> None:
    """Measure every architecture and write the page."""
    rows = [measure(architecture) for architecture in architectures()]
    passed = [row for row in rows if row.problem is None]
    excepted = [row for row in rows if row.problem is not None]
    folders = {row.architecture.folder for row in rows}
    lines = [
        "# Architectures",
        "",
        "Every model of Transformers whose experts class carries the experts decorator, as a tiny random model in fp32",
        'on the CPU: `experts_implementation="expertune"` beside `eager`. Without adapters all weights train; with',
        "adapters of rank 4 on both projections the other side is PEFT's own fold. An error is the largest relative",
        f"error (L2 norm) of the output, the loss and every gradient. Allowed are {OUTPUT_TOLERANCE:.0e} for output",
        f"and loss and {GRADIENT_TOLERANCE:.0e} for a gradient: where sums cancel, eager is as far from fp64.",
        "",
        "A gate that our kernels do not know by heart is the module's own function between two grouped products.",
        "",
        "The test `tests/integrations/test_every_architecture.py` finds the classes in the installed Transformers.",
        "`python -m tests.integrations.parity docs/architectures.md` writes this page.",
        "",
        f"Transformers {transformers.__version__}: {len(folders)} folders with {len(rows)} experts classes found, "
        f"{len(passed)} passed, {len(excepted)} excepted.",
        "",
        TABLE_HEAD,
        "| --- | --- | --- | --- | ---: | ---: |",
        *(
            f"| {row.architecture.folder} | {row.architecture.experts_name} | {row.architecture.level} | {row.gate} "
            f"| {row.plain.largest:.0e} | {row.adapted.largest:.0e} |"
            for row in passed
            if row.plain and row.adapted
        ),
        "",
        "## Exceptions",
        "",
        *(
            [f"- {row.architecture.folder}, {row.architecture.experts_name}: {row.problem}" for row in excepted]
            or ["None."]
        ),
        "",
        "## Refused",
        "",
        "These folders have experts outside of the interface. `experts_implementation` set to one of our names is an",
        "error when such a model is loaded or built; without it they work as they do without expertune.",
        "",
        *(f"- {folder}: {name}" for folder, name in outsiders().items()),
        "",
        "A model without experts is loaded with a warning: there the name changes nothing.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
