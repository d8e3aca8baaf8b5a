"""The model card and the data card, their numbers filled in from the run."""

import collections
import csv
import math
import platform
import sys
from pathlib import Path

import torch
import transformers

from instruct import Row
from pretrain import PretrainResult, PretrainSettings
from tokens import CorpusFacts

MODEL_CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---

# tiny-moe-stdlib

A Mixture-of-Experts language model of {parameters:.2f} M parameters ({active:.2f} M active per token), pre-trained on
the Python standard library. It ships with expertune so that fine-tuning can be tried and tested without a download.

It is a demonstration model: it knows how Python source looks and how docstrings are phrased, and nothing else. Its
answers are not to be relied on.

## Numbers

| | |
| --- | --- |
| architecture | Qwen3-MoE: {layers} layers, hidden {hidden}, tied embeddings |
| experts | {experts} in each layer, intermediate {intermediate}, top-{top_k} |
| parameters | {parameters_exact:,} ({active_exact:,} active per token) |
| tokenizer | byte-level BPE, {vocab} entries, {bytes_per_token:.2f} bytes per held-out token |
| training text | {train_tokens:,} tokens, {train_bytes:,} bytes, from {train_files} files of Python {python} |
| held-out text | {held_out_tokens:,} tokens, {held_out_bytes:,} bytes, from {held_out_files} other files |
| trained on | {tokens:,} tokens ({epochs:.1f} epochs), {steps:,} steps of {batch} windows of {window} |
| training loss, last interval | {train_loss:.3f} nats per token |
| **held-out loss** ({windows} windows) | **{held_out_loss:.3f} nats per token, {bits_per_byte:.3f} bits per byte** |
| held-out loss of the random weights | {first_loss:.3f} |
| unigram entropy of the held-out text | {unigram:.3f} (what a model loses that learned only frequencies) |
| bigram counts of the training text | {bigram:.3f} on the held-out text |
| device, time | {device}, {seconds:.0f} s |
| optimizer | AdamW, peak rate {rate}, weight decay {decay}, warm-up, then cosine |
| balance loss, seed | {balance}, {seed} |
| versions | torch {torch}, transformers {transformers}, Python {this_python} |

`training_log.csv` has the loss at every evaluation. The weights are those of the last step, not of the best evaluation.

## Expert load

The share of the (token, expert) pairs of the held-out windows that each expert of a layer receives; even is {even:.2%}.

| layer | smallest | largest |
| ---: | ---: | ---: |
{load}

## Use

The tokenizer brings a ChatML template with generation markers. Pre-training saw two roles, `file` (a source file) and
`docs` (a name with its signature, then its docstring). It did not see `user` and `assistant`: fine-tune on `../data`
for these.

## Limits

English and Python only, windows of {window} tokens, no instruction following and no facts beyond its text. Text close
to the standard library can come back word for word.

## How it was made, and licence

