"""One training run, from a configuration to an adapter on disk."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainerCallback, set_seed

from expertune.distributed.mesh import ParallelMesh, leave_mesh
from expertune.distributed.side_stream import SideStream
from expertune.errors import ConfigError, ExpertuneError, Interrupted
from expertune.files import write_whole
from expertune.integrations.audit import AdapterAudit, audit
from expertune.integrations.saved_adapter import open_adapter, read_adapter
from expertune.integrations.sharded_model import spread_model
from expertune.integrations.shared_overlap import overlap_shared_experts
from expertune.integrations.targets import summarise_trainable
from expertune.layers.backends import AUTO, pick_backend
from expertune.train.arguments import set_intervals, sft_config
from expertune.train.callbacks import ShowProgress, StopOnSignal, Stopped, StopTogether
from expertune.train.config import TrainConfig, resolved_yaml, wandb_environment
from expertune.train.generation import reply
from expertune.train.memory import peak_memory_bytes
from expertune.train.model import add_adapter, compute_dtype, load_model, load_skeleton, model_options
from expertune.train.prepare import Prepared, prepare
from expertune.train.processes import check_rows_per_step, from_first, is_first, join_processes, largest
from expertune.train.records import RecordKernels
from expertune.train.saving import CHECKPOINT_PREFIX, check_output_dir, checkpoints, tidy, whole_folder
from expertune.train.sharded_trainer import ShardedTrainer
from expertune.train.trainer import Trainer

ADAPTER = "adapter"
RESOLVED_CONFIG = "expertune.yaml"
REPORT = "report.json"


@dataclass
class RunReport:
    """What a run did, as `report.json` has it. Losses are nats per trained token; `samples` are (prompt, reply).

    log: what was logged at each logging step and evaluation, also before a resumption.
    adapter_audit: what the saved adapter holds, read back from its file.
    overlapped_layers: in how many layers shared experts run while tokens travel.
    """

    base_model: str
    experts_backend: str
    trainable_parameters: int = 0
    resumed_from: str | None = None
    steps: int = 0
    heldout_loss_before: float | None = None
    heldout_loss_after: float | None = None
    train_loss: float | None = None
    seconds: float = 0.0
    peak_memory_gib: float = 0.0
    samples_before: list[tuple[str, str]] = field(default_factory=list)
    samples_after: list[tuple[str, str]] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    adapter_audit: AdapterAudit | None = None
    overlapped_layers: int = 0


def train(config: TrainConfig, console: Console, *, resume_command: str, resume: bool = False) -> RunReport:
    """Fine-tune, and leave in `output_dir`: the adapter, the resolved configuration, checkpoints, a report.

    resume: continue from the newest checkpoint in output_dir (or from config.resume_from_checkpoint).
    resume_command: what to type to continue, said when a signal stops the run.
    Raises ConfigError or DataError before training if anything is wrong; Interrupted after a signal.
    """
    mesh = join_processes(config)
    if mesh is not None and not mesh.is_first:
        console = Console(quiet=True)
    os.environ.update(wandb_environment(config))
    output_dir = Path(config.output_dir)
    checkpoint = from_first(mesh, lambda: _open_output_dir(config, output_dir, resume, console))
    prepared = prepare(config, console)
    set_seed(config.seed)
    model = add_adapter(load_model(config) if mesh is None else load_skeleton(config), config)
    _print_what_trains(model, config, console)
    from_first(mesh, lambda: check_output_dir(output_dir, need_bytes=_checkpoint_bytes(model, config)))
    report = RunReport(
        base_model=config.base_model,
        experts_backend=_backend_in_words(config),
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        resumed_from=str(checkpoint) if checkpoint else None,
    )
    stop = StopOnSignal() if mesh is None else StopTogether(mesh)
    progress, records = ShowProgress(console), RecordKernels()
    trainer = _trainer(model, prepared, config, [stop, progress, records], mesh, resumed=checkpoint is not None)
    records.also_log_to(trainer)
    if mesh is not None:
        report.overlapped_layers = overlap_in(model, trainer.args.device, console)
    if is_first(mesh):
        write_whole(output_dir / RESOLVED_CONFIG, resolved_yaml(config))
    start = time.perf_counter()
    try:
        with stop.listening():
            if checkpoint is None:
                report.samples_before = _samples(trainer, prepared, config, mesh)
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if stop.stopped_by is None:  # otherwise a checkpoint is saved, and there is more to train
                report.adapter_audit = _save_adapter(trainer, prepared, config, mesh)
                report.train_loss = result.training_loss
                _look_at_the_end(trainer, prepared, config, report, mesh)
    except Stopped:
        trainer.save_now()
    finally:
        progress.close()
        records.close()
    if stop.stopped_by is not None:
        leave_mesh()
        raise _interrupted(stop.stopped_by, output_dir, trainer.state.global_step, resume_command)
    report.seconds = time.perf_counter() - start
    report.peak_memory_gib = largest(mesh, peak_memory_bytes() / 2**30)
    if is_first(mesh):
        write_whole(output_dir / REPORT, json.dumps(asdict(report), indent=2) + "\n")
    leave_mesh()
    return report


def _open_output_dir(config: TrainConfig, output_dir: Path, resume: bool, console: Console) -> Path | None:
    """Make the folder ready to be written; returns the checkpoint to resume from."""
    checkpoint = _checkpoint_to_resume(config, output_dir, resume)
    if checkpoint is not None:
        check_rows_per_step(checkpoint, config)
    check_output_dir(output_dir, need_bytes=0)
    for line in tidy(output_dir):
        console.print(f"{output_dir}: {line}", markup=False)
    return checkpoint


def _checkpoint_to_resume(config: TrainConfig, output_dir: Path, resume: bool) -> Path | None:
    if config.resume_from_checkpoint is not None:
        folder = Path(config.resume_from_checkpoint)
        if not (folder / "trainer_state.json").is_file():
            there = [path.name for path in checkpoints(folder)] if folder.is_dir() else []
            raise ConfigError(
                f"resume_from_checkpoint: {folder} is no checkpoint (no trainer_state.json); need a "
                f"{CHECKPOINT_PREFIX}N folder of a run" + (f"; inside it are {', '.join(there)}" if there else "")
            )
        return folder
    found = checkpoints(output_dir) if output_dir.is_dir() else []
    if config.auto_resume_from_checkpoints and found:
        return found[-1]
    if resume:
        if not found:
            raise ConfigError(f"--resume: {output_dir} has no checkpoint; start without --resume")
        return found[-1]
    if found or (output_dir / ADAPTER).exists():
        raise ConfigError(
            f"output_dir: {output_dir} holds an earlier run. Continue it with --resume, choose another output_dir, "
            "or delete it."
        )
    return None


def _trainer(
    model: PeftModel,
    prepared: Prepared,
    config: TrainConfig,
    callbacks: list[TrainerCallback],
    mesh: ParallelMesh | None,
    *,
    resumed: bool,
) -> Trainer:
    args = sft_config(config, prepared.plan)
    args.eval_on_start = config.eval_on_start and not resumed
    make: Callable[..., Trainer] = Trainer
    if mesh is not None:
        parameters = spread_model(
            model,
            config.base_model,
            compute_dtype(config),
            mesh,
            args.device,
            deep_ep=config.expert_parallel_backend == "deep_ep",
            **model_options(config),
        )
        make = partial(ShardedTrainer, mesh=mesh, parameters=parameters)
    trainer = make(
        model=model,
        args=args,
        train_dataset=prepared.train.dataset,
        eval_dataset=prepared.heldout.dataset if prepared.heldout is not None else None,
        processing_class=prepared.tokenizer,
        callbacks=callbacks,
    )
    set_intervals(args, config, num_batches=len(trainer.get_train_dataloader()))
    return trainer


def overlap_in(model: nn.Module, device: torch.device, console: Console) -> int:
    """Let shared experts run while tokens travel between GPUs; prints and returns in how many layers."""
    if device.type != "cuda":
        return 0
    num_layers = len(overlap_shared_experts(model, SideStream(device)).layers)
    if num_layers:
        console.print(f"shared experts run while tokens travel: in {num_layers} layers")
    return num_layers


def _save_adapter(trainer: Trainer, prepared: Prepared, config: TrainConfig, mesh: ParallelMesh | None) -> AdapterAudit:
    """Write the run's adapter, whole or not at all."""
    target = Path(config.output_dir) / ADAPTER

    def write() -> AdapterAudit:
        with whole_folder(target) as folder:
            trainer.write_adapter(folder)
            prepared.tokenizer.save_pretrained(str(folder))
            return _audit(trainer.model, folder, config, mesh)

    if not is_first(mesh):
        trainer.write_adapter(target)  # takes part in the gather, writes nothing
    return from_first(mesh, write)


