"""What good data become: every format and kind of file, their order, the split, the cache."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from expertune.errors import DataError
from expertune.train.data import LoadedData, SourceSpec, load_data

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, ANSWER]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(name: str, *rows: Any) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def texts(start: int, stop: int) -> list[dict[str, str]]:
    return [{"text": f"t{index}"} for index in range(start, stop)]


def load(*specs: SourceSpec | str, **options: Any) -> LoadedData:
    sources = [SourceSpec(spec) if isinstance(spec, str) else spec for spec in specs]
    return load_data(sources, **({"seed": 0, "folder": Path("cache")} | options))


def rows_of(data: LoadedData) -> list[dict[str, Any]]:
    return list(data.train.dataset)


def report_of(data: LoadedData) -> str:
    return "\n".join(data.report.lines())


def test_chat_messages() -> None:
    data = load(
        write_lines("a.jsonl", CHAT | {"id": 7}, {"messages": [{**USER, "name": "Ann", "tool_calls": None}, ANSWER]})
    )
    assert data.kind == "chat"
    assert rows_of(data) == [CHAT, CHAT]
    assert data.train.dataset.column_names == ["messages"]
    assert "detected from the columns" in report_of(data)
    assert "not used: id, messages[].name, messages[].tool_calls" in report_of(data)
    assert "1 row repeated exactly" in report_of(data)


def test_sharegpt_conversations_are_recognised_and_said() -> None:
    conversation = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    data = load(write_lines("a.jsonl", {"conversations": conversation}))
    assert rows_of(data) == [CHAT]
    assert "column conversations, keys from/value" in report_of(data)
    assert "roles renamed: gpt → assistant, human → user" in report_of(data)


def test_own_names_of_columns_keys_and_roles() -> None:
    write_lines("a.jsonl", {"dialog": [{"who": "customer", "says": "Hi"}, {"who": "agent", "says": "Hello"}]})
    spec = SourceSpec(
        "a.jsonl",
        type="chat_template",
        field_messages="dialog",
        role_key="who",
        content_key="says",
        roles={"user": ("customer",), "assistant": ("agent",)},
    )
    assert rows_of(load(spec)) == [CHAT]


def test_prompt_completion_of_strings_and_of_messages() -> None:
    pair = {"prompt": "2+2=", "completion": "4"}
    data = load(write_lines("a.jsonl", pair))
    assert (data.kind, data.train.shape, rows_of(data)) == ("prompt_completion", "prompt_completion_strings", [pair])
    messages = {"prompt": [USER], "completion": [ANSWER]}
    data = load(write_lines("b.jsonl", messages))
    assert (data.kind, data.train.shape, rows_of(data)) == (
        "prompt_completion",
        "prompt_completion_messages",
        [messages],
    )


def test_prompt_completion_messages_join_a_chat() -> None:
    chat = write_lines("chat.jsonl", CHAT)
    pairs = write_lines("pairs.jsonl", {"prompt": [USER], "completion": [ANSWER]})
    data = load(chat, pairs)
    assert data.kind == "chat"
    assert rows_of(data) == [CHAT, CHAT]


def test_alpaca_with_and_without_input() -> None:
    rows = [
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Greet.", "output": "Hello"},
    ]
    data = load(write_lines("a.jsonl", *rows))
    first, second, third = rows_of(data)
    assert first["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n")
    assert "paired with an input" in first["prompt"]
    assert first["completion"] == "4"
    assert second["prompt"].endswith("### Instruction:\nGreet.\n\n### Response:\n")
    assert second == third
    write_lines("b.jsonl", {"q": "Add.", "a": "4", "text": "x"})
    data = load(SourceSpec("b.jsonl", type="alpaca", field_instruction="q", field_output="a"))
    assert rows_of(data)[0]["completion"] == "4"
    assert "not used: text" in report_of(data)


def test_plain_text_and_its_field() -> None:
    data = load(write_lines("a.jsonl", *texts(0, 2)))
    assert (data.kind, rows_of(data)) == ("text", texts(0, 2))
    write_lines("b.jsonl", {"body": "t0", "text": "other"})
    assert rows_of(load(SourceSpec("b.jsonl", type="completion", field="body"))) == texts(0, 1)


def test_unicode_survives() -> None:
    row = {"text": "naïve 🦉 漢字 \u2028 é\r\n\ttab עברית"}
    Path("bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    Path("bom.csv").write_bytes(b"\xef\xbb\xbf" + 'text\n"漢字, ""é"""\n'.encode())
    assert rows_of(load("bom.jsonl", "bom.csv")) == [row, {"text": '漢字, "é"'}]


