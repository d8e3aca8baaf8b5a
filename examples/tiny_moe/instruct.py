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


@dataclass(frozen=True)
class Function:
    """A documented function. lines: its source without the docstring. sentence: the docstring's first."""

    file: str
    name: str
    definition: str
    arguments: tuple[str, ...]
    lines: tuple[str, ...]
    sentence: str

    @property
    def choice(self) -> int:
        """Decides phrases and second tasks: the same on every machine."""
        return corpus.path_hash(f"{self.file}:{self.name}")


def build_rows(sources: Iterable[corpus.SourceFile], count_tokens: Callable[[Row], int]) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), deduplicated, in an order set by hashes.

    count_tokens: the length of a row in the chat format; a function's source is shortened until it is at most
    MAX_ROW_TOKENS. The library has copies of functions, so a held-out function gives no row when its sentence or its
    source without the docstring stands word for word in a training file.
    """
    split = {False: [], True: []}
    for source in sources:
        split[source.held_out].append(source)
    train_text = _one_line("\n".join(source.text for source in split[False]))
    train_functions = [function for source in split[False] for function in find_functions(source)]
    train_code = {_one_line("\n".join(function.lines)) for function in train_functions}
    held_out_functions = []
    for function in (function for source in split[True] for function in find_functions(source)):
        code = _one_line("\n".join(function.lines))
        if function.sentence not in train_text and code not in train_text and code not in train_code:
            held_out_functions.append(function)
    train = _unique_rows(train_functions, count_tokens)[:MAX_TRAIN_ROWS]
    return train, _unique_rows(held_out_functions, count_tokens)[:MAX_HELD_OUT_ROWS]


def find_functions(source: corpus.SourceFile) -> Iterator[Function]:
    """The functions of one file that rows are made of; none of a test suite's."""
    if source.is_test or "test" in source.path.rpartition("/")[2]:
        return
    for item in corpus.documented(source):
        if not isinstance(item.node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        sentence = first_sentence(item.docstring)
        lines = source_without_docstring(item.node, source.text)
        keyword = "async def" if isinstance(item.node, ast.AsyncFunctionDef) else "def"
        definition = f"{keyword} {item.node.name}{item.signature}:"
        if sentence and len(lines) > 1 and all(line.isascii() for line in [*lines, definition]):
            arguments = tuple(argument_names(item.node.args))
            yield Function(source.path, item.name, definition, arguments, tuple(lines), sentence)


def argument_names(arguments: ast.arguments) -> list[str]:
    """The parameters in order, `*args` and `**kwargs` with their stars."""
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def source_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> list[str]:
    """The lines of a function as its file has them, decorators and docstring left out, indentation removed."""
    lines = text.splitlines()
    first, docstring = function.lineno - 1, function.body[0]
    kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : function.end_lineno]
    indent = len(lines[first]) - len(lines[first].lstrip())
    return [line[indent:].rstrip() if not line[:indent].strip() else line.rstrip() for line in kept]


def first_sentence(docstring: str) -> str | None:
    """The first sentence of the first paragraph on one line; None where it is trivial, too long or not plain text."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    # A full stop before a small letter is an abbreviation's, as in "e.g. this".
    sentence = re.split(r"(?<=[a-z0-9)'\"`\]]\.)(?<!e\.g\.)(?<!i\.e\.)\s(?![a-z])", paragraph)[0]
    plain = sentence.isascii() and sentence.isprintable() and not sentence.startswith((">>>", "@", "-", "#"))
    if not plain or len(sentence) > MAX_ANSWER_CHARS or len(re.findall(r"[A-Za-z]{2,}", sentence)) < MIN_ANSWER_WORDS:
        return None
    # "S.count(sub) -> int" repeats the signature, "od.copy() <==> …" is a formula.
    return None if "->" in sentence or "<==>" in sentence or sentence.endswith(":") else sentence


def _unique_rows(functions: Iterable[Function], count_tokens: Callable[[Row], int]) -> list[Row]:
    rows, questions, answers = [], set(), set()
    for function in functions:
        for row in _rows(function, count_tokens):
            answer = (row.task, row.name.rpartition(".")[2], row.answer)
            if row.question not in questions and answer not in answers:
                questions.add(row.question)
                answers.add(answer)
                rows.append(row)
    return sorted(rows, key=lambda row: corpus.path_hash(f"{row.file}:{row.name}:{row.task}"))


def _rows(function: Function, count_tokens: Callable[[Row], int]) -> Iterator[Row]:
    row = _row_with_code("document", function, function.sentence, count_tokens)
    # Every third function gives a second row, so that `document` stays the main task.
    second = None
    if function.choice % 3 == 0:
        if (function.choice // 3) % 2 and len(function.arguments) > 1:
            second = _row_with_code("arguments", function, ", ".join(function.arguments), count_tokens)
        else:
            question = _phrase("signature", function).format(name=function.name, sentence=function.sentence)
            second = Row("signature", function.file, function.name, question, function.definition)
    yield from (row for row in (row, second) if row and count_tokens(row) <= MAX_ROW_TOKENS)


def _row_with_code(task: str, function: Function, answer: str, count_tokens: Callable[[Row], int]) -> Row | None:
    """The row with as many of the function's lines as fit; None where fewer than two do."""

    def with_lines(kept: int) -> Row:
        lines = function.lines if kept == len(function.lines) else (*function.lines[:kept], "    ...")
        code = "\n".join(lines).rstrip()
        return Row(task, function.file, function.name, f"{_phrase(task, function)}\n\n{code}", answer)

    # Binary search: the number of tokens grows with the number of lines.
    low, high = 1, len(function.lines)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens(with_lines(middle)) <= MAX_ROW_TOKENS else (low, middle - 1)
    return with_lines(low) if low > 1 else None


def _phrase(task: str, function: Function) -> str:
    return PHRASES[task][(function.choice // 6) % len(PHRASES[task])]


def _one_line(text: str) -> str:
    return " ".join(text.split())
