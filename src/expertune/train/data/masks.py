"""Which tokens the loss counts, said in TRL's own options, and whether a chat template can tell them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from expertune.errors import DataError
from expertune.train.data.spec import Shape

_PROBE = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
)


@dataclass(frozen=True)
class MaskSupport:
    """Whether the assistant's tokens can be told apart in a rendered chat.

    how: the template marks them itself; TRL swaps in its training variant of a template it knows; or not at all.
    template: the template TRL will tokenise with. end_trained: the end-of-turn token is among the marked ones, so the
    model learns to stop. reason: why not, when how is "none".
    """

    how: Literal["marked", "trl_variant", "none"]
    template: str | None = None
    end_trained: bool = False
    reason: str = ""


@dataclass(frozen=True)
class LossPlan:
    """How `train_on_inputs` is carried out.

    shape: the rows it is for. assistant_only_loss, completion_only_loss: SFTConfig's. chat_template: what TRL will
    render chats with, None for rows without one. notes: what a person should know.
    """

    shape: Shape
    assistant_only_loss: bool
    completion_only_loss: bool
    chat_template: str | None
    notes: tuple[str, ...] = ()

    def sft_options(self) -> dict[str, Any]:
        """Keyword arguments for trl.SFTConfig."""
        return {
            "assistant_only_loss": self.assistant_only_loss,
            "completion_only_loss": self.completion_only_loss,
            "dataset_text_field": "text",
        }


def assistant_mask_support(tokenizer: Any) -> MaskSupport:
    """Follows SFTTrainer: a template with {% generation %} markers is used, else TRL's variant of a known template.

    Either is tried on a short chat, so a template whose markers mark nothing does not pass.
    """
    from trl.chat_template_utils import (
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_stop_token_trained,
    )

    template = default_template(tokenizer)
    if template is None:
        return MaskSupport("none", reason="the tokenizer has no chat template")
    how: Literal["marked", "trl_variant"] = "marked"
    if not has_generation_markers(template):
        how = "trl_variant"
        try:
            template = get_training_chat_template(tokenizer)
        except Exception:  # ValueError for a template it does not know; whatever jinja raises while it probes one
            template = None
        if template is None:
            return MaskSupport(
                "none",
                reason="its chat template has no {% generation %} markers and is none that TRL has a marked variant of",
            )
    try:
        rendered = tokenizer.apply_chat_template(
            list(_PROBE), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=template
        )
    except Exception as error:  # a template is a program: it can fail in any way
        return MaskSupport("none", template, reason=f"its chat template fails on a plain chat: {error}")
    if 1 not in rendered["assistant_masks"]:
        return MaskSupport("none", template, reason="the {% generation %} markers of its chat template mark no token")
    return MaskSupport(how, template, is_chat_template_stop_token_trained(tokenizer, chat_template=template))


def default_template(tokenizer: Any) -> str | None:
    """The template a plain chat is rendered with, also where the tokenizer has several by name."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def loss_plan(shape: Shape, tokenizer: Any, *, train_on_inputs: bool) -> LossPlan:
    """Puts `train_on_inputs` into TRL's options for one shape of rows.

    text: every token counts, always. prompt/completion: the completion counts, or both. chat: the assistant's turns
    count, as the template marks them, or everything. Raises DataError when the template cannot do it.
    """
    if shape in ("text", "prompt_completion_strings") and not tokenizer.eos_token:
        raise DataError("the tokenizer has no eos token, which ends every text: set special_tokens: {eos_token: …}")
    match shape:
        case "text":
            note = "plain text has no inputs: every token is trained"
            return LossPlan(shape, False, False, None, () if train_on_inputs else (note,))
        case "prompt_completion_strings":
            return LossPlan(shape, False, not train_on_inputs, None)
        case "prompt_completion_messages":
            return LossPlan(shape, False, not train_on_inputs, _required_template(tokenizer))
    if train_on_inputs:
        return LossPlan(shape, False, False, _required_template(tokenizer))
    support = assistant_mask_support(tokenizer)
    if support.how == "none":
        raise DataError(
            f"train_on_inputs: false needs to know the assistant's tokens, but for this tokenizer that fails: "
            f"{support.reason}.\nWays out: chat_template: chatml; a template with {{% generation %}} … "
            "{% endgeneration %} around the assistant's turn, as chat_template_jinja; or train_on_inputs: true, which "
            "trains on every turn."
        )
    notes = []
    if support.how == "trl_variant":
        notes.append("chats are rendered with TRL's training variant of this model's chat template")
    if not support.end_trained:
        notes.append(
            "the chat template leaves the end-of-turn token out of the loss, or the tokenizer has no single token for "
            "it: the model may not learn to stop"
        )
    return LossPlan(shape, True, False, support.template, tuple(notes))


def _required_template(tokenizer: Any) -> str:
    template = default_template(tokenizer)
    if template is None:
        raise DataError(
            "the data are chats, but the tokenizer has no chat template. "
            "Ways out: chat_template: chatml, or a template of your own as chat_template_jinja."
        )
    return template
