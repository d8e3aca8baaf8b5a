"""The tokenised corpus as a small cache: enough to pre-train on a machine with another Python."""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

import corpus


@dataclass(frozen=True)
class CorpusFacts:
    """What the model card says about the text. Bytes are of the text in UTF-8, with the chat format's markers."""

    python: str
    copyright: str
    train_files: int
    held_out_files: int
    train_documents: int
    held_out_documents: int
    train_bytes: int
    held_out_bytes: int
    train_tokens: int
    held_out_tokens: int


def write_tokens(sources: list[corpus.SourceFile], tokenizer: PreTrainedTokenizerFast, cache: Path) -> CorpusFacts:
    """Writes train.npy and held_out.npy (uint16 token streams) and facts.json into `cache`."""
    counts = {}
    for split, held_out in (("train", False), ("held_out", True)):
        files = [source for source in sources if source.held_out == held_out]
        # Documents in the order of a hash of their text, so that neighbouring windows are of different files.
        documents = sorted((text for source in files for text in corpus.documents(source)), key=corpus.path_hash)
        ids = np.concatenate([np.asarray(row, dtype=np.uint16) for row in _encode(documents, tokenizer)])
        np.save(cache / f"{split}.npy", ids)
        counts[f"{split}_files"] = len(files)
        counts[f"{split}_documents"] = len(documents)
        counts[f"{split}_bytes"] = sum(len(text.encode()) for text in documents)
        counts[f"{split}_tokens"] = len(ids)
    facts = CorpusFacts(python=platform.python_version(), copyright=sys.copyright.splitlines()[0], **counts)
    (cache / "facts.json").write_text(json.dumps(asdict(facts), indent=2) + "\n")
    return facts


def read_tokens(cache: Path) -> tuple[np.ndarray, np.ndarray, CorpusFacts]:
    """(train tokens, held-out tokens, facts) from a folder that `write_tokens` filled."""
    if not (cache / "facts.json").exists():
        raise FileNotFoundError(f"{cache} has no tokenised corpus: run build.py --steps tokenizer,tokens first")
    facts = CorpusFacts(**json.loads((cache / "facts.json").read_text()))
    return np.load(cache / "train.npy"), np.load(cache / "held_out.npy"), facts


def _encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    core = tokenizer.backend_tokenizer
    return [encoding.ids for encoding in core.encode_batch(documents, add_special_tokens=False)]


def unigram_entropy(ids: np.ndarray) -> float:
    """Nats per token of the tokens' own frequencies: what a model that knows nothing but these would lose."""
    shares = np.bincount(ids) / len(ids)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def bigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int, weight: float = 20.0) -> float:
    """Held-out nats per token of training bigram counts, backed off to unigrams.

    p(b | a) = (count(a, b) + weight · p(b)) / (count(a) + weight), with p(b) the add-one unigram frequency.
    """
    unigram = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    pairs, pair_counts = np.unique(_pair_keys(train, vocab_size), return_counts=True)
    first_counts = np.bincount(train[:-1], minlength=vocab_size)
    wanted = _pair_keys(held_out, vocab_size)
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    counts = np.where(pairs[at] == wanted, pair_counts[at], 0)
    p = (counts + weight * unigram[held_out[1:]]) / (first_counts[held_out[:-1]] + weight)
    return float(-np.log(p).mean())


def _pair_keys(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    return ids[:-1].astype(np.int64) * vocab_size + ids[1:]
