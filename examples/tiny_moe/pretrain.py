"""Pre-trains the model from the token cache: a plain PyTorch loop, next-token loss plus the router's balance loss.

    loss = cross entropy + BALANCE_WEIGHT · mean over layers of E · Σ_e f_e · p_e

with f_e the share of the routed (token, expert) pairs that went to expert e and p_e its mean router probability
(Fedus et al., Switch Transformers, 2021, https://arxiv.org/abs/2101.03961); 1 when perfectly even.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

BALANCE_WEIGHT = 0.01
WARMUP_STEPS = 100
GRADIENT_NORM = 1.0
FINAL_RATE_SHARE = 0.02
NUM_EVALUATIONS = 24


@dataclass(frozen=True)
class PretrainSettings:
    """minutes and steps: the run ends at whichever comes first. held_out_windows: how many each evaluation reads."""

    minutes: float | None = None
    steps: int | None = None
    batch_size: int = 64
    window: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    held_out_windows: int = 256
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise ValueError("minutes or steps must be given, got neither: the learning rate's schedule needs an end")

    def progress(self, step: int, seconds: float) -> float:
        """The part of the run that is over, 0 to 1, by whichever limit is nearer."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


@dataclass
class PretrainResult:
    """log: rows of (step, tokens, seconds, train loss, held-out loss). expert_load: [layers, E] held-out shares."""

    model: Qwen3MoeForCausalLM
    device: str
    log: list[tuple[int, int, float, float, float]] = field(default_factory=list)
    expert_load: list[list[float]] = field(default_factory=list)


def model_config(vocab_size: int, pad_token_id: int, eos_token_id: int) -> Qwen3MoeConfig:
    """3.55 M parameters: sizes are multiples of 64 (the kernels' tiles) and of 16 bytes (grouped_mm's strides)."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=256,  # of dense layers; there are none
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_WEIGHT,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        bos_token_id=None,
    )


def pretrain(
    config: Qwen3MoeConfig, train: np.ndarray, held_out: np.ndarray, settings: PretrainSettings
) -> PretrainResult:
    """Trains from random weights. Repeatable for the same seed, steps, device and versions when `minutes` is None."""
    device = torch.device(_chosen_device(settings.device))
    torch.manual_seed(settings.seed)
    # bf16 on a GPU: under autocast grouped_mm would follow fp32 weights. On the CPU fp32 and the loop over the experts
    # are faster (5.3 against 4.2 thousand tokens/s on two EPYC cores).
    dtype, experts = (torch.bfloat16, "grouped_mm") if device.type == "cuda" else (torch.float32, "eager")
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation=experts, dtype=torch.float32)
    optimizer = MasterAdamW(model.to(device), dtype, settings)
    result = PretrainResult(model, torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU")

    stream = torch.from_numpy(train.astype(np.int32)).to(device)
    held_out_windows = _even_windows(held_out, settings).to(device)
    batches = random_windows(stream, settings.window + 1, settings.batch_size, settings.seed)
    begin = time.perf_counter()
    step, losses, next_evaluation = 0, [], 0.0
    while True:
        seconds = time.perf_counter() - begin
        progress = settings.progress(step, seconds)
        if progress >= next_evaluation or progress >= 1:
            # 24 evaluations over the run, whatever its length; the first is of the random weights.
            held_out_loss, result.expert_load = evaluate(model, held_out_windows, settings.batch_size)
            train_loss = torch.stack(losses).mean().item() if losses else math.nan
            tokens = step * settings.batch_size * settings.window
            result.log.append((step, tokens, time.perf_counter() - begin, train_loss, held_out_loss))
            so_far = f"step {step}  tokens {tokens / 1e6:.1f} M  {seconds:.0f} s"
            print(f"{so_far}  train {train_loss:.3f}  held-out {held_out_loss:.3f}", flush=True)
            losses, next_evaluation = [], math.floor(progress * NUM_EVALUATIONS + 1) / NUM_EVALUATIONS
        if progress >= 1:
            return result
        loss, balance = _losses(model, next(batches))
        (loss + BALANCE_WEIGHT * balance).backward()
        optimizer.step(settings.learning_rate * rate_share(step, progress))
        losses.append(loss.detach())
        step += 1


class MasterAdamW:
    """AdamW on fp32 copies of a model's parameters: a bf16 weight would lose updates below 1/256 of its size."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, settings: PretrainSettings) -> None:
        self.masters = [p.detach().clone() for p in model.parameters()]
        self.weights = list(model.parameters())
        for weight in self.weights:
            # Not model.to(dtype), which would round the rotary frequencies as well; a loaded model has them in fp32.
            weight.data = weight.data.to(dtype)
        matrices = [p for p in self.masters if p.ndim > 1]
        vectors = [p for p in self.masters if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def step(self, learning_rate: float) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad, weight.grad = weight.grad.to(master.dtype), None
        torch.nn.utils.clip_grad_norm_(self.masters, GRADIENT_NORM)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def rate_share(step: int, progress: float) -> float:
    """The learning rate's share of its peak: linear warm-up by steps times a cosine over the run down to 2 %."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


def random_windows(stream: Tensor, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches [batch_size, length] int64 without end: each epoch cuts the stream at a new offset and shuffles."""
    generator = torch.Generator().manual_seed(seed)
    if len(stream) < (batch_size + 1) * length:
        raise ValueError(f"stream has {len(stream)} tokens, need {(batch_size + 1) * length} for one batch of windows")
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        num_windows = (len(stream) - offset) // length
        windows = stream[offset : offset + num_windows * length].view(num_windows, length)
        order = torch.randperm(num_windows, generator=generator).to(stream.device)
        for start in range(0, num_windows - batch_size + 1, batch_size):
            yield windows[order[start : start + batch_size]].long()


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, windows: Tensor, batch_size: int) -> tuple[float, list[list[float]]]:
    """(mean loss in nats per token, expert load [layers, E] as shares of the routed pairs) on fixed windows."""
    total, pairs = 0.0, 0.0
    for batch in windows.split(batch_size):
        output = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        total += _cross_entropy(output.logits, batch).item() * len(batch)
        top_k = model.config.num_experts_per_tok
        pairs = pairs + torch.stack([_pairs_per_expert(logits_TE, top_k) for logits_TE in output.router_logits])
    return total / len(windows), (pairs / pairs.sum(dim=1, keepdim=True)).tolist()


def _losses(model: Qwen3MoeForCausalLM, batch: Tensor) -> tuple[Tensor, Tensor]:
    output = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
    # One layer at a time: Transformers' own loss pools the layers, where an overload in one hides behind another.
    balance = [balance_loss(logits_TE, model.config.num_experts_per_tok) for logits_TE in output.router_logits]
    return _cross_entropy(output.logits, batch), torch.stack(balance).mean()


def balance_loss(logits_TE: Tensor, top_k: int) -> Tensor:
    """E · Σ_e f_e · p_e of one layer: at least about 1, up to E / top_k when a few experts take everything."""
    shares_E = _pairs_per_expert(logits_TE, top_k) / (len(logits_TE) * top_k)
    return logits_TE.shape[1] * (shares_E * logits_TE.float().softmax(dim=-1).mean(dim=0)).sum()


def _pairs_per_expert(logits_TE: Tensor, top_k: int) -> Tensor:
    chosen_TK = logits_TE.detach().topk(top_k, dim=-1).indices
    return torch.zeros_like(logits_TE, dtype=torch.float32).scatter_(1, chosen_TK, 1.0).sum(dim=0)


def _cross_entropy(logits: Tensor, batch: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def _even_windows(held_out: np.ndarray, settings: PretrainSettings) -> Tensor:
    """[held_out_windows or fewer, window + 1] int64, spread evenly over the held-out tokens."""
    length = settings.window + 1
    windows = torch.from_numpy(held_out[: len(held_out) // length * length].astype(np.int64)).view(-1, length)
    return windows[torch.linspace(0, len(windows) - 1, min(len(windows), settings.held_out_windows)).long()]


def _chosen_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