def _audit(model: PeftModel, folder: Path, config: TrainConfig, mesh: ParallelMesh | None) -> AdapterAudit:
    """Read the adapter back from the file; raises ExpertuneError if it is not whole."""
    if mesh is None:
        saved_adapter = read_adapter(model, folder)
    else:  # the model here is a part
        saved_adapter = open_adapter(folder, config.base_model, trust_remote_code=config.trust_remote_code)
    found, output_dir = audit(saved_adapter), Path(config.output_dir)
    if found.problems:
        lines = "\n".join(f"  {line}" for line in found.problems[:10])
        saved = checkpoints(output_dir)
        where = f"what was trained is in {saved[-1]}" if saved else "no checkpoint was saved"
        raise ExpertuneError(f"the trained adapter is not whole, so it was not saved ({where}):\n{lines}")
    return found


def _look_at_the_end(
    trainer: Trainer, prepared: Prepared, config: TrainConfig, report: RunReport, mesh: ParallelMesh | None
) -> None:
    """Held-out loss and samples of the trained model, into the report."""
    report.samples_after = _samples(trainer, prepared, config, mesh)
    report.steps = trainer.state.global_step
    if prepared.heldout is not None and _logged_heldout_loss(trainer, report.steps) is None:
        trainer.evaluate()
    report.heldout_loss_before = _logged_heldout_loss(trainer, 0)
    report.heldout_loss_after = _logged_heldout_loss(trainer, report.steps)
    report.log = trainer.state.log_history


