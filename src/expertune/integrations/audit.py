"""Is a saved adapter whole, and which experts did training never reach?

Both are read from the file alone, after it is written: nothing is counted during training, so it costs no step.

PEFT starts every B at zero. An expert that no token is routed to has a gradient of exactly zero in every step, and
Adam, SGD, weight decay and clipping all leave an exact zero where it is. So B = 0 in all projections of an expert says
that it never received a token that the loss depends on. The limits: tokens behind the last trained one do not count
(they have no gradient either); an adapter that goes on from an earlier one tells of both runs together; an adapter that
started from a random B (`init_lora_weights=False`, pissa, olora, ...) tells nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertune.integrations.saved_adapter import SavedAdapter, SavedLora, open_adapter

_B_STARTS_AT_ZERO = (True, "gaussian", "eva")
_MAX_NAMED = 8


@dataclass(frozen=True)
class AdapterAudit:
    """What a saved adapter holds.

    problems: one line for each weight with an A or B that is missing, of another shape, all zeros (A only) or not
    finite, with the experts; empty is good. num_projections: adapted projections of experts. num_experts: adapted
    experts, summed over layers. without_token: by experts module, the experts that never received a token; None where
    the file cannot tell. half_trained: by projection, experts whose B is zero here though not in the other projection.
    """

    problems: list[str]
    num_projections: int
    num_experts: int
    without_token: dict[str, list[int]] | None
    half_trained: dict[str, list[int]]

    def in_words(self) -> list[str]:
        """The audit in a few lines: the first says whether all is well."""
        if self.problems:
            return self.problems
        if not self.num_projections:
            return ["no expert is adapted; every adapter is there and finite"]
        lines = [f"all {self.num_projections} expert projections have a finite A and B for every expert"]
        lines += [
            f"{name}: B is still zero for {_experts(ids)}, whose other projection learned"
            for name, ids in self.half_trained.items()
        ]
        if self.without_token is None:
            return [*lines, "which experts received no token cannot be told: B did not start at zero"]
        num_without = sum(map(len, self.without_token.values()))
        if num_without == 0:
            return [*lines, "every expert received a token"]
        if num_without == self.num_experts:
            return [*lines, f"no expert has learned anything: B is zero in all {self.num_experts}"]
        lines.append(f"{num_without} of {self.num_experts} experts never received a token:")
        lines += [f"  {name}: {_experts(ids)}" for name, ids in list(self.without_token.items())[:_MAX_NAMED]]
        if len(self.without_token) > _MAX_NAMED:
            lines.append(f"  and {len(self.without_token) - _MAX_NAMED} more layers")
        return lines


def audit_adapter(folder: str | Path, base_model: str | None = None) -> AdapterAudit:
    """Look at a saved adapter: is every A and B there and finite, and which experts never received a token?

    base_model: folder or hub id of the base model, of which only config.json is read; None: what the adapter names.
    """
    return audit(open_adapter(Path(folder), base_model))


def audit(adapter: SavedAdapter) -> AdapterAudit:
    """The same for an adapter that is read already."""
    problems = [line for lora in adapter.loras for line in _problems(lora)]
    problems += [
        f"{name} has values that are not finite"
        for name, tensor in adapter.rest.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    untouched: dict[str, dict[str, set[int]]] = {}
    num_experts: dict[str, int] = {}
    num_projections = 0
    for lora in adapter.loras:
        if not lora.is_experts:
            continue
        num_projections += 1
        num_experts[lora.module] = lora.num_experts
        if lora.b is not None and lora.b.shape == lora.shape_b:
            zero = ~_by_expert_b(lora, lora.b != 0).any(1)
            untouched.setdefault(lora.module, {})[lora.name] = set(torch.nonzero(zero).flatten().tolist())
    without = {module: sorted(set.intersection(*zero.values())) for module, zero in untouched.items()}
    tells = adapter.peft_config.init_lora_weights in _B_STARTS_AT_ZERO
    return AdapterAudit(
        problems=problems,
        num_projections=num_projections,
        num_experts=sum(num_experts.values()),
        without_token={module: ids for module, ids in without.items() if ids} if tells else None,
        half_trained={
            name: sorted(ids - set(without[module]))
            for module, zero in untouched.items()
            for name, ids in zero.items()
            if tells and ids - set(without[module])
        },
    )


def _problems(lora: SavedLora) -> list[str]:
    lines = []
    for what, tensor, shape in (("A", lora.a, lora.shape_a), ("B", lora.b, lora.shape_b)):
        if tensor is None:
            lines.append(f"{lora.name}: {what} is missing")
            continue
        if tensor.shape != shape:
            lines.append(f"{lora.name}: {what} is {list(tensor.shape)}; the base model needs {list(shape)}")
            continue
        split = _by_expert_a if what == "A" else _by_expert_b
        bad = ~split(lora, torch.isfinite(tensor)).all(1)
        if bool(bad.any()):
            lines.append(f"{lora.name}: {what} has values that are not finite{_of_experts(lora, bad)}")
        zero = ~split(lora, tensor != 0).any(1)
        if what == "A" and bool(zero.any()):
            lines.append(f"{lora.name}: A is all zeros{_of_experts(lora, zero)}, so it cannot learn")
    return lines


def _by_expert_a(lora: SavedLora, mask: Tensor) -> Tensor:
    return mask.reshape(lora.num_experts, -1)


def _by_expert_b(lora: SavedLora, mask: Tensor) -> Tensor:
    return mask.reshape(-1, lora.num_experts).T  # the expert index is the fastest one


def _of_experts(lora: SavedLora, chosen: Tensor) -> str:
    return f" in {_experts(torch.nonzero(chosen).flatten().tolist())}" if lora.is_experts else ""


def _experts(ids: Iterable[int]) -> str:
    named = list(ids)
    text = ", ".join(map(str, named[:_MAX_NAMED]))
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return f"expert {text}" if len(named) == 1 else f"experts {text}{more}"