def test_every_kind_of_file_gives_the_same_rows() -> None:
    rows = texts(0, 3)
    write_lines("a.jsonl", *rows)
    write_lines("a.ndjson", *rows)
    write_lines("lines.json", *rows)  # JSON Lines under the suffix of JSON
    Path("list.json").write_text(json.dumps(rows, indent=1))
    Path("held.json").write_text(json.dumps({"version": 1, "data": rows}))
    Path("a.csv").write_text("text\n" + "\n".join(row["text"] for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), "a.parquet")
    for name in ("a.jsonl", "list.json", "a.csv"):
        Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    Path("odd.data").write_text(json.dumps(rows))
    for name in (path.name for path in sorted(Path().iterdir()) if path.is_file() and path.suffix != ".data"):
        assert rows_of(load(name)) == rows, name
    assert rows_of(load(SourceSpec("odd.data", ds_type="json"))) == rows


def test_one_chat_by_itself_in_a_json_file() -> None:
    Path("one.json").write_text(json.dumps(CHAT, indent=2))
    assert rows_of(load("one.json")) == [CHAT]


def test_csv_cells_of_several_lines_keep_the_line_numbers() -> None:
    Path("a.csv").write_text('prompt,completion\n"one\ntwo\nthree",x\n\n"four\nfive",y\nlast,z\n')
    data = load("a.csv")
    assert data.train.dataset["prompt"][:] == ["one\ntwo\nthree", "four\nfive", "last"]
    assert [data.train.where(index) for index in range(3)] == ["a.csv:2", "a.csv:6", "a.csv:8"]


def test_folder_is_read_by_name_at_any_depth() -> None:
    write_lines("data/b.jsonl", *texts(2, 4))
    Path("data/a.csv").write_text("text\nt0\nt1\n")
    parquet.write_table(pa.Table.from_pylist(texts(4, 6)), "data/c.parquet")
    write_lines("data/deep/z.jsonl", *texts(6, 8))
    Path("data/README.md").write_text("x")
    write_lines("data/.hidden/x.jsonl", {"text": "no"})
    write_lines("data/_old.jsonl", {"text": "no"})
    data = load("data")
    assert rows_of(data) == texts(0, 8)
    assert "8 rows, 4 files" in report_of(data)
    assert "files not read: README.md" in report_of(data)


def test_globs_and_lists_of_files() -> None:
    for number in (3, 1, 2):
        write_lines(f"data/part{number}.jsonl", {"text": f"t{number}"})
    assert rows_of(load("data/part[12].jsonl")) == texts(1, 3)
    assert rows_of(load(SourceSpec("data", data_files=("part3.jsonl", "part1.jsonl"))))[0] == {"text": "t3"}
    assert rows_of(load(SourceSpec("json", data_files=("data/part*.jsonl",)))) == texts(1, 4)


def test_rows_of_a_local_split() -> None:
    write_lines("a.jsonl", *texts(0, 10))
    for split, rows in {"train": (0, 10), "train[:3]": (0, 3), "train[8:]": (8, 10), "train[2:4]": (2, 4)}.items():
        assert rows_of(load(SourceSpec("a.jsonl", split=split))) == texts(*rows)


def test_order_is_that_of_the_files_and_places_are_kept() -> None:
    data = load(write_lines("b.jsonl", *texts(0, 3)), write_lines("a.jsonl", *texts(3, 6)))
    assert rows_of(data) == texts(0, 6)
    assert [data.train.where(index) for index in (0, 2, 3)] == ["b.jsonl:1", "b.jsonl:3", "a.jsonl:1"]


