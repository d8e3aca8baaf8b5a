"""Every row's length in tokens and trained tokens, before training starts, counted as SFTTrainer will tokenise it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from expertune.errors import DataError
from expertune.train.data.masks import LossPlan
from expertune.train.data.problems import ProblemLog, rows_word
from expertune.train.data.store import Rows

Strategy = Literal["raise", "truncate", "drop"]
BATCH_ROWS = 256
SHOWN_LONG_ROWS = 10


@dataclass(frozen=True)
class LengthReport:
    """Counts of check_lengths.

    num_tokens: of the rows that are kept, at most sequence_len of each. longest_tokens: of the longest row before
    anything is cut. num_untrained: rows that are left out because cutting leaves no token the loss counts.
    """

    sequence_len: int
    strategy: Strategy
    num_rows: int
    num_tokens: int
    longest_tokens: int
    num_too_long: int
    num_dropped: int
    num_truncated: int
    num_untrained: int
    num_skipped: int
    examples: tuple[str, ...]
    skipped: tuple[str, ...]

    def lines(self) -> list[str]:
        lines = [f"{rows_word(self.num_rows)}, {self.num_tokens} tokens; the longest row has {self.longest_tokens}"]
        if self.num_dropped:
            lines.append(f"{rows_word(self.num_dropped)} longer than sequence_len {self.sequence_len} dropped")
        if self.num_truncated:
            lines.append(f"{rows_word(self.num_truncated)} cut to the first {self.sequence_len} tokens")
        if self.num_untrained:
            lines.append(f"{rows_word(self.num_untrained)} left out: no trained token in the first {self.sequence_len}")
        lines += [f"  {line}" for line in self.examples]
        if self.num_skipped:
            lines.append(f"bad rows skipped: {self.num_skipped}")
            lines += [f"  {line}" for line in self.skipped]
        return lines


@dataclass(frozen=True)
class _Measure:
    """One row: its tokens, and how many of the first sequence_len of them the loss counts."""

    num_tokens: int
    num_trained: int


def check_lengths(
    rows: Rows,
    tokenizer: Any,
    plan: LossPlan,
    *,
    sequence_len: int,
    strategy: Strategy = "raise",
    skip_bad_rows: bool = False,
) -> tuple[Rows, LengthReport]:
    """The rows to train on, and what was left out.

    strategy, for rows longer than sequence_len: `raise` a DataError that names them; `drop` them; `truncate` leaves
    them to SFTTrainer (max_length=sequence_len), but leaves out those with no trained token in what remains.
    skip_bad_rows: leave out rows the chat template refuses or marks nothing in, instead of a DataError.
    """
    problems, kept = ProblemLog(), []
    long_rows: list[tuple[int, int]] = []
    num_tokens = longest = num_untrained = num_cut = num_long = 0
    for index, measure in enumerate(_measures(rows, tokenizer, plan, sequence_len)):
        if isinstance(measure, str):
            problems.add(rows.where(index), measure)
            continue
        longest = max(longest, measure.num_tokens)
        if measure.num_tokens > sequence_len:
            num_long += 1
            if len(long_rows) < SHOWN_LONG_ROWS:
                long_rows.append((index, measure.num_tokens))
            if strategy != "truncate":
                continue
            if not measure.num_trained:
                num_untrained += 1
                continue
            num_cut += 1
        elif not measure.num_trained:
            problems.add(rows.where(index), "no token of it would be trained: the chat template marks none")
            continue
        kept.append(index)
        num_tokens += min(measure.num_tokens, sequence_len)
    examples = [f"{rows.where(index)}: {tokens} tokens" for index, tokens in long_rows]
    if num_long > len(examples):
        examples.append(f"and {num_long - len(examples)} more")
    if problems.count and not skip_bad_rows:
        raise DataError(
            f"{rows_word(problems.count)} cannot be tokenised for training:\n{problems.text()}\n"
            "Mend them, or set skip_bad_rows: true to leave them out."
        )
    if num_long and strategy == "raise":
        listed = "\n".join(f"  {line}" for line in examples)
        raise DataError(
            f"{rows_word(num_long)} of {len(rows)} longer than sequence_len {sequence_len}:\n{listed}\n"
            f"Ways out: sequence_len: {longest}; excess_length_strategy: truncate (keeps the first {sequence_len} "
            "tokens); excess_length_strategy: drop (leaves the rows out)."
        )
    if not kept:
        raise DataError(
            f"no row is left to train on: of {len(rows)}, {num_long} are longer than sequence_len {sequence_len} "
            f"(the longest has {longest} tokens) and {problems.count} are bad"
        )
    report = LengthReport(
        sequence_len=sequence_len,
        strategy=strategy,
        num_rows=len(kept),
        num_tokens=num_tokens,
        longest_tokens=longest,
        num_too_long=num_long,
        num_dropped=num_long if strategy == "drop" else 0,
        num_truncated=num_cut,
        num_untrained=num_untrained,
        num_skipped=problems.count,
        examples=tuple(examples),
        skipped=tuple(problems.lines()),
    )
    return (rows if len(kept) == len(rows) else rows.select(kept)), report


def _measures(rows: Rows, tokenizer: Any, plan: LossPlan, sequence_len: int) -> Iterator[_Measure | str]:
    """One measure a row, in order, or why the row cannot be rendered."""
    for batch in rows.dataset.iter(batch_size=BATCH_ROWS):
        try:
            yield from _measure(batch, tokenizer, plan, sequence_len)
        except Exception:  # a template refuses chats by raising anything: find which rows it was
            for index in range(len(next(iter(batch.values())))):
                one = {name: cells[index : index + 1] for name, cells in batch.items()}
                try:
                    yield from _measure(one, tokenizer, plan, sequence_len)
                except Exception as error:
                    yield f"cannot be rendered and tokenised: {error}"


def _measure(batch: dict[str, list[Any]], tokenizer: Any, plan: LossPlan, sequence_len: int) -> list[_Measure]:
    """Token counts of a batch as in SFTTrainer's preparation: the eos it appends, the mask it builds."""
    match plan.shape:
        case "text":
            counts = [len(ids) for ids in _encode(tokenizer, [_ended(text, tokenizer) for text in batch["text"]])]
            return [_Measure(count, min(count, sequence_len)) for count in counts]
        case "chat":
            rendered = _render(
                batch["messages"], tokenizer, plan, return_assistant_tokens_mask=plan.assistant_only_loss
            )
            counts = [len(ids) for ids in rendered["input_ids"]]
            if not plan.assistant_only_loss:
                return [_Measure(count, min(count, sequence_len)) for count in counts]
            trained = [sum(mask[:sequence_len]) for mask in rendered["assistant_masks"]]
            return [_Measure(*pair) for pair in zip(counts, trained, strict=True)]
        case "prompt_completion_strings":
            prompts = _encode(tokenizer, batch["prompt"])
            pairs = zip(batch["prompt"], batch["completion"], strict=True)
            wholes = _encode(tokenizer, [prompt + _ended(completion, tokenizer) for prompt, completion in pairs])
        case "prompt_completion_messages":
            prompts = _render(batch["prompt"], tokenizer, plan, add_generation_prompt=True)["input_ids"]
            chats = [prompt + answer for prompt, answer in zip(batch["prompt"], batch["completion"], strict=True)]
            wholes = _render(chats, tokenizer, plan)["input_ids"]
    measures = []
    for prompt_ids, ids in zip(prompts, wholes, strict=True):
        first = _common_prefix(prompt_ids, ids) if plan.completion_only_loss else 0
        measures.append(_Measure(len(ids), max(0, min(len(ids), sequence_len) - first)))
    return measures


def _render(chats: list[Any], tokenizer: Any, plan: LossPlan, **options: bool) -> Any:
    return tokenizer.apply_chat_template(
        chats, tokenize=True, return_dict=True, chat_template=plan.chat_template, **options
    )


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(text=texts)["input_ids"])


def _ended(text: str, tokenizer: Any) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _common_prefix(ids: list[int], others: list[int]) -> int:
    for length, (a, b) in enumerate(zip(ids, others, strict=False)):
        if a != b:
            return length
    return min(len(ids), len(others))
