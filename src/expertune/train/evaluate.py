"""Held-out loss of a configuration's data, with an adapter and without."""

import tempfile
from pathlib import Path

from peft import PeftModel
from rich.console import Console

from expertune.errors import ConfigError
from expertune.train.arguments import sft_config
from expertune.train.config import TrainConfig
from expertune.train.model import load_adapter, load_model
from expertune.train.prepare import prepare
from expertune.train.trainer import Trainer
from expertune.train.use import find_adapter


def evaluate(config: TrainConfig, console: Console, *, adapter: Path | None) -> dict[str, float]:
    """Compute the held-out loss in nats per trained token: {"base": ..., "adapter": ...}.

    adapter: a folder; None: the run's own. Raises ConfigError if the configuration holds no row out.
    """
    if not config.has_heldout:
        raise ConfigError(
            "val_set_size, test_datasets: neither is set, so nothing is held out to measure a loss on; "
            "add --set test_datasets.0.path=FILE with rows that were not trained on"
        )
    folder = find_adapter(config, adapter)
    prepared = prepare(config, console)
    assert prepared.heldout is not None
    model: PeftModel = load_adapter(load_model(config), folder)
    with tempfile.TemporaryDirectory() as scratch:
        quiet = config.model_copy(update={"report_to": [], "eval_strategy": "no"})
        args = sft_config(quiet, prepared.plan, output_dir=scratch)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=prepared.heldout.dataset,
            eval_dataset=prepared.heldout.dataset,
            processing_class=prepared.tokenizer,
        )
        with model.disable_adapter():
            base = trainer.evaluate()["eval_loss"]
        return {"base": base, "adapter": trainer.evaluate()["eval_loss"]}
