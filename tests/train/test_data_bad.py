"""Every way data can be bad that we know of, and what the person is told."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from expertune.errors import DataError
from expertune.train.data import SourceSpec, load_data

GOOD_CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
GOOD_LINE = json.dumps(GOOD_CHAT)


def chat_lines(*messages: Any) -> bytes:
    """A good line, then one with these messages: the bad row is on line 2."""
    return f"{GOOD_LINE}\n{json.dumps({'messages': list(messages)})}\n".encode()


def json_lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, ANSWER = turn("user", "Hi"), turn("assistant", "Hello")
PAIR = {"prompt": "a", "completion": "b"}


@dataclass(frozen=True)
class Bad:
    """One bad input: a file's name and bytes, what the entry says of it, and what the message must hold."""

    name: str
    file: str
    content: bytes
    says: tuple[str, ...]
    spec: dict[str, Any] = field(default_factory=dict)


BAD = [
    # rows of chats
    Bad("broken json", "a.jsonl", f'{GOOD_LINE}\n\n{{"messages": [}}\n'.encode(), ("a.jsonl:3", "column 15")),
    Bad("row is a list", "a.jsonl", f"{GOOD_LINE}\n[1]\n".encode(), ("a.jsonl:2: is a list, need an object",)),
    Bad("row is null", "a.jsonl", f"{GOOD_LINE}\nnull\n".encode(), ("a.jsonl:2: is null",)),
    Bad("missing key", "a.jsonl", json_lines(GOOD_CHAT, {"chat": []}), (":2: has no messages (its keys: chat)",)),
    Bad("messages null", "a.jsonl", json_lines(GOOD_CHAT, {"messages": None}), (":2: messages is missing or null",)),
    Bad("messages a string", "a.jsonl", json_lines(GOOD_CHAT, {"messages": "hi"}), ("is a string, need a list",)),
    Bad("messages empty", "a.jsonl", chat_lines(), (":2: messages is empty",)),
    Bad("message a string", "a.jsonl", chat_lines("hi"), ("messages[0] is a string, need an object",)),
    Bad("message without content", "a.jsonl", chat_lines({"role": "user"}), ("messages[0] has no content",)),
    Bad("unknown role", "a.jsonl", chat_lines(turn("narrator", "x"), ANSWER), ("'narrator', an unknown role",)),
    Bad("role in capitals", "a.jsonl", chat_lines(turn("User", "x"), ANSWER), ("did you mean 'user'?",)),
    Bad("role a number", "a.jsonl", chat_lines(turn(1, "x"), ANSWER), ("messages[0].role is a number",)),
    Bad("tool role", "a.jsonl", chat_lines(USER, turn("tool", "42"), ANSWER), ("'tool', an unknown role",)),
    Bad("content null", "a.jsonl", chat_lines(turn("user", None), ANSWER), ("content is missing or null",)),
    Bad("content empty", "a.jsonl", chat_lines(turn("user", " \n"), ANSWER), ("messages[0].content is empty",)),
    Bad("content a number", "a.jsonl", chat_lines(turn("user", 3), ANSWER), ("content is a number, need a string",)),
    Bad(
        "content in parts",
        "a.jsonl",
        chat_lines(turn("user", [{"type": "text", "text": "x"}]), ANSWER),
        ("messages[0].content is a list", "parts"),
    ),
    Bad("NUL", "a.jsonl", chat_lines(turn("user", "a\x00b"), ANSWER), ("NUL character (at position 2)",)),
    Bad("half a surrogate", "a.jsonl", chat_lines(turn("user", "a\ud800"), ANSWER), ("half a surrogate pair",)),
    Bad("no assistant", "a.jsonl", chat_lines(USER), ("has no assistant message",)),
    Bad("trailing user turn", "a.jsonl", chat_lines(USER, ANSWER, USER), ("ends with a user message",)),
    Bad(
        "tool calls",
        "a.jsonl",
        chat_lines(USER, turn("assistant", "x", tool_calls=[{"id": "1"}])),
        (":2: messages[1] has tool_calls, which is not supported",),
    ),
    Bad("per-message weight", "a.jsonl", chat_lines(USER, turn("assistant", "x", weight=0)), ("has weight",)),
    Bad("tools column", "a.jsonl", json_lines(GOOD_CHAT, GOOD_CHAT | {"tools": [{"x": 1}]}), (":2: has tools",)),
    Bad("invalid utf-8", "a.jsonl", f"{GOOD_LINE}\n".encode() + b'{"a": "\xff"}\n', (":2: invalid UTF-8", "0xff")),
    Bad("nested too deeply", "a.jsonl", f"{GOOD_LINE}\n".encode() + b"[" * 200_000, (":2: invalid JSON",)),
    # other formats
    Bad("empty prompt", "a.jsonl", json_lines(PAIR, PAIR | {"prompt": ""}), (":2: prompt is empty",)),
    Bad("empty completion", "a.jsonl", json_lines(PAIR, PAIR | {"completion": " "}), (":2: completion is empty",)),
    Bad("messages after strings", "a.jsonl", json_lines(PAIR, PAIR | {"prompt": [USER]}), (":2: prompt is a list",)),
    Bad(
        "strings after messages",
        "a.jsonl",
        json_lines({"prompt": [USER], "completion": [ANSWER]}, PAIR),
        (":2: prompt is a string",),
    ),
    Bad(
        "user turn in a completion",
        "a.jsonl",
        json_lines({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}),
        ("completion[1] is a user message", "`messages`"),
    ),
    Bad(
        "prompt that answers itself",
        "a.jsonl",
        json_lines({"prompt": [USER, ANSWER], "completion": [ANSWER]}),
        ("prompt ends with an assistant message",),
    ),
    Bad("alpaca without output", "a.json", b'[{"instruction": "a", "output": ""}]', ("a.json: element 1: output",)),
    Bad("alpaca input a list", "a.json", b'[{"instruction": "a", "input": [1], "output": "b"}]', ("input is a list",)),
    Bad("text empty", "a.jsonl", json_lines({"text": "a"}, {"text": "\t"}), (":2: text is empty",)),
    Bad("text a number", "a.jsonl", json_lines({"text": "a"}, {"text": 1.5}), (":2: text is a number",)),
    # files
    Bad("empty jsonl", "a.jsonl", b"", ("a.jsonl: the file is empty",)),
    Bad("only blank lines", "a.jsonl", b"\n \n\n", ("a.jsonl: the file is empty",)),
    Bad("empty json", "a.json", b"", ("a.json: the file is empty",)),
    Bad("empty list", "a.json", b"[]", ("a.json: the file is empty",)),
    Bad("csv with a header only", "a.csv", b"text\n", ("a.csv: the file is empty",)),
    Bad("array in jsonl", "a.jsonl", b'[{"text": "a"}]', ("JSON array", "name it .json")),
    Bad("broken json file", "a.json", b'[{"text": "a"},\n{"text" "b"}]', ("a.json:2: invalid JSON at column 9",)),
    Bad("json of a number", "a.json", b"3", ("holds a number; need a list of objects",)),
    Bad("json with two lists", "a.json", b'{"x": [1], "y": [2]}', ("an object with 2 lists (its keys: x, y)",)),
    Bad("json in latin-1", "a.json", b'[{"text": "ok"},\n{"text": "\xe9"}]', ("a.json:2: invalid UTF-8",)),
    Bad("csv with too few cells", "a.csv", b"prompt,completion\na,b\na\n", ("a.csv:3: 1 cells", "header has 2")),
    Bad("csv with an open quote", "a.csv", b'text\nfine\n"open\n', ("a.csv:3: invalid CSV",)),
    Bad("csv in latin-1", "a.csv", b"text\nfine\n\xe9\n", ("a.csv:3: invalid UTF-8",)),
    Bad("csv with repeated names", "a.csv", b"text,text\na,b\n", ("a.csv:1: the header",)),
    Bad("csv with a huge cell", "a.csv", b"text\n" + b"x" * 200_000, ("a.csv:2", "field larger", "use jsonl")),
    Bad("not parquet", "a.parquet", b"no parquet at all", ("a.parquet: not a readable parquet file",)),
    Bad("not gzip", "a.jsonl.gz", b"plain", ("a.jsonl.gz: not a readable gzip file",)),
    Bad("unknown suffix", "a.docx", b"x", ("unknown kind of file '.docx'", ".parquet", "ds_type")),
    # entries
    Bad("unknown columns", "a.jsonl", json_lines({"q": "a", "a": "b"}), ("has these columns: q, a", "alpaca")),
    Bad("preference data", "a.jsonl", json_lines({"prompt": "a", "chosen": "b", "rejected": "c"}), ("preference",)),
    Bad("tokenised rows", "a.jsonl", json_lines({"input_ids": [1]}), ("tokenised already",)),
    Bad("two formats", "a.jsonl", json_lines(PAIR | {"text": "x"}), ("prompt_completion and completion", "`type:`")),
    Bad("unknown type", "a.jsonl", json_lines(PAIR), ("'alpacca' is not supported", "is alpaca"), {"type": "alpacca"}),
    Bad("sharegpt", "a.jsonl", json_lines(PAIR), ("field_messages: conversations",), {"type": "sharegpt"}),
    Bad("type without column", "a.jsonl", json_lines(PAIR), ("'instruction'", "field_instruction"), {"type": "alpaca"}),
    Bad("no such field", "a.jsonl", json_lines(PAIR), ("'body'",), {"type": "completion", "field": "body"}),
    Bad("no such split", "a.jsonl", json_lines(PAIR), ("split 'test' does not exist in local",), {"split": "test"}),
    Bad("split past the end", "a.jsonl", json_lines(PAIR), ("'train[5:]' has no row",), {"split": "train[5:]"}),
    Bad("unknown ds_type", "a.jsonl", json_lines(PAIR), ("ds_type 'arrow'",), {"ds_type": "arrow"}),
    Bad("role map to nowhere", "a.jsonl", chat_lines(ANSWER), ("roles maps to 'bot'",), {"roles": {"bot": ("x",)}}),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*specs: SourceSpec, cache: Path, **options: Any) -> Any:
    return load_data(specs, seed=0, folder=cache / "cache", **options)


