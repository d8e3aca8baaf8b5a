"""A whole estimate, from a configuration to the memory of a GPU and the smallest layout that fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from expertune.distributed.sizes import ParallelSizes, divisors
from expertune.errors import ConfigError
from expertune.estimate.layout import GpuMemory, layouts_of, memory_on
from expertune.estimate.model import EAGER, ModelBytes, build_on_meta, compute_dtype_on_gpu, count
from expertune.estimate.optimizers import optimizer_bytes
from expertune.estimate.step import Course, Paper, Rows, Step
from expertune.layers.backends import AUTO, SCATTERMOE, TORCH_GROUPED
from expertune.train.config import TrainConfig, load_config
from expertune.train.config.reading import read_config
from expertune.train.config.run_keys import Optimizer

_BACKENDS = (SCATTERMOE, TORCH_GROUPED)


@dataclass(frozen=True)
class Settings:
    """A configuration as another machine will run it. backend: of the experts, there. notes: what was assumed."""

    config: TrainConfig
    backend: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """What a configuration takes.

    model: whole, counted. configured: a GPU's memory with the layout of the configuration. checkpointed, plain: its
    total with gradient checkpointing and without. smallest: of the fewest GPUs that fit, None if none does or none
    were named. least: where none fits, the one that needs least. gpu_bytes, num_gpus: what was named.
    """

    settings: Settings
    model: ModelBytes
    configured: GpuMemory
    checkpointed_bytes: int
    plain_bytes: int
    gpu_bytes: int | None
    num_gpus: int
    smallest: GpuMemory | None
    least: GpuMemory | None


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Load a configuration for a machine that is not this one: what only that one must have is not asked for here.

    Raises ConfigError, as training does, and for what cannot be estimated.
    """
    asked = read_config(path, overrides).values
    backend = asked.get("experts_implementation", AUTO)
    if asked.get("use_scattermoe", "false").lower() == "true":
        backend = SCATTERMOE
    elsewhere = ["report_to=none"]
    if backend in (AUTO, *_BACKENDS):
        elsewhere += [f"experts_implementation={AUTO}", "use_scattermoe="]
    optimizer = asked.get("optimizer")
    if optimizer in get_args(Optimizer):
        elsewhere.append("optimizer=adamw_torch_fused")
    config = load_config(path, [*overrides, *elsewhere]).config
    if optimizer is not None:
        config = config.model_copy(update={"optimizer": optimizer})
    if config.experts_implementation != AUTO:
        raise ConfigError(
            f"experts_implementation: got {config.experts_implementation}; the estimate knows {AUTO} (on a GPU: "
            f"{SCATTERMOE}) and {', '.join(_BACKENDS)}"
        )
    if config.activation_offloading:
        raise ConfigError("activation_offloading: the estimate does not know it; remove it to see what it has to save")
    return Settings(config, SCATTERMOE if backend == AUTO else backend, tuple(_assumptions(config)))


def step_of(settings: Settings, *, checkpointing: bool, expert_parallel: int = 1, rows: Rows | None = None) -> Step:
    """The step that a configuration runs. rows: instead of what its packing and batch size mean."""
    config = settings.config
    return Step(
        batch_size=config.micro_batch_size,
        sequence_len=config.sequence_len,
        dtype=compute_dtype_on_gpu(config),
        backend=settings.backend,
        checkpointing=checkpointing,
        reentrant=bool((config.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)),
        rows=rows or _rows_of(config),
        expert_parallel=expert_parallel,
        accumulates=config.gradient_accumulation_steps > 1,
        balance_coefficient=config.router_aux_loss_coef,
    )


def estimate(settings: Settings, *, gpu_bytes: int | None = None, num_gpus: int = 8) -> Estimate:
    """Run the configuration's step on paper, and look for the layout that fits.

    gpu_bytes: of each of the GPUs named, None if none were. num_gpus: how many there are; a layout takes a divisor.
    """
    config = settings.config
    built = build_on_meta(config)
    model, optimizer = count(built), optimizer_bytes(config.optimizer)
    paper = Paper(built)
    layout = ParallelSizes(config.expert_parallel_size, config.dp_shard_size, config.dp_replicate_size or 1)
    if model.num_experts % layout.expert:
        raise ConfigError(f"expert_parallel_size: {model.num_experts} experts do not divide by {layout.expert}")
    courses: dict[tuple[bool, int], Course] = {}

    def course(checkpointing: bool, expert_parallel: int) -> Course:
        key = (checkpointing, expert_parallel)
        if key not in courses:
            step = step_of(settings, checkpointing=checkpointing, expert_parallel=expert_parallel)
            courses[key] = paper.run(step)
        return courses[key]

    def on(layout: ParallelSizes, checkpointing: bool) -> GpuMemory:
        return memory_on(layout, model, optimizer, course(checkpointing, layout.expert))

    wanted = config.gradient_checkpointing
    configured, other = on(layout, wanted), on(layout, not wanted).total_bytes
    found: GpuMemory | None = None
    least: GpuMemory | None = None
    if gpu_bytes is not None:
        tried = []
        for each in _smaller_first(num_gpus, model):
            tried.append(on(each, wanted))
            if tried[-1].total_bytes <= gpu_bytes:
                found = tried[-1]
                break
        else:
            least = min(tried, key=lambda each: each.total_bytes)
    return Estimate(
        settings=settings,
        model=model,
        configured=configured,
        checkpointed_bytes=configured.total_bytes if wanted else other,
        plain_bytes=other if wanted else configured.total_bytes,
        gpu_bytes=gpu_bytes,
        num_gpus=num_gpus,
        smallest=found,
        least=least,
    )


def _smaller_first(num_gpus: int, model: ModelBytes) -> list[ParallelSizes]:
    """Layouts without copies: fewest GPUs first, then the one whose GPUs hold least of the frozen weights."""
    layouts = [each for n in divisors(num_gpus) for each in layouts_of(n, model.num_experts) if each.replicate == 1]
    return sorted(layouts, key=lambda each: (each.world, each.shard))


def _rows_of(config: TrainConfig) -> Rows:
    attention = config.attn_implementation or ""
    if "flash" in attention or "flex" in attention:
        return "full"
    if config.sample_packing:
        return "packed"
    return "full" if config.micro_batch_size == 1 and not config.pad_to_sequence_len else "padded"


def _assumptions(config: TrainConfig) -> list[str]:
    rows = {
        "full": f"every batch is {config.micro_batch_size} x {config.sequence_len} tokens, attention needs no mask",
        "padded": f"every batch is {config.micro_batch_size} x {config.sequence_len} tokens, shorter rows padded",
        "packed": f"every batch is one row of {config.micro_batch_size * config.sequence_len} packed tokens; "
        "with attn_implementation: flash_attention_2 it needs no mask",
    }[_rows_of(config)]
    notes = [rows, "every token counts in the loss", "every GPU's experts get the same number of tokens"]
    if config.attn_implementation == EAGER:
        notes.append("eager attention keeps the probabilities of every pair of tokens")
    if config.torch_compile:
        notes.append("torch_compile is not modelled: the step is that of eager code")
    return notes
