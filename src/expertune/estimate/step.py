"""One training step on paper: forward, loss and backward of a model without data, every allocation in a ledger."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.hooks import RemovableHandle

from expertune.errors import ExpertuneError
from expertune.estimate.experts import GroupedProducts, experts_on_paper
from expertune.estimate.ledger import EXPERT_GRADIENTS, HEAD, OTHER_GRADIENTS, Ledger, Moment
from expertune.estimate.model import expert_prefixes, is_of_experts, num_experts_of, put_on_paper
from expertune.estimate.stand_ins import attention_on_paper, fused_loss_on_paper
from expertune.layers.backends import AUTO, SCATTERMOE

Rows = Literal["full", "padded", "packed"]
"""full: every row has every token. padded: rows of different lengths, so attention gets a mask. packed: one long row
with a mask between the texts in it, which flash attention does without."""


@dataclass(frozen=True)
class Step:
    """What the activations of a step depend on, beside the model.

    batch_size, sequence_len: rows and tokens of one forward on one GPU. dtype: of products. backend: of the experts.
    checkpointing, reentrant: gradient checkpointing, and its older form. rows: see `Rows`. expert_parallel:
    processes that share the experts. accumulates: whether gradients of an earlier forward are there already.
    balance_coefficient: of the routers' auxiliary loss; None: the model's own.
    """

    batch_size: int
    sequence_len: int
    dtype: torch.dtype
    backend: str = SCATTERMOE
    checkpointing: bool = False
    reentrant: bool = False
    rows: Rows = "full"
    expert_parallel: int = 1
    accumulates: bool = False
    balance_coefficient: float | None = None


@dataclass(frozen=True)
class Course:
    """How a step went. moments: bytes by kind at every moment that may be the peak. after_forward: when it is over."""

    moments: tuple[Moment, ...]
    after_forward: Moment

    @property
    def peak(self) -> Moment:
        """The moment with most bytes."""
        return max(self.moments, key=lambda moment: sum(moment.values()))


class Paper:
    """A model on paper, whose steps can be run. The model is changed in place: its parameters become fake."""

    def __init__(self, model: PeftModel) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = model
        put_on_paper(model, self.mode)
        self._prefixes = expert_prefixes(model)

    def run(self, step: Step) -> Course:
        """Run one step: two passes if gradients accumulate.

        Raises ExpertuneError if the model's own code asks for values of tensors, which are not there.
        """
        ledger = Ledger()
        embedding_hooks = self.model.get_input_embeddings()._forward_hooks
        hooks_before = set(embedding_hooks)
        hooks: list[RemovableHandle] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                kind = EXPERT_GRADIENTS if is_of_experts(name, self._prefixes) else OTHER_GRADIENTS
                hooks.append(ledger.mark_gradient(parameter, kind))
        try:
            with warnings.catch_warnings(), self.mode, GroupedProducts(), _stand_ins(ledger, step):
                warnings.simplefilter("ignore")  # deprecations of Transformers, torch_grouped's look at addresses
                _set_checkpointing(self.model, step, ledger)
                with ledger:
                    for _ in range(2 if step.accumulates else 1):
                        after_forward = _pass(self.model, step, ledger)
                for parameter in self.model.parameters():
                    parameter.grad = None
        except Exception as error:  # whatever a model's code makes of tensors without data
            line = next(iter(str(error).splitlines()), "")
            raise ExpertuneError(
                f"{type(self.model.get_base_model()).__name__}: its step cannot be run on tensors without data "
                f"({type(error).__name__}: {line}); its memory is not estimated"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            for key in set(embedding_hooks) - hooks_before:  # Transformers adds several and removes one
                del embedding_hooks[key]
        return Course(tuple(ledger.moments), after_forward)


def _pass(model: PeftModel, step: Step, ledger: Ledger) -> Moment:
    """Forward, loss and backward. Returns what was alive between them."""
    inputs = _inputs(step)
    autocast = nullcontext() if step.dtype == torch.float32 else torch.autocast("cpu", step.dtype)
    ledger.in_backward = False
    with autocast:
        loss = _loss(model, step, inputs, ledger)
    after_forward = {kind: size for kind, size in ledger.alive.items() if size}
    ledger.in_backward = True
    loss.backward()
    return after_forward


def _inputs(step: Step) -> dict[str, Tensor]:
    if step.rows == "packed":
        ids = torch.zeros(1, step.batch_size * step.sequence_len, dtype=torch.int64)
        return {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
    ids = torch.zeros(step.batch_size, step.sequence_len, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _loss(model: PeftModel, step: Step, inputs: dict[str, Tensor], ledger: Ledger) -> Tensor:
    """As TRL's fused forward computes it: backbone, LM head in tiles, the routers' loss."""
    causal = model.get_base_model()
    text_config = causal.config.get_text_config()
    coefficient = step.balance_coefficient
    if coefficient is None:
        coefficient = getattr(text_config, "router_aux_loss_coef", 0.0)
    balanced = hasattr(text_config, "output_router_logits") and bool(coefficient)
    options = {"output_router_logits": True} if balanced else {}
    out = causal.base_model(**inputs, use_cache=False, **options)
    loss = fused_loss_on_paper(ledger, out.last_hidden_state, causal.get_output_embeddings())
    if balanced and getattr(out, "router_logits", None):
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        with ledger.scope(HEAD):
            mask = torch.ones_like(inputs["input_ids"])  # without one 5.17 counts by bincount, of unknown shape
            balance = load_balancing_loss_func(
                out.router_logits, num_experts_of(model), text_config.num_experts_per_tok, mask
            )
            loss = loss + coefficient * balance
    return loss


def _set_checkpointing(model: PeftModel, step: Step, ledger: Ledger) -> None:
    model.train()
    model.gradient_checkpointing_disable()
    if not step.checkpointing:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": step.reentrant})
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = partial(_checkpoint, ledger, module._gradient_checkpointing_func)
    model.enable_input_require_grads()  # as TRL does


def _checkpoint(ledger: Ledger, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """The same, telling the ledger when the function runs again."""

    def run(*inputs: Any) -> Any:
        with ledger.checkpointed():
            return function(*inputs)

    return checkpoint(run, *args)


@contextmanager
def _stand_ins(ledger: Ledger, step: Step) -> Iterator[None]:
    """Put ours into the registries of Transformers' modeling files, and take them out again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    places = [(ALL_EXPERTS_FUNCTIONS, AUTO), (ALL_ATTENTION_FUNCTIONS, "sdpa")]
    ALL_EXPERTS_FUNCTIONS[AUTO] = experts_on_paper(ledger, step.backend, expert_parallel=step.expert_parallel)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention_on_paper
    if step.rows == "full":  # Transformers looks at the values of a mask before it leaves one out; here are none
        places.append((ALL_MASK_ATTENTION_FUNCTIONS, "sdpa"))
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _without_mask(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        yield
    finally:
        for registry, name in places:
            del registry[name]


def _without_mask(make_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The same, but no mask where being causal is all: not in a shorter window, or beside another condition."""

    def make(*args: Any, **kwargs: Any) -> Tensor | None:
        window, length = kwargs.get("local_size"), kwargs.get("kv_length", 0)
        causal = kwargs.get("allow_is_causal_skip", True) and (window is None or length < window)
        return None if causal else make_mask(*args, **kwargs)

    return make