def refused(attempt: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        attempt()
    return str(caught.value)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input_is_refused_with_its_place_and_reason(bad: Bad, folder: Path) -> None:
    Path(bad.file).write_bytes(bad.content)
    message = refused(lambda: load(SourceSpec(bad.file, **bad.spec), cache=folder))
    assert bad.file in message
    for fragment in bad.says:
        assert fragment in message


def test_bad_parquet_rows_are_named_by_number(folder: Path) -> None:
    parquet.write_table(pa.table({"text": ["a", None, "c"]}), "a.parquet")
    assert "a.parquet: row 2: text is missing or null" in refused(lambda: load(SourceSpec("a.parquet"), cache=folder))


def test_twenty_problems_are_shown_and_the_rest_counted(folder: Path) -> None:
    Path("a.jsonl").write_bytes(json_lines({"text": "good"}, *[{"text": ""}] * 25))
    message = refused(lambda: load(SourceSpec("a.jsonl"), cache=folder))
    assert message.startswith("25 rows cannot be trained on")
    assert "a.jsonl:21: text is empty" in message
    assert "a.jsonl:22" not in message
    assert "and 5 more" in message
    assert "skip_bad_rows: true" in message


def test_skipped_rows_are_counted_and_listed(folder: Path) -> None:
    Path("a.jsonl").write_bytes(b'{"text": "one"}\nnot json\n{"text": ""}\n{"text": "two"}\n')
    data = load(SourceSpec("a.jsonl"), cache=folder, skip_bad_rows=True)
    assert data.train.dataset["text"][:] == ["one", "two"]
    assert data.report.num_skipped == 2
    lines = "\n".join(data.report.lines())
    assert "bad rows skipped: 2" in lines
    assert "a.jsonl:2: invalid JSON" in lines
    assert "a.jsonl:3: text is empty" in lines
    assert data.train.where(1) == "a.jsonl:4"


def test_nothing_left_after_skipping(folder: Path) -> None:
    Path("a.jsonl").write_bytes(json_lines({"text": ""}))
    message = refused(lambda: load(SourceSpec("a.jsonl"), cache=folder, skip_bad_rows=True))
    assert "a.jsonl: no row is left; all 1 are bad" in message
    Path("b.jsonl").write_bytes(b"junk\n")
    message = refused(lambda: load(SourceSpec("b.jsonl"), cache=folder, skip_bad_rows=True))
    assert "no row can be read" in message
    assert "b.jsonl:1: invalid JSON" in message


def test_missing_paths_name_the_nearest_and_why_it_is_no_hub_id(folder: Path) -> None:
    Path("data").mkdir()
    Path("data/train.jsonl").write_bytes(json_lines(PAIR))
    message = refused(lambda: load(SourceSpec("data/trian.jsonl"), cache=folder))
    assert "data/trian.jsonl: no such file or folder; the nearest name there is train.jsonl" in message
    assert "not taken as a hub id either, because it ends in .jsonl" in message
    message = refused(lambda: load(SourceSpec("./data/sub/deeper"), cache=folder))
    assert "nor is there a folder" in message
    assert "more parts than org/name" in message
    assert "not spelt like org/name" in refused(lambda: load(SourceSpec("./nowhere"), cache=folder))
    assert "no file matches" in refused(lambda: load(SourceSpec("data/*.csv"), cache=folder))
    wrong = SourceSpec("data", data_files=("tran.jsonl",))
    assert "the nearest name there is train.jsonl" in refused(lambda: load(wrong, cache=folder))
    assert "empty path" in refused(lambda: load(SourceSpec(""), cache=folder))


def test_folders_without_data(folder: Path) -> None:
    Path("data").mkdir()
    assert "(it is empty)" in refused(lambda: load(SourceSpec("data"), cache=folder))
    Path("data/notes.md").write_text("x")
    message = refused(lambda: load(SourceSpec("data"), cache=folder))
    assert "no file that can be read" in message
    assert "it has: notes.md" in message


def test_kinds_that_do_not_mix(folder: Path) -> None:
    Path("chat.jsonl").write_bytes(json_lines(GOOD_CHAT))
    Path("pair.jsonl").write_bytes(json_lines(PAIR))
    message = refused(lambda: load(SourceSpec("chat.jsonl"), SourceSpec("pair.jsonl"), cache=folder))
    assert "different kinds" in message
    assert "chat.jsonl: chat_template" in message
    assert "pair.jsonl: prompt_completion (strings)" in message
    assert "as `messages`" in message
    heldout = (SourceSpec("pair.jsonl"),)
    assert "different kinds" in refused(lambda: load(SourceSpec("chat.jsonl"), cache=folder, heldout_specs=heldout))
    pair = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    Path("pair.jsonl").write_bytes(json_lines(pair))
    message = refused(lambda: load(SourceSpec("chat.jsonl"), SourceSpec("pair.jsonl"), cache=folder))
    assert "pair.jsonl:1: prompt holds an assistant message" in message


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (3, "holds 3 rows out of 3"),
        (10, "at least one must be left"),
        (0.9, "holds 3 rows out of 3"),
        (1.5, "need a share between 0 and 1"),
        (-1, "val_set_size is -1"),
    ],
)
def test_splits_that_cannot_be(size: float, says: str, folder: Path) -> None:
    Path("a.jsonl").write_bytes(json_lines({"text": "a"}, {"text": "b"}, {"text": "c"}))
    assert says in refused(lambda: load(SourceSpec("a.jsonl"), cache=folder, val_set_size=size))


def test_other_contradictions(folder: Path) -> None:
    Path("a.jsonl").write_bytes(json_lines(PAIR))
    spec = SourceSpec("a.jsonl")
    assert "`datasets:` is empty" in refused(lambda: load(cache=folder))
    assert "keep one" in refused(lambda: load(spec, cache=folder, heldout_specs=(spec,), val_set_size=0.1))
    wrong = SourceSpec("a.jsonl", data_files=("b.jsonl",))
    assert "data_files has no meaning" in refused(lambda: load(wrong, cache=folder))


def test_unwritable_cache_is_named(folder: Path) -> None:
    Path("a.jsonl").write_bytes(json_lines(PAIR))
    Path("cache").write_text("a file where a folder is needed")
    assert "HF_DATASETS_CACHE" in refused(lambda: load(SourceSpec("a.jsonl"), cache=folder))
