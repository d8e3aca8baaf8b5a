"""An adapter merged into a full checkpoint, and the proof that it is the same model."""

import gc
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertune.errors import ConfigError, ExpertuneError
from expertune.train.config import TrainConfig
from expertune.train.model import load_adapter, load_model, load_tokenizer
from expertune.train.saving import check_new_folder, check_room, whole_folder

# Merging rounds W + s B A to the dtype of W once a weight; the logits then differ by a few such roundings.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Two right ways to compute the same model differ by this much; an adapter that changes less cannot be told from none.
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NUM_CHECK_TOKENS = 64


@dataclass(frozen=True)
class MergeReport:
    """relative_error: ||merged - unmerged|| / ||unmerged|| of a token's logits, the median over tokens.
    adapter_effect: the same for base - unmerged.

    tolerance: what was allowed, no more than half the adapter's effect where that is above rounding, so that a merge
    that lost the adapter does not pass.
    """

    folder: Path
    relative_error: float
    tolerance: float
    adapter_effect: float


def merge(config: TrainConfig, adapter: Path, output: Path) -> MergeReport:
    """Write the base model with the adapter merged in, as plain Transformers loads it.

    Every weight keeps the dtype that it has in the base checkpoint, whatever the configuration trains in: W + s B A is
    computed in fp32 and rounded once. The merged model is read back from disk, with Transformers' own experts, and its
    logits on random tokens are compared with the unmerged model's; only then does the folder get its name.
    Raises ConfigError if `output` exists or cannot be written, ExpertuneError if the merged model is another model.
    """
    check_new_folder("--output", output)
    tokenizer = load_tokenizer(config)
    base = load_model(config, dtype="auto")
    dtype = base.dtype
    if dtype not in TOLERANCE:
        raise ConfigError(
            f"base_model: the weights in {config.base_model} are stored as {dtype}, into which an adapter cannot be "
            f"merged; it takes {', '.join(str(each).removeprefix('torch.') for each in TOLERANCE)}"
        )
    check_room("--output", output, sum(weight.nbytes for weight in base.parameters()), "merged checkpoint")
    dtypes = {name: weight.dtype for name, weight in base.named_parameters()}
    model = load_adapter(base, adapter)
    del base
    ids = torch.randint(
        model.config.get_text_config().vocab_size,
        (1, NUM_CHECK_TOKENS),
        generator=torch.Generator().manual_seed(config.seed),
    ).to(model.device)
    unmerged = _logits(model, ids)
    with model.disable_adapter():
        adapter_effect = _distance(_logits(model, ids), unmerged)
    with whole_folder(output) as folder:
        _merged(model, dtypes).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        device = model.device
        del model
        gc.collect()
        reread = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", trust_remote_code=config.trust_remote_code
        ).to(device)
        if reread.dtype != dtype:
            raise ExpertuneError(f"the merged model reads back as {reread.dtype}, not {dtype}; nothing was written")
        error = _distance(_logits(reread, ids), unmerged)
        tolerance = min(TOLERANCE[dtype], max(ROUNDING[dtype], adapter_effect / 2))
        if not error <= tolerance:
            raise ExpertuneError(
                f"the merged model differs from the unmerged one by {error:.1e} in the logits "
                f"(allowed in {dtype}: {tolerance:.0e}); nothing was written"
            )
    return MergeReport(output, error, tolerance, adapter_effect)


def _merged(model: PeftModel, dtypes: dict[str, torch.dtype]) -> PreTrainedModel:
    """The base model with the adapter in its weights, each merged in fp32 and then rounded to its own dtype.

    PEFT rounds s B A to the dtype of W before it adds and again after, so it merges one weight at a time here, with
    that weight in fp32.
    """
    for weight, layer in _adapted(model.modules()):
        stored = weight.dtype
        weight.data = weight.data.float()
        layer.merge(safe_merge=True)
        weight.data = weight.data.to(stored)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():
        # modules_to_save may train in fp32; the base has no weight of that name where PEFT unties embeddings and head
        weight.data = weight.data.to(dtypes.get(name, merged.dtype))
    return merged


def _adapted(modules: Iterable[nn.Module]) -> Iterable[tuple[nn.Parameter, LoraLayer]]:
    """Every adapted weight with PEFT's layer around it."""
    for layer in list(modules):
        if isinstance(layer, LoraLayer):
            name = getattr(layer, "parameter_name", "weight")
            yield getattr(layer.get_base_layer(), name), layer


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits.float()


def _distance(got: Tensor, want: Tensor) -> float:
    """The median over tokens of ||got - want|| / ||want||.

    Not the mean: in bf16 a token with two equally likely experts may get the other one and is far off, in a right merge
    too (0.37 for the worst of 128 tokens of the shipped model, where the median is 0.02); in a wrong one all are.
    """
    return ((got - want).norm(dim=-1) / want.norm(dim=-1)).median().item()