def _samples(
    trainer: Trainer, prepared: Prepared, config: TrainConfig, mesh: ParallelMesh | None
) -> list[tuple[str, str]]:
    return [
        (
            prompt,
            reply(
                trainer.model,
                prepared.tokenizer,
                prompt,
                max_new_tokens=config.sample_max_new_tokens,
                stop_tokens=tuple(config.eot_tokens or ()),
                together=mesh is not None,
            ),
        )
        for prompt in config.sample_prompts
    ]


def _logged_heldout_loss(trainer: Trainer, step: int) -> float | None:
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log and log["step"] == step]
    return losses[-1] if losses else None


def _print_what_trains(model: PeftModel, config: TrainConfig, console: Console) -> None:
    table = Table("part", "modules", "adapted", "parameters", "trainable", title="what trains")
    for row in summarise_trainable(model):
        table.add_row(
            row.part,
            str(row.num_modules),
            str(row.num_adapted) if row.num_adapted else "frozen",
            f"{row.num_parameters:,}",
            f"{row.num_trainable:,}",
        )
    console.print(table)
    console.print(f"experts run on: {_backend_in_words(config)}", markup=False)


def _backend_in_words(config: TrainConfig) -> str:
    if config.experts_implementation == AUTO:
        return f"{pick_backend()} (the best that runs here)"
    if config.sonicmoe_lora is not None:
        return f"{config.experts_implementation}, sonicmoe_lora: {config.sonicmoe_lora}"
    return config.experts_implementation


def _checkpoint_bytes(model: PeftModel, config: TrainConfig) -> int:
    """What the checkpoints that are kept at one time, the one being written and the final adapter will take."""
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    one_checkpoint = 3 * trainable + 2**24  # adapter and two Adam moments; tokenizer and states: 16 MiB is ample
    return one_checkpoint * ((config.save_total_limit or 1) + 1) + trainable


def _interrupted(signal_name: str, output_dir: Path, step: int, resume_command: str) -> Interrupted:
    if (output_dir / ADAPTER).exists():
        return Interrupted(
            f"stopped by {signal_name} after the last step; the adapter is complete: {output_dir / ADAPTER}.\n"
            f"What is missing is the report; `expertune eval {output_dir}` measures the held-out loss."
        )
    found = checkpoints(output_dir)
    if not found:
        return Interrupted(f"stopped by {signal_name} before the first step; nothing was trained, so nothing is lost")
    return Interrupted(f"stopped by {signal_name} at step {step}; saved {found[-1]}.\nContinue with: {resume_command}")
