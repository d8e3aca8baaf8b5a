"""The trainer of one process among several: the same losses, gradients and files as one process has.

The model is spread already (`integrations.sharded_model`), so accelerate must neither move nor wrap it. Changed is what
crosses processes: batches, gradients and their norm, held-out loss, checkpoints. Only the first process writes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from expertune.distributed.checkpoint import (
    deal_out_optimizer,
    deal_out_parameters,
    gather_optimizer,
    gather_parameters,
)
from expertune.distributed.gradients import clip_gradients, synchronise_gradients
from expertune.distributed.mesh import ParallelMesh
from expertune.distributed.parameters import ShardedParameter
from expertune.errors import ConfigError
from expertune.train.batches import FILLER, deal_out
from expertune.train.trainer import Trainer

ADAPTER_WEIGHTS, OPTIMIZER, SCHEDULER = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"


class ShardedTrainer(Trainer):
    """`Trainer` for a model that is spread over a mesh.

    mesh: the processes. parameters: what trains, from `spread_model`. The rest: SFTTrainer's.
    """

    current_gradient_accumulation_steps: float  # Trainer's

    def __init__(self, *args: Any, mesh: ParallelMesh, parameters: Sequence[ShardedParameter], **kwargs: Any) -> None:
        self.mesh, self.parameters = mesh, parameters
        self._num_real_batches: int | None = None  # of the step, over all processes
        super().__init__(*args, **kwargs)

    # The model stays as it is.

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """It is where it belongs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_model(model: Any, *args: Any, **kwargs: Any) -> Any:
            return prepare(model, device_placement=False, evaluation_mode=True)  # autocast, no wrapper

        self.accelerator.prepare_model = prepare_model

    # Batches.

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        return deal_out(loader, self.mesh.sizes.world, self.mesh.rank)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.aux_loss_enabled:
            real = torch.tensor([sum(FILLER not in batch for batch in batches)], device=self.args.device)
            self._num_real_batches = int(self.mesh.wire(None, "the trainer").sum(real, "counting batches", wait=True))
        return batches, num_items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """A filler counts nothing; the router's balance loss is the mean over the step's other batches."""
        is_filler = inputs.pop(FILLER, None) is not None
        if self._num_real_batches is None or not self.model.training:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        else:  # an evaluation before the first step has no number of steps to put back
            steps = self.current_gradient_accumulation_steps
            self.current_gradient_accumulation_steps = self._num_real_batches / self.mesh.sizes.world  # of a process
            try:
                result = super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                self.current_gradient_accumulation_steps = steps
        if not is_filler:
            return result
        return (result[0] * 0.0, *result[1:]) if isinstance(result, tuple) else result * 0.0

    # Gradients.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.mesh.wire(None, f"step {self.state.global_step + 1}").naming("gathering or summing shards"):
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            synchronise_gradients(self.parameters, self.mesh)
        return loss

    def _clip_grad_norm(self, model: Any) -> Tensor:
        return clip_gradients(self.parameters, self.args.max_grad_norm, self.mesh)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return clip_gradients(self.parameters, float("inf"), self.mesh) if grad_norm is None else grad_norm

    # Held-out loss.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            sums = torch.tensor(self._eval_sums, dtype=torch.float64, device=self.args.device)
            nats, tokens = self.mesh.wire(None, "the trainer").sum(sums, "the held-out loss", wait=True).tolist()
            self._eval_sums = nats, int(tokens)
        super().log(logs, *args, **kwargs)

    # Saving and resuming, in the form of one process.

    def write_adapter(self, folder: Path) -> None:
        """Gather the adapter and write it as PEFT does; every process must call it, the first one writes."""
        wholes = gather_parameters(self.parameters, self.mesh)
        if self.mesh.is_first:
            self.model.save_pretrained(str(folder), state_dict=wholes)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.mesh.is_first:
            super()._save_checkpoint(model, trial)
        else:
            super(Trainer, self)._save_checkpoint(model, trial)  # takes part in the gathers, writes nothing
        self.mesh.wire(None, "the trainer").barrier("saving a checkpoint")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        wholes = gather_parameters(self.parameters, self.mesh)
        if self.mesh.is_first:
            self._save(output_dir, state_dict=wholes)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        whole = gather_optimizer(self._own_optimizer(), self.parameters, self.mesh)
        if self.mesh.is_first:
            torch.save(whole, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        """One file, of the first process: batches and steps draw nothing but dropout of attention's adapters."""
        if self.mesh.is_first:
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / ADAPTER_WEIGHTS)
        wholes = {sharded.name: saved.get(_name_in_file(sharded.name)) for sharded in self.parameters}
        missing = sorted(name for name, whole in wholes.items() if whole is None)
        if missing:
            raise ConfigError(f"resume_from_checkpoint: {resume_from_checkpoint} has no {missing[0]}")
        deal_out_parameters({n: whole for n, whole in wholes.items() if whole is not None}, self.parameters, self.mesh)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        whole = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        deal_out_optimizer(whole, self._own_optimizer(), self.parameters, self.mesh)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _own_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's
        return inner


def _name_in_file(name: str) -> str:
    """PEFT leaves the adapter's name out of its file's keys."""
    return name.replace(".default.", ".")
