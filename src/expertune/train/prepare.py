"""Everything that can be wrong before a model is loaded: output folder, tokenizer, data, lengths."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from expertune.train.config import DatasetConfig, TrainConfig
from expertune.train.data import LossPlan, Rows, SourceSpec, check_lengths, load_data, loss_plan
from expertune.train.model import load_tokenizer
from expertune.train.sources import adapter_folder, check_base_model


@dataclass(frozen=True)
class Prepared:
    """Checked inputs of a run."""

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    heldout: Rows | None
    plan: LossPlan


def prepare(config: TrainConfig, console: Console) -> Prepared:
    """Load the tokenizer and the data, check every row, and print what was found.

    Raises ConfigError or DataError, complete, before any model is loaded.
    """
    check_base_model(config)
    if config.lora_model_dir is not None:
        adapter_folder("lora_model_dir", Path(config.lora_model_dir))
    tokenizer = load_tokenizer(config)
    data = load_data(
        [_source(entry) for entry in config.datasets],
        heldout_specs=[_source(entry) for entry in config.test_datasets or ()],
        val_set_size=config.val_set_size,
        seed=config.seed,
        skip_bad_rows=config.skip_bad_rows,
    )
    plan = loss_plan(data.train.shape, tokenizer, train_on_inputs=config.train_on_inputs)
    console.print("[bold]data[/]")
    for line in [*data.report.lines(), *plan.notes]:
        console.print(f"  {line}", markup=False)
    train = _fitting("training", data.train, tokenizer, plan, config, console)
    heldout = None if data.heldout is None else _fitting("held out", data.heldout, tokenizer, plan, config, console)
    return Prepared(tokenizer, train, heldout, plan)


def _fitting(
    name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, plan: LossPlan, config: TrainConfig, console: Console
) -> Rows:
    rows, lengths = check_lengths(
        rows,
        tokenizer,
        plan,
        sequence_len=config.sequence_len,
        strategy=config.excess_length_strategy,
        skip_bad_rows=config.skip_bad_rows,
    )
    for line in lengths.lines():
        console.print(f"  {name}: {line}", markup=False)
    return rows


def _source(entry: DatasetConfig) -> SourceSpec:
    mappings = entry.message_property_mappings
    return SourceSpec(
        path=entry.path,
        type=entry.type,
        split=entry.split,
        name=entry.name,
        revision=entry.revision,
        data_files=tuple(entry.data_files or ()),
        ds_type=entry.ds_type,
        field_messages=entry.field_messages,
        role_key=mappings.role if mappings else None,
        content_key=mappings.content if mappings else None,
        roles={role: tuple(names) for role, names in (entry.roles or {}).items()},
        field=entry.field,
        field_instruction=entry.field_instruction,
        field_input=entry.field_input,
        field_output=entry.field_output,
    )
