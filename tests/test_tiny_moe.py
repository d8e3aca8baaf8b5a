"""The small model and data that ship in examples/tiny_moe, and the scripts that made them."""

import csv
import importlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "tiny_moe"
SCRIPTS = ("corpus", "tokenizer", "instruct", "pretrain", "tokens")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The folder's scripts, imported as build.py does, with sys.path and sys.modules put back afterwards."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    sys.path.remove(str(FOLDER))
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER / "model")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small standard library: two real packages, one held-out module, one test file, one broken file."""
    root = tmp_path_factory.mktemp("library")
    real = Path(sysconfig.get_path("stdlib"))
    for path in ("json/decoder.py", "json/encoder.py", "logging/config.py", "queue.py", "posixpath.py", "shutil.py"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes((real / path).read_bytes())
    (root / "test").mkdir()
    (root / "test" / "test_x.py").write_text('def f(a):\n    """Document this in a test, please."""\n    return a\n')
    (root / "latin.py").write_bytes(b"x = '\xe9'\n")
    return root


def read_chats(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (FOLDER / "data" / name).read_text().splitlines()]


def test_split_is_by_file_and_the_same_every_time(scripts: dict[str, ModuleType], library: Path) -> None:
    corpus = scripts["corpus"]
    sources = corpus.find_sources(library)
    assert sources == corpus.find_sources(library)
    assert [source.path for source in sources] == sorted(source.path for source in sources)
    assert "latin.py" not in {source.path for source in sources}
    assert {source.path for source in sources if source.held_out} == {"queue.py", "posixpath.py"}


def test_documents_are_turns_of_the_chat_format(scripts: dict[str, ModuleType], library: Path) -> None:
    corpus = scripts["corpus"]
    source = next(source for source in corpus.find_sources(library) if source.path == "queue.py")
    documents = list(corpus.documents(source))
    assert documents[0] == f"<|im_start|>file\n{source.text}<|im_end|>\n"
    assert any(text.startswith("<|im_start|>docs\nqueue.Queue.put(self, item, block=True") for text in documents)


def test_held_out_rows_come_from_held_out_files_only(scripts: dict[str, ModuleType], library: Path) -> None:
    sources = scripts["corpus"].find_sources(library)
    build = scripts["instruct"].build_rows
    train, held_out = build(sources, lambda row: len(row.question + row.answer) // 3)
    assert (train, held_out) == build(sources, lambda row: len(row.question + row.answer) // 3)
    assert {row.file for row in held_out} == {"queue.py", "posixpath.py"}
    assert {row.file for row in train} == {"json/decoder.py", "json/encoder.py", "logging/config.py", "shutil.py"}


def test_a_held_out_copy_of_a_training_function_is_dropped(scripts: dict[str, ModuleType], library: Path) -> None:
    corpus = scripts["corpus"]
    sources = corpus.find_sources(library)
    queue = next(source.text for source in sources if source.path == "queue.py")
    sources.append(corpus.SourceFile("copy_of_a_queue.py", queue))
    assert not corpus.is_held_out("copy_of_a_queue.py")
    _, held_out = scripts["instruct"].build_rows(sources, lambda row: 0)
    assert {row.file for row in held_out} == {"posixpath.py"}


def test_a_function_is_taken_without_docstring_and_decorator(scripts: dict[str, ModuleType]) -> None:
    text = '@cache\ndef f(a, *b, c=1, **d):\n    """Gives a thing back.\n\n    More."""\n    return a\n'
    source = scripts["corpus"].SourceFile("functions.py", text)
    (function,) = scripts["instruct"].find_functions(source)
    assert function.lines == ("def f(a, *b, c=1, **d):", "    return a")
    assert function.sentence == "Gives a thing back."
    assert function.arguments == ("a", "*b", "c", "**d")
    assert function.definition == "def f(a, *b, c=1, **d):"


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the size.  Then more.", "Return the size."),
        ("Return the\nsize of e.g. a file", "Return the size of e.g. a file"),
        ("Too short.", None),
        ("S.find(sub) -> int, the lowest index", None),
        ("Größe einer Datei, in Bytes gemessen", None),
    ],
)
def test_first_sentence(scripts: dict[str, ModuleType], docstring: str, sentence: str | None) -> None:
    assert scripts["instruct"].first_sentence(docstring) == sentence


def test_shipped_rows_follow_the_split(scripts: dict[str, ModuleType]) -> None:
    with (FOLDER / "data" / "sources.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    train, held_out = read_chats("train.jsonl"), read_chats("heldout.jsonl")
    assert 3000 <= len(train) <= 5000
    assert 150 <= len(held_out) <= 300
    assert [row["split"] for row in rows] == ["train"] * len(train) + ["heldout"] * len(held_out)
    assert all((row["split"] == "heldout") == scripts["corpus"].is_held_out(row["file"]) for row in rows)
    questions = [chat[0]["content"] for chat in train + held_out]
    assert len(set(questions)) == len(questions)


def test_assistant_mask_is_the_answer_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    for chat in read_chats("heldout.jsonl")[:20]:
        encoded = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        answer = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
        assert tokenizer.decode(answer) == chat[1]["content"] + "<|im_end|>"
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=True, return_dict=True, add_generation_prompt=True)[
            "input_ids"
        ]
        assert encoded["input_ids"][: len(prompt) + len(answer)] == prompt + answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n   \t x\r\n",
        "  def f(_a__b):\n\n\n        return 'é😀\x00'   \n",
        "1234567 don't .. a  b\u2028c ﷽",
    ],
)
def test_tokenizer_gives_back_every_character(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_indentation_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [len(tokenizer("\n" + " " * width)["input_ids"]) for width in (4, 8, 12, 16)] == [1, 1, 1, 1]


def test_shipped_weights_are_small_and_bf16() -> None:
    weights = FOLDER / "model" / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_shipped_loss_beats_bigram_counts(scripts: dict[str, ModuleType]) -> None:
    with (FOLDER / "model" / "training_log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    card = (FOLDER / "model" / "README.md").read_text()
    bigram = float(card.split("bigram counts of the training text | ")[1].split(" ")[0])
    assert float(log[-1]["held_out_loss"]) < bigram < float(log[0]["held_out_loss"])


def test_baselines_on_known_text(scripts: dict[str, ModuleType]) -> None:
    ids = np.array([0, 1] * 500, dtype=np.uint16)
    assert scripts["tokens"].unigram_entropy(ids) == pytest.approx(np.log(2))
    # After 0 always comes 1: only the back-off's weight is left to lose.
    assert scripts["tokens"].bigram_loss(ids, ids, 2, weight=1.0) == pytest.approx(-np.log(500.5 / 501), rel=0.01)


def test_progress_follows_the_nearer_limit(scripts: dict[str, ModuleType]) -> None:
    settings = scripts["pretrain"].PretrainSettings(minutes=1, steps=100)
    assert settings.progress(50, 6.0) == 0.5
    assert settings.progress(5, 30.0) == 0.5
    assert settings.progress(5, 61.0) == 1.0
    with pytest.raises(ValueError, match="minutes or steps"):
        scripts["pretrain"].PretrainSettings()


def test_balance_loss_is_one_when_even(scripts: dict[str, ModuleType]) -> None:
    even_TE = torch.eye(4).repeat(8, 1) * 50
    assert scripts["pretrain"].balance_loss(even_TE, 1).item() == pytest.approx(1.0)
    one_expert_TE = torch.eye(4)[:1].repeat(8, 1) * 50
    assert scripts["pretrain"].balance_loss(one_expert_TE, 1).item() == pytest.approx(4.0)


def test_windows_visit_every_part_once_an_epoch(scripts: dict[str, ModuleType]) -> None:
    batches = scripts["pretrain"].random_windows(torch.arange(405, dtype=torch.int32), 10, 4, seed=0)
    epoch = torch.cat([next(batches) for _ in range(9)])
    assert len(epoch.flatten().unique()) == epoch.numel() == 360
    assert (epoch.diff(dim=1) == 1).all()