`python examples/tiny_moe/build.py` rebuilds it. The text is the standard library of Python {python} (without
site-packages, ensurepip and the encodings' tables; tests are at most half), under the PSF License Version 2,
https://docs.python.org/3/license.html; a few modules carry their authors' own permissive notices, listed there.
{copyright} All Rights Reserved.
The weights are given under the same licence. What was changed: docstrings were copied into documents of their own, and
everything was tokenised.
"""

DATA_CARD = """\
# Instruction data from the Python standard library

Chat rows, `{{"messages": [user, assistant]}}`, made by `python examples/tiny_moe/build.py --steps tokenizer,instruct`
from the standard library of Python {python}. The answers were written by the library's authors.

| task | question | answer | train | held-out |
| --- | --- | --- | ---: | ---: |
| document | a function without its docstring | the first sentence of its docstring | {document[0]} | {document[1]} |
| signature | a name and that sentence | the `def` line | {signature[0]} | {signature[1]} |
| arguments | a function without its docstring | its parameters | {arguments[0]} | {arguments[1]} |
| all | | | {total[0]} | {total[1]} |

- `train.jsonl`, `heldout.jsonl`: the rows, each at most {longest} tokens in the chat format. Long functions are cut and
  end in `...`.
- `sources.csv`: for each row its split, number from 0, task, file below the standard library, and name in it.
- Held-out rows come from files that are in neither the training rows nor the model's pre-training text. The split is by
  a hash of the file's path. The library has copies of functions, so a held-out function whose first sentence or code
  stands word for word in a training file was dropped. The tests of a held-out module can be in the pre-training text.
- Left out: test suites, trivial docstrings (under three words), text beyond ASCII, and duplicates.

Licence: PSF License Version 2 (PSF-2.0), https://docs.python.org/3/license.html; a few modules carry their authors' own
permissive notices, listed there. {copyright} All Rights Reserved.
Changed from the original: docstrings were cut to their first sentence; functions were taken out of their files,
shortened and stripped of docstrings and decorators.
"""


def write_model_card(
    folder: Path, result: PretrainResult, settings: PretrainSettings, facts: CorpusFacts, unigram: float, bigram: float
) -> None:
    config, model = result.model.config, result.model
    step, tokens, seconds, train_loss, held_out_loss = result.log[-1]
    total = sum(p.numel() for p in model.parameters())
    expert_weights = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total - expert_weights + expert_weights * config.num_experts_per_tok // config.num_experts
    bytes_per_token = facts.held_out_bytes / facts.held_out_tokens
    window_count = min(settings.held_out_windows, facts.held_out_tokens // (settings.window + 1))
    load = [f"| {layer} | {min(row):.2%} | {max(row):.2%} |" for layer, row in enumerate(result.expert_load)]
    values = {
        **vars(facts),
        "parameters": total / 1e6,
        "parameters_exact": total,
        "active": active / 1e6,
        "active_exact": active,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "experts": config.num_experts,
        "intermediate": config.moe_intermediate_size,
        "top_k": config.num_experts_per_tok,
        "vocab": config.vocab_size,
        "bytes_per_token": bytes_per_token,
        "tokens": tokens,
        "epochs": tokens / facts.train_tokens,
        "steps": step,
        "batch": settings.batch_size,
        "window": settings.window,
        "train_loss": train_loss,
        "held_out_loss": held_out_loss,
        "first_loss": result.log[0][-1],
        "bits_per_byte": held_out_loss / math.log(2) / bytes_per_token,
        "windows": window_count,
        "unigram": unigram,
        "bigram": bigram,
        "device": result.device,
        "seconds": seconds,
        "rate": settings.learning_rate,
        "decay": settings.weight_decay,
        "seed": settings.seed,
        "balance": config.router_aux_loss_coef,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "this_python": platform.python_version(),
        "even": 1 / config.num_experts,
        "load": "\n".join(load),
    }
    (folder / "README.md").write_text(MODEL_CARD.format(**values))


def write_training_log(folder: Path, result: PretrainResult) -> None:
    with (folder / "training_log.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "tokens", "seconds", "train_loss", "held_out_loss"])
        for step, tokens, seconds, train_loss, held_out_loss in result.log:
            # The first evaluation is before any training, so it has no training loss.
            shown = "" if math.isnan(train_loss) else f"{train_loss:.4f}"
            writer.writerow([step, tokens, f"{seconds:.1f}", shown, f"{held_out_loss:.4f}"])


def write_data_card(folder: Path, train: list[Row], held_out: list[Row], longest: int) -> None:
    counts = [collections.Counter(row.task for row in rows) for rows in (train, held_out)]
    tasks = {task: (counts[0][task], counts[1][task]) for task in ("document", "signature", "arguments")}
    card = DATA_CARD.format(
        python=platform.python_version(),
        copyright=sys.copyright.splitlines()[0],
        longest=longest,
        total=(len(train), len(held_out)),
        **tasks,
    )
    (folder / "README.md").write_text(card)
