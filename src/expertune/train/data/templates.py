"""Text templates that ship with expertune."""

from __future__ import annotations

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
"""The two tokens a tokenizer needs for CHATML to end a turn in one token."""

# ChatML: every turn is <|im_start|>role, a newline, the content, <|im_end|>, a newline. The generation markers enclose
# what the model writes: the content and its end-of-turn token, not the header before and not the newline after.
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}"
    "{{- message['content'] + '<|im_end|>' }}"
    "{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def alpaca_prompt(instruction: str, context: str) -> str:
    """The prompt of the Alpaca data (Taori et al., Stanford Alpaca, 2023, https://github.com/tatsu-lab/stanford_alpaca).

    Two wordings: with an input and without. The completion follows on the line after `### Response:`.
    """
    if context.strip():
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )
