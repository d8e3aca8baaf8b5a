"""The keys of how it is trained: optimisation, precision, experts, parallelism, logging and saving."""

from __future__ import annotations

from typing import Literal

from expertune.train.config.fields import (
    AboveZero,
    AutoOrBool,
    BelowOne,
    ConfigModel,
    Count,
    NotNegative,
    Options,
    Positive,
    Reporters,
    ShareOrSteps,
    Texts,
    key,
)

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adafactor",
    "ademamix",
    "ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "sgd",
    "adagrad",
]
Scheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]


class TrainingKeys(ConfigModel):
    """Training"""

    micro_batch_size: Positive = key(1, "rows in one forward pass, on each GPU", argument="per_device_train_batch_size")
    gradient_accumulation_steps: Positive = key(
        1, "forward passes that make one step", argument="gradient_accumulation_steps"
    )
    eval_batch_size: Positive | None = key(
        None,
        "rows in one forward pass of evaluation (default: micro_batch_size)",
        argument="per_device_eval_batch_size",
    )
    num_epochs: AboveZero = key(1.0, "passes over the data; parts of one are fine", argument="num_train_epochs")
    max_steps: Positive | None = key(None, "stop after this many steps, whatever num_epochs says", argument="max_steps")
    optimizer: Optimizer = key("adamw_torch_fused", "optimizer, by Transformers' name", argument="optim")
    learning_rate: AboveZero = key(2e-4, "learning rate at its highest", argument="learning_rate")
    lr_scheduler: Scheduler = key("cosine", "how the learning rate falls", argument="lr_scheduler_type")
    lr_scheduler_kwargs: Options | None = key(
        None, "options of the scheduler, e.g. `min_lr_rate: 0.1`", argument="lr_scheduler_kwargs"
    )
    warmup_steps: Count | None = key(None, "steps in which the learning rate rises")
    warmup_ratio: BelowOne | None = key(None, "the same as a share of all steps (default: 0.03)")
    weight_decay: NotNegative = key(0.0, "weight decay, not on biases and norms", argument="weight_decay")
    max_grad_norm: NotNegative = key(1.0, "gradients are scaled down to this norm; 0: never", argument="max_grad_norm")
    adam_beta1: BelowOne = key(0.9, "Adam: decay of the mean of gradients", argument="adam_beta1")
    adam_beta2: BelowOne = key(0.999, "Adam: decay of the mean of squared gradients", argument="adam_beta2")
    adam_epsilon: AboveZero = key(1e-8, "Adam: added to the divisor", argument="adam_epsilon")
    neftune_noise_alpha: NotNegative | None = key(
        None, "noise on the embeddings while training (NEFTune)", argument="neftune_noise_alpha"
    )
    seed: Count = key(42, "seed of the data order, the held-out rows, the adapter's start and dropout", argument="seed")


class PrecisionKeys(ConfigModel):
    """Precision and memory"""

    bf16: AutoOrBool = key("auto", "base model and computation in bfloat16; auto: where the GPU has it")
    fp16: bool = key(False, "computation in float16, for GPUs without bfloat16", argument="fp16")
    tf32: AutoOrBool = key("auto", "float32 products in TF32; auto: where the GPU has it")
    gradient_checkpointing: bool = key(
        False, "recompute activations in the backward pass: less memory, about a third slower",
        argument="gradient_checkpointing",
    )  # fmt: skip
    gradient_checkpointing_kwargs: Options | None = key(
        None, "options of it, e.g. `use_reentrant: false`", argument="gradient_checkpointing_kwargs"
    )
    activation_offloading: bool = key(
        False, "keep activations in the machine's memory instead of the GPU's", argument="activation_offloading"
    )
    torch_compile: bool = key(False, "compile the model with torch.compile", argument="torch_compile")
    torch_compile_backend: str | None = key(None, "torch.compile's backend", argument="torch_compile_backend")
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = key(
        None, "torch.compile's mode", argument="torch_compile_mode"
    )
    torch_empty_cache_steps: Positive | None = key(
        None, "give unused GPU memory back every so many steps", argument="torch_empty_cache_steps"
    )


