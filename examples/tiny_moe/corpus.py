"""The pre-training text: the sources and docstrings of the Python standard library on this machine.

Files are split into training and held-out by a hash of their path, so the split is the same on every machine and Python
version that has the file. Nothing is imported: signatures and docstrings are read with `ast`.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Not the library's own text (site-packages, pip in ensurepip), tables (encodings), samples broken on purpose.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "ensurepip", "data", "badsyntax", "encoded_modules"}
SKIPPED_FILES = {"pydoc_data/topics.py"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
# Lib/test is larger than all the rest (17 of 31 MB in 3.11) and repeats itself: at most half of the corpus.
LARGEST_TEST_SHARE = 0.5
# 6 % of the files give 150 to 300 held-out instruction rows.
HELD_OUT_PER_MILLE = 60
# In characters. Longer files are nearly all tables of expected values.
MAX_FILE_LENGTH = 300_000

START, END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class SourceFile:
    """One module: its path below the standard library with forward slashes, and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        return not TEST_FOLDERS.isdisjoint(self.path.split("/")[:-1])

    @property
    def held_out(self) -> bool:
        return is_held_out(self.path)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Documented:
    """A module, class or function that has a docstring.

    name: dotted, without the module. signature: `(a, b=1)` of a function, else empty. docstring: indentation removed.
    """

    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    name: str
    signature: str
    docstring: str


def path_hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


def is_held_out(path: str) -> bool:
    """Whether the file at this path below the standard library is kept from training: by path alone, not by content."""
    return path_hash(path) % 1000 < HELD_OUT_PER_MILLE


def parse(text: str) -> ast.Module:
    """The syntax tree. The old files' invalid escapes would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def find_sources(root: Path | None = None) -> list[SourceFile]:
    """Every usable source file below `root` (default: this Python's standard library), sorted by path.

    Left out: what is not UTF-8, does not parse, is empty, is longer than MAX_FILE_LENGTH or has more than 1 % of
    characters beyond ASCII, and test files beyond LARGEST_TEST_SHARE, in the order of their hashes.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    library, tests = [], []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if SKIPPED_FOLDERS.isdisjoint(path.split("/")) and path not in SKIPPED_FILES:
            text = _readable(file)
            if text:
                source = SourceFile(path, text)
                (tests if source.is_test else library).append(source)

    budget = sum(len(source.text) for source in library) * LARGEST_TEST_SHARE / (1 - LARGEST_TEST_SHARE)
    kept = []
    for source in sorted(tests, key=lambda source: path_hash("share:" + source.path)):
        if len(source.text) <= budget:
            budget -= len(source.text)
            kept.append(source)
    return sorted(library + kept, key=lambda source: source.path)


def documented(source: SourceFile) -> Iterator[Documented]:
    """The docstrings of one file, in its order, down to methods of nested classes but not into functions."""
    tree = parse(source.text)
    if docstring := ast.get_docstring(tree):
        yield Documented(tree, "", "", docstring)
    yield from _documented_in(tree, "")


def documents(source: SourceFile) -> Iterator[str]:
    """The pre-training documents of one file: its text, then one for each docstring (tests: the text alone).

    Each is one turn of the chat format, `<|im_start|>file\\n…<|im_end|>\\n`, which trains the special tokens as well.
    """
    yield as_turn("file", source.text)
    if not source.is_test:
        for item in documented(source):
            qualified = f"{source.module}.{item.name}" if item.name else source.module
            yield as_turn("docs", f"{qualified}{item.signature}\n{item.docstring}")


def as_turn(role: str, text: str) -> str:
    return f"{START}{role}\n{text}{END}\n"


def _readable(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
        parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return None
    beyond_ascii = 0 if text.isascii() else sum(not character.isascii() for character in text)
    if (
        not text.strip()
        or len(text) > MAX_FILE_LENGTH
        or beyond_ascii > 0.01 * len(text)
        or START in text
        or END in text
    ):
        return None
    return text


def _documented_in(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Documented]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_class = isinstance(node, ast.ClassDef)
        docstring = ast.get_docstring(node)
        if docstring:
            signature = "" if is_class else f"({ast.unparse(node.args)})"
            yield Documented(node, prefix + node.name, signature, docstring)
        if is_class:
            yield from _documented_in(node, f"{prefix}{node.name}.")
