"""The instruction set: three tasks whose answers the standard library's own authors wrote.

    document   a function without its docstring       -> the first sentence of its docstring   (derivable)
    signature  a name and that first sentence          -> the `def` line                        (learnable)
    arguments  a function without its docstring        -> its parameters, separated by commas   (exact)

Held-out rows come from the held-out files, which pre-training has not seen either.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import corpus

MAX_ROW_TOKENS = 288
MAX_TRAIN_ROWS, MAX_HELD_OUT_ROWS = 4500, 300
MIN_ANSWER_WORDS, MAX_ANSWER_CHARS = 3, 200

PHRASES = {
    "document": [
        "Write the docstring's first sentence for this function:",
        "Document this Python function in one sentence:",
        "What does this function do? Answer in one sentence.",
        "Summarize this function in one sentence:",
    ],
    "signature": [
        "Write the def line of the function `{name}`: {sentence}",
        "Give the signature of `{name}`, described as: {sentence}",
    ],
    "arguments": [
        "List the parameters of this function, separated by commas:",
        "Which arguments does this function take? Name them in order.",
    ],
}


@dataclass(frozen=True)
class Row:
    """One question and answer, with where it comes from: `file` below the standard library, `name` in it."""

    task: str
    file: str
    name: str
    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def build_rows(
    sources: Iterable[corpus.SourceFile], count_tokens: Callable[[Row], int]
) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), deduplicated, in an order set by hashes.

    count_tokens: the length of a row in the chat format; a function's source is shortened until it is at most
    MAX_ROW_TOKENS. A held-out row is dropped when its answer (or for `arguments` its function) stands word for word in a
    training file: the library has copies of functions.
    """
    sources = list(sources)
    train_text = " ".join(_words("\n".join(source.text for source in sources if not source.held_out)))
    train, held_out = [], []
    seen_questions, seen_answers = set(), set()
    for source in sources:
        for row, body in _rows_of_file(source, count_tokens):
            answer_key = (row.task, row.name.rpartition(".")[2], row.answer)
            if row.question in seen_questions or answer_key in seen_answers:
                continue
            if source.held_out:
                evidence = row.answer if row.task == "document" else body
                if " ".join(_words(evidence)) in train_text:
                    continue
            seen_questions.add(row.question)
            seen_answers.add(answer_key)
            (held_out if source.held_out else train).append(row)
    return _shuffled(train)[:MAX_TRAIN_ROWS], _shuffled(held_out)[:MAX_HELD_OUT_ROWS]


def source_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> list[str]:
    """The lines of a function as its file has them, decorators and docstring left out, indentation removed."""
    lines = text.splitlines()
    first, docstring = function.lineno - 1, function.body[0]
    kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : function.end_lineno]
    indent = len(lines[first]) - len(lines[first].lstrip())
    return [line[indent:].rstrip() if not line[:indent].strip() else line.rstrip() for line in kept]


def first_sentence(docstring: str) -> str | None:
    """The first sentence of the first paragraph on one line, or None where it is trivial, too long or not plain text."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z0-9)'\"`\]]\.)\s", paragraph)[0]
    plain = sentence.isascii() and sentence.isprintable() and not sentence.startswith((">>>", "@", "-", "#"))
    if not plain or len(sentence) > MAX_ANSWER_CHARS or len(re.findall(r"[A-Za-z]{2,}", sentence)) < MIN_ANSWER_WORDS:
        return None
    # "S.count(sub) -> int" repeats the signature.
    return None if "->" in sentence or sentence.endswith(":") else sentence


def _rows_of_file(source: corpus.SourceFile, count_tokens: Callable[[Row], int]) -> Iterator[tuple[Row, str]]:
    """The rows of one file, each with the whole source of its function."""
    if source.is_test or "test" in source.path.rpartition("/")[2]:
        return
    for item in corpus.documented(source):
        if not isinstance(item.node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        sentence = first_sentence(item.docstring)
        lines = source_without_docstring(item.node, source.text)
        if sentence is None or len(lines) < 2 or not all(line.isascii() for line in lines):
            continue
        body = "\n".join(lines)
        choice = corpus.path_hash(f"{source.path}:{item.name}")
        row = _fitted("document", source, item.name, lines, sentence, choice, count_tokens)
        if row:
            yield row, body
        # Every third function gives a second row, so that `document` stays the main task.
        if choice % 3 == 0:
            row = _second_task(source, item, sentence, lines, choice, count_tokens)
            if row:
                yield row, body


def _second_task(
    source: corpus.SourceFile,
    item: corpus.Documented,
    sentence: str,
    lines: list[str],
    choice: int,
    count_tokens: Callable[[Row], int],
) -> Row | None:
    arguments = item.node.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    if (choice // 3) % 2 and len(names) > 1:
        return _fitted("arguments", source, item.name, lines, ", ".join(names), choice, count_tokens)
    keyword = "async def" if isinstance(item.node, ast.AsyncFunctionDef) else "def"
    phrase = _phrase("signature", choice).format(name=item.name, sentence=sentence)
    row = Row("signature", source.path, item.name, phrase, f"{keyword} {item.node.name}{item.signature}:")
    return row if row.answer.isascii() and count_tokens(row) <= MAX_ROW_TOKENS else None


def _fitted(
    task: str,
    source: corpus.SourceFile,
    name: str,
    lines: list[str],
    answer: str,
    choice: int,
    count_tokens: Callable[[Row], int],
) -> Row | None:
    """The row with as many of the function's lines as fit; None where not even its header and one line do."""
    phrase = _phrase(task, choice)

    def with_lines(kept: int) -> Row:
        code = "\n".join(lines if kept == len(lines) else [*lines[:kept], "    ..."])
        return Row(task, source.path, name, f"{phrase}\n\n{code.rstrip()}", answer)

    # Binary search: the number of tokens grows with the number of lines.
    low, high = 1, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens(with_lines(middle)) <= MAX_ROW_TOKENS else (low, middle - 1)
    return with_lines(low) if low > 1 and count_tokens(with_lines(low)) <= MAX_ROW_TOKENS else None


def _phrase(task: str, choice: int) -> str:
    return PHRASES[task][(choice // 6) % len(PHRASES[task])]


def _words(text: str) -> list[str]:
    return text.split()


def _shuffled(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: corpus.path_hash(f"{row.file}:{row.name}:{row.task}"))
