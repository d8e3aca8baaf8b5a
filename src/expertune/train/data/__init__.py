"""Data sets: read, validated row by row, and handed to TRL in its own formats. Packing and masks are TRL's.

data = load_data([SourceSpec("chats.jsonl")], val_set_size=0.05, seed=0)
plan = loss_plan(data.train.shape, tokenizer, train_on_inputs=False)
train, lengths = check_lengths(data.train, tokenizer, plan, sequence_len=2048)
SFTTrainer(..., train_dataset=train.dataset, args=SFTConfig(max_length=2048, **plan.sft_options()))
"""

from expertune.train.data.lengths import LengthReport, check_lengths
from expertune.train.data.load import LoadedData, load_data
from expertune.train.data.masks import LossPlan, MaskSupport, assistant_mask_support, loss_plan
from expertune.train.data.report import DataReport, SourceReport
from expertune.train.data.spec import SUPPORTED_TYPES, SourceSpec
from expertune.train.data.store import Rows
from expertune.train.data.templates import CHATML, CHATML_TOKENS, alpaca_prompt

__all__ = [
    "CHATML",
    "CHATML_TOKENS",
    "SUPPORTED_TYPES",
    "DataReport",
    "LengthReport",
    "LoadedData",
    "LossPlan",
    "MaskSupport",
    "Rows",
    "SourceReport",
    "SourceSpec",
    "alpaca_prompt",
    "assistant_mask_support",
    "check_lengths",
    "load_data",
    "loss_plan",
]