def test_split_is_seeded_and_complete() -> None:
    write_lines("a.jsonl", *texts(0, 100))
    first, again, other = (load("a.jsonl", val_set_size=0.1, seed=seed) for seed in (1, 1, 2))
    assert first.heldout is not None
    assert again.heldout is not None
    assert other.heldout is not None
    train, heldout = first.train.dataset["text"][:], first.heldout.dataset["text"][:]
    assert (len(train), len(heldout)) == (90, 10)
    assert sorted(train + heldout) == sorted(row["text"] for row in texts(0, 100))
    assert train == sorted(train, key=lambda text: int(text[1:]))
    assert heldout == again.heldout.dataset["text"][:] != other.heldout.dataset["text"][:]
    for index, text in enumerate(heldout):
        assert first.heldout.where(index) == f"a.jsonl:{int(text[1:]) + 1}"
    counted = load("a.jsonl", val_set_size=7)
    assert counted.heldout is not None
    assert len(counted.heldout) == counted.report.num_heldout == 7


def test_heldout_sources_are_kept_apart() -> None:
    data = load(write_lines("a.jsonl", *texts(0, 3)), heldout_specs=[SourceSpec(write_lines("b.jsonl", *texts(3, 5)))])
    assert data.heldout is not None
    assert list(data.heldout.dataset) == texts(3, 5)
    assert data.heldout.where(0) == "b.jsonl:1"
    assert "b.jsonl (held out): 2 rows" in report_of(data)


def test_a_changed_file_is_never_served_from_a_cache() -> None:
    for text in ("one", "two", "one"):  # the same size, within the clock's resolution
        write_lines("a.jsonl", {"text": text})
        data = load("a.jsonl")
        assert rows_of(data) == [{"text": text}]
        assert next(iter(data.train.dataset.map(lambda row: {"n": row["text"] + "!"})))["n"] == f"{text}!"


def test_the_same_rows_share_one_prepared_file() -> None:
    write_lines("a.jsonl", *texts(0, 5))
    first, second = load("a.jsonl"), load("a.jsonl")
    assert first.train.dataset.cache_files == second.train.dataset.cache_files
    assert first.train.dataset._fingerprint == second.train.dataset._fingerprint
    assert len(list(Path("cache").rglob("*.arrow"))) == 1


def test_twenty_thousand_rows_are_quick() -> None:
    write_lines("a.jsonl", *({"messages": [USER, {**ANSWER, "content": f"answer {n} " * 20}]} for n in range(20_000)))
    started = time.perf_counter()
    data = load("a.jsonl", val_set_size=0.05)
    assert len(data.train) == 19_000
    assert time.perf_counter() - started < 3


def test_hub_rows_come_through_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def fake(path: str, **options: Any) -> datasets.Dataset:
        asked.update(path=path, **options)
        return datasets.Dataset.from_list([CHAT, {"messages": [USER]}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = load(SourceSpec("org/name", name="en", split="train[:2]", revision="abc"), skip_bad_rows=True)
    assert rows_of(data) == [CHAT]
    assert asked == {
        "path": "org/name", "name": "en", "split": "train[:2]", "revision": "abc", "data_files": None,
    }  # fmt: skip
    assert "org/name/en (train[:2]): row 2: messages has no assistant" in report_of(data)


def test_hub_failures_say_that_no_file_has_the_name_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(path: str, **options: Any) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach 'data/trian' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    write_lines("data/train/a.jsonl", CHAT)
    with pytest.raises(DataError, match="nearest name there is train") as caught:
        load("data/trian")
    assert "Couldn't reach" in str(caught.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: datasets.Dataset.from_list([]))
    with pytest.raises(DataError, match="is empty"):
        load("org/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: datasets.DatasetDict())
    with pytest.raises(DataError, match="name one split"):
        load("org/name")


def test_the_package_does_not_import_torch() -> None:
    code = "import sys, expertune.train.data; assert not {'torch', 'datasets', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