class ExpertKeys(ConfigModel):
    """Experts"""

    experts_implementation: str = key(
        "expertune", "how experts are computed; expertune picks the best backend that can run here (`expertune doctor`)"
    )
    use_scattermoe: bool | None = key(None, "short for `experts_implementation: scattermoe`")
    use_sonicmoe: bool | None = key(None, "short for `experts_implementation: sonicmoe`")
    sonicmoe_lora: Literal["low_rank", "materialize"] | None = key(
        None,
        "how sonicmoe applies the experts' adapters (default: low_rank): in the products' accumulator, or folded into "
        "a weight (docs/sonicmoe.md)",
    )
    router_aux_loss_coef: NotNegative | None = key(
        None,
        "weight of the loss that balances the experts' load; 0: off (default: the model's own)",
        argument="router_aux_loss_coef",
    )


class ParallelKeys(ConfigModel):
    """Parallelism"""

    expert_parallel_size: Positive = key(1, "processes that divide each layer's experts among them")
    dp_shard_size: Positive = key(1, "processes that divide each weight among them (FSDP2)")
    dp_replicate_size: Positive | None = key(
        None, "copies of all that (default: as many as the processes that were started make)"
    )
    expert_parallel_backend: Literal["nccl", "gloo", "deep_ep"] | None = key(
        None, "what carries tokens to their experts (default: nccl on GPUs, gloo without; deep_ep: docs/distributed.md)"
    )
    ddp_timeout: Positive = key(1800, "seconds after which a message between processes that does not come is an error")
    fsdp_config: Options | None = key(None, "options of FSDP; there are none here")


class LoggingKeys(ConfigModel):
    """Evaluation, logging and saving"""

    output_dir: str = key(
        "./model-out", "folder for checkpoints, the adapter, the resolved configuration and the report"
    )
    eval_on_start: bool = key(True, "measure the held-out loss before the first step")
    eval_strategy: Literal["no", "steps", "epoch"] | None = key(
        None, "when to measure the held-out loss (default: as eval_steps says, otherwise after each epoch)"
    )
    eval_steps: ShareOrSteps | None = key(None, "steps between measurements of the held-out loss")
    evals_per_epoch: Positive | None = key(None, "the same, as measurements in one epoch")
    save_strategy: Literal["no", "steps", "epoch"] | None = key(
        None, "when to save a checkpoint (default: as save_steps says, otherwise after each epoch)"
    )
    save_steps: ShareOrSteps | None = key(None, "steps between checkpoints")
    saves_per_epoch: Positive | None = key(None, "the same, as checkpoints in one epoch")
    save_total_limit: Positive | None = key(
        None, "checkpoints kept, the newest (default: all)", argument="save_total_limit"
    )
    resume_from_checkpoint: str | None = key(
        None, "folder of a checkpoint to resume from, with its optimizer and data order"
    )
    auto_resume_from_checkpoints: bool = key(
        False, "resume from the newest whole checkpoint in output_dir, if there is one"
    )
    sample_prompts: Texts = key([], "prompts answered before and after training, to see what changed")
    sample_max_new_tokens: Positive = key(64, "longest such answer, in tokens")
    logging_steps: Positive = key(1, "steps between two lines of loss, tokens/s and memory", argument="logging_steps")
    report_to: Reporters | None = key(
        None, "where else metrics go; none: nowhere (default: as use_tensorboard, use_wandb and wandb_project say)"
    )
    use_tensorboard: bool | None = key(None, "short for `report_to: [tensorboard]`")
    use_wandb: bool | None = key(None, "short for `report_to: [wandb]`")
    wandb_project: str | None = key(None, "Weights & Biases: project")
    wandb_entity: str | None = key(None, "Weights & Biases: team or user")
    wandb_name: str | None = key(None, "Weights & Biases: name of the run", argument="run_name")
    wandb_run_id: str | None = key(None, "Weights & Biases: id of the run, to go on with one")
    wandb_mode: Literal["online", "offline", "disabled"] | None = key(None, "Weights & Biases: what is sent")
    wandb_watch: Literal["gradients", "parameters", "all", "false"] | None = key(
        None, "Weights & Biases: histograms to record"
    )
    wandb_log_model: Literal["end", "checkpoint", "false"] | None = key(
        None, "Weights & Biases: upload the adapter at the end, or every checkpoint"
    )
