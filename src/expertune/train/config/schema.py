"""The configuration: one frozen tree, its keys grouped in the order a reader wants."""

from __future__ import annotations

from expertune.train.config.fields import ConfigModel
from expertune.train.config.model_keys import AdapterKeys, DataKeys, ModelKeys
from expertune.train.config.run_keys import ExpertKeys, LoggingKeys, ParallelKeys, PrecisionKeys, TrainingKeys

SECTIONS: tuple[type[ConfigModel], ...] = (
    ModelKeys,
    DataKeys,
    AdapterKeys,
    TrainingKeys,
    PrecisionKeys,
    ExpertKeys,
    ParallelKeys,
    LoggingKeys,
)
"""Each section's docstring is its title."""


class TrainConfig(LoggingKeys, ParallelKeys, ExpertKeys, PrecisionKeys, TrainingKeys, AdapterKeys, DataKeys, ModelKeys):
    """Everything `expertune train` reads. Keys have Axolotl's names wherever it has one.

    As `load_config` returns it, it is settled: shorthands (flash_attention, use_scattermoe, use_sonicmoe,
    use_tensorboard, use_wandb, message_field_role, message_field_content) have gone into the keys that they stand for
    and are None; eval_strategy, save_strategy, report_to, eval_batch_size and eval_sample_packing are never None;
    sonicmoe_lora is None unless the experts run on sonicmoe, and then never; one of warmup_steps and warmup_ratio is
    set; chat_template_jinja is a template; local paths are absolute.
    """

    @property
    def has_heldout(self) -> bool:
        """Whether some rows are held out to measure a loss on."""
        return bool(self.test_datasets) or self.val_set_size > 0
