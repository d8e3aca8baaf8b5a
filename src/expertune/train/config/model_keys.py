"""The keys of what is trained: the model, the data and the adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MinLen

from expertune.train.config.fields import (
    BelowOne,
    ConfigModel,
    Count,
    Positive,
    RoleNames,
    ShareOrCount,
    Texts,
    Words,
    key,
)

DatasetType = Literal["chat_template", "prompt_completion", "alpaca", "completion"]
TokenName = Literal["bos_token", "eos_token", "pad_token", "unk_token"]
Targets = Annotated[list[str] | str, Words("a list of names, a regular expression, or all-linear")]
SpecialTokens = Annotated[
    dict[TokenName, str], Words("a mapping with bos_token, eos_token, pad_token or unk_token, each to a token's text")
]


class MessageProperties(ConfigModel):
    """The names that a message's parts have in the data."""

    role: str | None = key(None, "key of a message that says who speaks (default: role, or from where the data has it)")
    content: str | None = key(None, "key of a message with what is said (default: content, or value beside from)")


class DatasetConfig(ConfigModel):
    """One source of rows."""

    path: str = key(..., "file, folder, glob or hub id (org/name); or json, csv or parquet together with data_files")
    type: DatasetType | None = key(None, "format of the rows; left out, the columns decide")
    split: str | None = key(None, "split of a hub data set; of local files `train`, or rows of it: `train[:100]`")
    name: str | None = key(None, "configuration (subset) of a hub data set")
    revision: str | None = key(None, "commit, tag or branch of a hub data set")
    data_files: Texts | None = key(None, "files or globs to read inside path")
    ds_type: Literal["json", "jsonl", "csv", "parquet"] | None = key(
        None, "format of files whose suffix does not say it"
    )
    field_messages: str | None = key(None, "column with the list of messages (default: messages, or conversations)")
    message_property_mappings: MessageProperties | None = key(None, "names of a message's parts in the data")
    message_field_role: str | None = key(None, "older spelling of message_property_mappings.role")
    message_field_content: str | None = key(None, "older spelling of message_property_mappings.content")
    roles: RoleNames | None = key(None, "names the data has for a role, e.g. `assistant: [gpt, model]`")
    field: str | None = key(None, "column of plain text, type completion (default: text)")
    field_instruction: str | None = key(None, "column of the instruction, type alpaca (default: instruction)")
    field_input: str | None = key(None, "column of the context, type alpaca (default: input)")
    field_output: str | None = key(None, "column of the answer, type alpaca (default: output)")


Datasets = Annotated[list[DatasetConfig], MinLen(1)]


class ModelKeys(ConfigModel):
    """Model"""

    base_model: str = key(..., "folder of the model, or its hub id (org/name)")
    tokenizer_config: str | None = key(None, "folder or hub id of the tokenizer (default: base_model)")
    trust_remote_code: bool = key(False, "run Python code that comes with the model; only for models you trust")
    attn_implementation: str | None = key(
        None,
        "attention: eager, sdpa, flex_attention, flash_attention_2, _3 or _4, or a kernel's hub id (default: "
        "Transformers chooses)",
    )
    flash_attention: bool | None = key(None, "older spelling of `attn_implementation: flash_attention_2`")
    chat_template: Literal["tokenizer_default", "chatml", "jinja"] = key(
        "tokenizer_default", "how a chat becomes text: the tokenizer's own template, ChatML, or chat_template_jinja"
    )
    chat_template_jinja: str | None = key(None, "a Jinja template, or the path of a file with one")
    special_tokens: SpecialTokens | None = key(None, "special tokens to change, from the tokenizer's vocabulary")
    eot_tokens: Texts | None = key(None, "tokens that end a turn, besides the end-of-sequence token")


class DataKeys(ConfigModel):
    """Data"""

    datasets: Datasets = key(..., "the sources to train on")
    test_datasets: Datasets | None = key(None, "sources for the held-out loss, instead of val_set_size")
    val_set_size: ShareOrCount = key(0, "rows held out of datasets for the held-out loss; 0: none")
    sequence_len: Positive = key(2048, "longest row, in tokens", argument="max_length")
    excess_length_strategy: Literal["raise", "drop", "truncate"] = key(
        "raise", "a row longer than sequence_len: stop before training, leave it out, or cut it (each is reported)"
    )
    skip_bad_rows: bool = key(False, "leave out rows that cannot be read and count them, instead of stopping")
    sample_packing: bool = key(
        False, "put several rows into one of sequence_len tokens, kept apart", argument="packing"
    )
    eval_sample_packing: bool | None = key(
        None, "the same for held-out rows (default: as sample_packing)", argument="eval_packing"
    )
    pad_to_sequence_len: bool = key(False, "pad every batch to sequence_len, so that all have one shape")
    train_on_inputs: bool = key(False, "count prompts and user turns in the loss as well, not only the answers")
    dataset_num_proc: Positive | None = key(None, "processes that tokenise (default: one)", argument="dataset_num_proc")
    dataloader_num_workers: Count = key(0, "processes that load batches; 0: none", argument="dataloader_num_workers")
    dataloader_pin_memory: bool = key(True, "copy batches to the GPU faster", argument="dataloader_pin_memory")
    dataloader_prefetch_factor: Positive | None = key(
        None, "batches each worker loads ahead (default: 2)", argument="dataloader_prefetch_factor"
    )
    dataloader_drop_last: bool = key(False, "leave out a last, smaller batch", argument="dataloader_drop_last")


class AdapterKeys(ConfigModel):
    """Adapter"""

    adapter: Literal["lora"] = key("lora", "kind of adapter")
    lora_r: Positive = key(16, "rank of the adapter")
    lora_alpha: Positive = key(32, "the adapter counts lora_alpha / lora_r times (see peft_use_rslora)")
    lora_dropout: BelowOne = key(0.0, "share of an adapter's inputs dropped; must be 0 when experts are adapted")
    lora_target_modules: Targets | None = key(
        None,
        "linear layers to adapt: names, a regular expression, or all-linear, which is refused where PEFT then "
        "doubles the experts' rank or adapts the router (default: the attention projections; []: none)",
    )
    lora_target_parameters: Texts | None = key(
        None, "expert parameters to adapt, e.g. mlp.experts.gate_up_proj (default: all of every expert; []: none)"
    )
    lora_router: bool = key(False, "adapt the routers as well")
    lora_modules_to_save: Texts | None = key(None, "modules to train in full and save with the adapter")
    peft_use_rslora: bool = key(False, "count the adapter lora_alpha / sqrt(lora_r) times instead")
    lora_model_dir: str | None = key(None, "folder of a trained adapter to go on from, with a fresh optimizer")
