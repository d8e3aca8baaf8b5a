"""Lengths and masks, held against what SFTTrainer itself makes of the same rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

from expertune.errors import DataError
from expertune.train.data import (
    CHATML,
    CHATML_TOKENS,
    Rows,
    SourceSpec,
    assistant_mask_support,
    check_lengths,
    load_data,
    loss_plan,
)

NO_MARKERS = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the two of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=CHATML_TOKENS[1], pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": [CHATML_TOKENS[0]]})
    made.chat_template = CHATML
    return made


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows_from(folder: Path, *rows: dict[str, Any]) -> Rows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data([SourceSpec(str(path))], seed=0, folder=folder / "cache").train


def masked_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return tokenizer.decode([i for i, on in zip(out["input_ids"], out["assistant_masks"], strict=True) if on])


def test_chatml_renders_and_marks_what_the_model_writes(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat(" Why? ", "Because.\n")["messages"]]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Why? <|im_end|>\n"
        "<|im_start|>assistant\nBecause.\n<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith(" Why? <|im_end|>\n<|im_start|>assistant\n")
    assert masked_text(tokenizer, messages) == "Because.\n<|im_end|>"


def test_mask_support(tokenizer: Any) -> None:
    support = assistant_mask_support(tokenizer)
    assert (support.how, support.end_trained, support.template) == ("marked", True, CHATML)
    tokenizer.chat_template = qwen3_chat_template
    support = assistant_mask_support(tokenizer)
    assert support.how == "trl_variant"
    assert support.template != qwen3_chat_template
    tokenizer.chat_template = NO_MARKERS
    assert "no {% generation %} markers" in assistant_mask_support(tokenizer).reason
    tokenizer.chat_template = NO_MARKERS + "{% generation %}{% endgeneration %}"
    assert "mark no token" in assistant_mask_support(tokenizer).reason
    tokenizer.chat_template = CHATML + "{{ raise_exception('never') }}"
    assert "fails on a plain chat: never" in assistant_mask_support(tokenizer).reason
    tokenizer.chat_template = None
    assert "has no chat template" in assistant_mask_support(tokenizer).reason
    tokenizer.chat_template = {"default": CHATML, "tool_use": NO_MARKERS}
    assert assistant_mask_support(tokenizer).how == "marked"


def test_loss_plans(tokenizer: Any) -> None:
    plans = {
        (shape, inputs): loss_plan(shape, tokenizer, train_on_inputs=inputs)
        for shape in ("chat", "prompt_completion_messages", "prompt_completion_strings", "text")
        for inputs in (False, True)
    }
    asked = {key: (plan.assistant_only_loss, plan.completion_only_loss) for key, plan in plans.items()}
    assert asked == {
        ("chat", False): (True, False),
        ("chat", True): (False, False),
        ("prompt_completion_messages", False): (False, True),
        ("prompt_completion_messages", True): (False, False),
        ("prompt_completion_strings", False): (False, True),
        ("prompt_completion_strings", True): (False, False),
        ("text", False): (False, False),
        ("text", True): (False, False),
    }
    assert plans["text", False].notes
    assert not plans["text", True].notes


def test_loss_plan_refuses_with_ways_out(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_MARKERS
    with pytest.raises(
        DataError, match=r"(?s)no \{% generation %\}.*chatml.*chat_template_jinja.*train_on_inputs: true"
    ):
        loss_plan("chat", tokenizer, train_on_inputs=False)
    assert loss_plan("chat", tokenizer, train_on_inputs=True).chat_template == NO_MARKERS
    tokenizer.chat_template = None
    for inputs in (True, False):
        with pytest.raises(DataError, match="chat_template: chatml"):
            loss_plan("chat", tokenizer, train_on_inputs=inputs)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        loss_plan("text", tokenizer, train_on_inputs=False)


def test_loss_plan_says_when_the_end_is_not_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace(
        "+ '<|im_end|>' }}{%- endgeneration %}", "}}{%- endgeneration %}{{- '<|im_end|>' }}"
    )
    (note,) = loss_plan("chat", tokenizer, train_on_inputs=False).notes
    assert "may not learn to stop" in note


ROWS_BY_SHAPE = {
    "chat": [chat("a" * n, "b" * (40 - n)) for n in (1, 9, 30)],
    "prompt_completion_messages": [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
        for row in (chat("a", "b"), chat("a" * 30, "b" * 5))
    ],
    "prompt_completion_strings": [{"prompt": "abc ", "completion": "de"}, {"prompt": "a" * 70, "completion": "b"}],
    "text": [{"text": "abc"}, {"text": "a" * 64}, {"text": "ab<|im_end|>"}],
}


@pytest.mark.parametrize("shape", ROWS_BY_SHAPE)
@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_counts_are_those_of_sft_trainer(shape: str, train_on_inputs: bool, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = rows_from(tmp_path, *ROWS_BY_SHAPE[shape])
    assert rows.shape == shape
    plan = loss_plan(rows.shape, tokenizer, train_on_inputs=train_on_inputs)
    limit = 64
    kept, report = check_lengths(rows, tokenizer, plan, sequence_len=limit, strategy="truncate")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer = SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), max_length=limit, report_to="none", bf16=False, use_cpu=True,
            **plan.sft_options(),
        ),
        train_dataset=rows.dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    prepared = list(trainer.train_dataset)
    assert len(prepared) == len(kept) == report.num_rows
    assert sum(len(row["input_ids"]) for row in prepared) == report.num_tokens
    if not train_on_inputs and shape != "text":
        assert any(label == -100 for row in prepared for label in row["labels"])


def test_too_long_is_refused_with_places_counts_and_ways_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_from(tmp_path, {"text": "short"}, {"text": "x" * 30}, {"text": "y" * 99})
    plan = loss_plan("text", tokenizer, train_on_inputs=True)
    with pytest.raises(DataError) as caught:
        check_lengths(rows, tokenizer, plan, sequence_len=20)
    message = str(caught.value)
    assert "2 rows of 3 longer than sequence_len 20" in message
    assert "rows.jsonl:2: 31 tokens" in message
    assert "rows.jsonl:3: 100 tokens" in message
    for way_out in ("sequence_len: 100", "excess_length_strategy: truncate", "excess_length_strategy: drop"):
        assert way_out in message
    same, report = check_lengths(rows, tokenizer, plan, sequence_len=100)
    assert same is rows
    assert report.longest_tokens == 100
    assert report.num_tokens == 6 + 31 + 100


def test_drop_and_truncate_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_from(tmp_path, chat("a", "b"), chat("a" * 80, "b"), chat("a", "b" * 80), chat("c", "d"))
    plan = loss_plan("chat", tokenizer, train_on_inputs=False)
    kept, report = check_lengths(rows, tokenizer, plan, sequence_len=60, strategy="drop")
    assert [kept.where(index)[-1] for index in range(len(kept))] == ["1", "4"]
    assert (report.num_dropped, report.num_truncated, report.num_untrained) == (2, 0, 0)
    assert "2 rows longer than sequence_len 60 dropped" in "\n".join(report.lines())
    kept, report = check_lengths(rows, tokenizer, plan, sequence_len=60, strategy="truncate")
    assert [kept.where(index)[-1] for index in range(len(kept))] == ["1", "3", "4"]
    assert (report.num_dropped, report.num_truncated, report.num_untrained) == (0, 1, 1)
    assert "1 row left out: no trained token in the first 60" in "\n".join(report.lines())
    with pytest.raises(DataError, match="no row is left"):
        check_lengths(rows, tokenizer, plan, sequence_len=3, strategy="drop")


def test_rows_the_template_refuses_are_named(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
    )
    rows = rows_from(tmp_path, chat("good", "x"), chat("bad", "x"), chat("good", "y"))
    plan = loss_plan("chat", tokenizer, train_on_inputs=False)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: cannot be rendered .*roles must alternate"):
        check_lengths(rows, tokenizer, plan, sequence_len=100)
    kept, report = check_lengths(rows, tokenizer, plan, sequence_len=100, skip_bad_rows=True)
    assert (len(kept), report.num_skipped) == (2, 1)


def test_rows_in_which_nothing_is_marked_are_named(tokenizer: Any, tmp_path: Path) -> None:
    marked_rarely = CHATML.replace("message['role'] == 'assistant'", "message['content'] in ('two', 'four')")
    tokenizer.chat_template = marked_rarely
    rows = rows_from(tmp_path, chat("q", "two"), chat("q", "x"))
    plan = loss_plan("chat", tokenizer, train_on_inputs=False)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no token of it would be trained"):
        check_lengths(rows, tokenizer, plan, sequence_len=100)
