"""Rebuilds everything in this folder: `python examples/tiny_moe/build.py`.

The steps, each usable alone once those before it have run:

    tokenizer   trains the tokenizer                           -> CACHE/tokenizer
    tokens      tokenises the corpus                           -> CACHE/*.npy, facts.json
    instruct    makes the instruction rows                     -> OUT/data
    pretrain    trains the model, from the cache alone         -> OUT/model

A step writes beside its target and renames at the end, so one that is stopped leaves the old result in place.
"""

import argparse
import contextlib
import csv
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import card
import corpus
import instruct
import tokens
from pretrain import PretrainSettings, model_config, pretrain
from tokenizer import load_tokenizer, train_tokenizer

HERE = Path(__file__).resolve().parent
STEPS = ("tokenizer", "tokens", "instruct", "pretrain")
# About 10 epochs at the default batch of 64 windows; held-out loss rises from 12 on (docs/log.md).
DEFAULT_TRAIN_STEPS = 1800


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends without an error."""
    partial, previous = target.with_name(target.name + ".partial"), target.with_name(target.name + ".previous")
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        target.rename(previous)
    partial.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


# Reading and parsing the library takes seconds, and three steps want it.
find_sources = functools.cache(corpus.find_sources)


def build_tokenizer(cache: Path) -> None:
    documents = [text for source in find_sources() if not source.held_out for text in corpus.documents(source)]
    tokenizer = train_tokenizer(documents)
    with replaced(cache / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
    print(f"tokenizer: {len(tokenizer)} entries from {len(documents)} documents")


def build_tokens(cache: Path) -> None:
    tokenizer = load_tokenizer(cache / "tokenizer")
    with replaced(cache / "tokens") as folder:
        facts = tokens.write_tokens(find_sources(), tokenizer, folder)
    print(f"tokens: {facts}")


def build_instructions(cache: Path, out: Path) -> None:
    tokenizer = load_tokenizer(cache / "tokenizer")

    def count_tokens(row: instruct.Row) -> int:
        return len(tokenizer.apply_chat_template(row.messages, tokenize=True, return_dict=True)["input_ids"])

    train, held_out = instruct.build_rows(find_sources(), count_tokens)
    with replaced(out / "data") as folder:
        sources_csv = [("split", "row", "task", "file", "name")]
        for split, rows in (("train", train), ("heldout", held_out)):
            lines = [json.dumps({"messages": row.messages}) + "\n" for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(lines))
            sources_csv += [(split, str(number), row.task, row.file, row.name) for number, row in enumerate(rows)]
        with (folder / "sources.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(sources_csv)
        card.write_data_card(folder, train, held_out, max(map(count_tokens, [*train, *held_out])))
    print(f"instruct: {len(train)} training rows, {len(held_out)} held-out rows")


def build_model(cache: Path, out: Path, settings: PretrainSettings) -> None:
    tokenizer = load_tokenizer(cache / "tokenizer")
    train, held_out, facts = tokens.read_tokens(cache / "tokens")
    config = model_config(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    result = pretrain(config, train, held_out, settings)
    with replaced(out / "model") as folder:
        result.model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card.write_training_log(folder, result)
        unigram = tokens.unigram_entropy(held_out)
        bigram = tokens.bigram_loss(train, held_out, config.vocab_size)
        card.write_model_card(folder, result, settings, facts, unigram, bigram)
    size = (out / "model" / "model.safetensors").stat().st_size
    print(f"pretrain: {size} bytes in {out / 'model' / 'model.safetensors'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS), help="which steps, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, default=HERE, help="where data/ and model/ go (default: this folder)")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="where tokenizer and tokens are kept")
    defaults = PretrainSettings(steps=1)
    training = parser.add_argument_group("pretrain")
    training.add_argument("--minutes", type=float, help="length of the run; the learning rate follows the clock")
    training.add_argument(
        "--train-steps", type=int, help="length in optimizer steps; with --minutes, the earlier ends it"
    )
    training.add_argument("--batch-size", type=int, default=defaults.batch_size, help="windows of 512 tokens a step")
    training.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    training.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    training.add_argument("--held-out-windows", type=int, default=defaults.held_out_windows)
    training.add_argument("--device", default=defaults.device, help="auto, cpu or cuda")
    training.add_argument("--seed", type=int, default=defaults.seed)
    arguments = parser.parse_args()
    unknown = set(arguments.steps.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"--steps has {', '.join(sorted(unknown))}, need some of {', '.join(STEPS)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    steps = arguments.steps.split(",")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    if "tokenizer" in steps:
        build_tokenizer(arguments.cache)
    if "tokens" in steps:
        build_tokens(arguments.cache)
    if "instruct" in steps:
        build_instructions(arguments.cache, arguments.out)
    if "pretrain" in steps:
        no_limit = arguments.minutes is None and arguments.train_steps is None
        settings = PretrainSettings(
            minutes=arguments.minutes,
            steps=DEFAULT_TRAIN_STEPS if no_limit else arguments.train_steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            held_out_windows=arguments.held_out_windows,
            device=arguments.device,
            seed=arguments.seed,
        )
        build_model(arguments.cache, arguments.out, settings)


if __name__ == "__main__":
    main()
