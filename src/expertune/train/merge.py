"""An adapter merged into a full checkpoint, and the proof that it is the same model."""

import gc
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertune.errors import ConfigError, ExpertuneError
from expertune.train.config import TrainConfig
from expertune.train.model import load_adapter, load_model, load_tokenizer
from expertune.train.saving import whole_folder

# Merging rounds W + s B A to the dtype of W once a weight; the logits then differ by a few such roundings.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Two right ways to compute the same model differ by this much; an adapter that changes less cannot be told from none.
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NUM_CHECK_TOKENS = 64


@dataclass(frozen=True)
class MergeReport:
    """relative_error: ||merged - unmerged|| / ||unmerged||, of logits. adapter_effect: the same for base - unmerged.

    tolerance: what was allowed, no more than half the adapter's effect where that is above rounding, so that a merge
    that lost the adapter does not pass.
    """

    folder: Path
    relative_error: float
    tolerance: float
    adapter_effect: float


def merge(config: TrainConfig, adapter: Path, output: Path) -> MergeReport:
    """Write the base model with the adapter merged in, as plain Transformers loads it.

    The merged model is read back from disk, with Transformers' own experts, and its logits on random tokens are
    compared with the unmerged model's; only then does the folder get its name. Raises ConfigError if `output` exists
    or cannot be written, ExpertuneError if the merged model is another model.
    """
    _check_output(output)
    tokenizer = load_tokenizer(config)
    base = load_model(config)
    _check_room(output, sum(weight.nbytes for weight in base.parameters()))
    model = load_adapter(base, adapter)
    del base
    ids = torch.randint(
        model.config.get_text_config().vocab_size,
        (1, NUM_CHECK_TOKENS),
        generator=torch.Generator().manual_seed(config.seed),
    ).to(model.device)
    unmerged = _logits(model, ids)
    with model.disable_adapter():
        adapter_effect = _relative(_logits(model, ids), unmerged)
    dtype = model.dtype
    with whole_folder(output) as folder:
        model.merge_and_unload(safe_merge=True).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        device = model.device
        del model
        gc.collect()
        reread = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=config.trust_remote_code
        ).to(device)
        error = _relative(_logits(reread, ids), unmerged)
        tolerance = min(TOLERANCE[dtype], max(ROUNDING[dtype], adapter_effect / 2))
        if not error <= tolerance:
            raise ExpertuneError(
                f"the merged model differs from the unmerged one by {error:.1e} in the logits "
                f"(allowed in {dtype}: {tolerance:.0e}); nothing was written"
            )
    return MergeReport(output, error, tolerance, adapter_effect)


def _check_output(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise ConfigError(f"--output: {output} exists; choose another folder or delete it")
    try:
        with tempfile.TemporaryDirectory(dir=_existing_parent(output), prefix=".partial-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output: {output} cannot be written ({error.strerror or error}); choose another folder"
        ) from error


def _check_room(output: Path, need_bytes: int) -> None:
    free_bytes = shutil.disk_usage(_existing_parent(output)).free
    if free_bytes < need_bytes:
        raise ConfigError(
            f"--output: the disk of {output} has {free_bytes / 2**20:,.0f} MiB free, and the merged checkpoint takes "
            f"{need_bytes / 2**20:,.0f} MiB; free some space or choose another folder"
        )


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits.float()


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
