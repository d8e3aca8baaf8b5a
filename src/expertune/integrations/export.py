"""An adapter's tensors in the names and shapes that vLLM's and SGLang's LoRA loaders read.

PEFT stores the adapters of all experts of a projection in two matrices, gate and up in one. The servers want a pair of
2-D matrices for each expert and projection, as checkpoints of the base model name them:

    A_gate[e] = A_up[e] = A[e]      [R, H]      B_gate[e], B_up[e] = the gate and the up rows of B[e]      [I, R]
    A_down[e]                       [R, I]      B_down[e]                                                  [H, R]

so W_e + s B_e A_e is exactly what PEFT computes. The exception is gpt-oss in vLLM, which reads PEFT's own two matrices.
Sources: the loading code of vllm 0.33.0 and sglang 0.5.23, read file by file in docs/export.md.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertune.errors import ConfigError
from expertune.integrations.saved_adapter import PREFIX, SavedAdapter, SavedLora

EXPERTS = "experts"


@dataclass(frozen=True)
class ExpertNames:
    """How a server calls a model's experts: BLOCK.experts.E.GATE. stacked: it reads PEFT's two matrices instead."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stacked: bool = False


@dataclass(frozen=True)
class Server:
    """What one server's LoRA loader takes.

    read: the version whose code says so. models: by the base model's model_type. linears: modules beside the experts
    that it adapts. together: modules of one block of which it takes all or none.
    max_rank: the largest rank, None for any. start: how to start it with the adapter.
    """

    name: str
    read: str
    models: dict[str, ExpertNames]
    linears: frozenset[str]
    together: tuple[frozenset[str], ...]
    max_rank: int | None
    start: str


_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
_USUAL = ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe")

SERVERS = {
    "vllm": Server(
        name="vLLM",
        read="vllm 0.33.0",
        models={name: ExpertNames() for name in _USUAL}
        | {"mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"), "gpt_oss": ExpertNames(stacked=True)},
        linears=_ATTENTION | _MLP,
        together=(),
        max_rank=512,
        start="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}",
    ),
    "sglang": Server(
        name="SGLang",
        read="sglang 0.5.23",
        models={name: ExpertNames() for name in (*_USUAL, "gpt_oss")} | {"mixtral": ExpertNames("block_sparse_moe")},
        linears=_ATTENTION | {"kv_b_proj"},
        together=(frozenset({"q_proj", "v_proj"}), frozenset({"q_a_proj", "kv_a_proj_with_mqa"})),
        max_rank=None,
        start="python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths NAME={folder}",
    ),
}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that its --max-lora-rank takes
_NO_KV_B = "it takes that weight apart when it loads the model, and decodes with the parts"
_FUSES_SHARED_EXPERTS = ("deepseek_v2", "deepseek_v3", "glm4_moe")  # in SGLang, which then counts one expert more

# Keys of PEFT's configuration that make it more than W + s B A, with the value that does not.
_MORE_THAN_LORA: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Exported:
    """What goes into the folder, and what to say about it. notes: what was changed to fit the server."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    rank: int
    notes: list[str]
    start: str


def convert(adapter: SavedAdapter, server_name: str) -> Exported:
    """The adapter as `server_name` ("vllm" or "sglang") reads it, tensors in the dtype they were saved in.

    SGLang takes one rank and one scaling for all modules, and vLLM gets the same. Where an adapter has several
    (rank_pattern, alpha_pattern), A and B are padded with zeros to the largest rank, and the rest of the scaling goes
    into B.
    Raises ConfigError, with the reason, for what the server cannot do; nothing is left out silently.
    """
    server = SERVERS[server_name]
    names = _names_for(adapter, server)
    _check_features(adapter, server)
    _check_modules(adapter, server)
    rank = max(lora.rank for lora in adapter.loras)
    if server.max_rank is not None and rank > server.max_rank:
        raise ConfigError(f"--format {server_name}: rank {rank} is more than {server.read} takes ({server.max_rank})")
    scaling = Counter(lora.scaling for lora in adapter.loras if lora.scaling).most_common(1)[0][0]
    fitted = [_Fitted.of(lora, rank, scaling) for lora in adapter.loras]
    tensors: dict[str, Tensor] = {}
    for module, projections in _by_module(fitted).items():
        if not any(each.lora.is_experts for each in projections.values()):
            for each in projections.values():
                tensors |= _pair(module, each.a_ERX[0], each.b_EYR[0])
            continue
        block = f"{module.removesuffix(f'.mlp.{EXPERTS}')}.{names.block}.{EXPERTS}"
        write = _stacked if names.stacked else _per_expert
        tensors |= write(block, names, projections["gate_up_proj"], projections["down_proj"])
    padded = sorted({lora.rank for lora in adapter.loras} - {rank})
    folded = sum(lora.scaling != scaling for lora in adapter.loras)
    notes = [f"padded with zeros to rank {rank}: adapters of rank {', '.join(map(str, padded))}"] if padded else []
    if folded:
        notes.append(f"{folded} of {len(adapter.loras)} adapters had a scaling of their own, which is now in B")
    return Exported(
        tensors={name: tensor.contiguous().clone() for name, tensor in tensors.items()},  # gate and up share their A
        config=_config(adapter, names, rank, scaling),
        rank=rank,
        notes=notes,
        start=_start(adapter, server_name, rank),
    )


@dataclass(frozen=True)
class _Fitted:
    """A pair of matrices for each expert (one for a Linear), at the common rank and scaling."""

    lora: SavedLora
    a_ERX: Tensor
    b_EYR: Tensor

    @classmethod
    def of(cls, lora: SavedLora, rank: int, scaling: float) -> "_Fitted":
        weights = lora.by_expert()
        more = rank - lora.rank
        b_EYR = weights.b_EYR
        if lora.scaling != scaling:
            b_EYR = (b_EYR.double() * (lora.scaling / scaling)).to(b_EYR.dtype)
        a_ERX = torch.nn.functional.pad(weights.a_ERX, (0, 0, 0, more))
        return cls(lora, a_ERX, torch.nn.functional.pad(b_EYR, (0, more)))


def _by_module(fitted: list[_Fitted]) -> dict[str, dict[str, _Fitted]]:
    """The adapted parameters of each module; an experts module has both projections, zeros where one is not adapted.

    vLLM fails on an experts module with one of them.
    """
    modules: dict[str, dict[str, _Fitted]] = {}
    for each in fitted:
        modules.setdefault(each.lora.module, {})[each.lora.parameter] = each
    for projections in modules.values():
        known = next(iter(projections.values()))
        if not known.lora.is_experts or len(projections) == 2:
            continue
        num_experts, rank, width_in = known.a_ERX.shape
        width_out = known.b_EYR.shape[1]
        is_up = known.lora.parameter == "gate_up_proj"
        a, b = (width_out // 2, width_in) if is_up else (width_out, 2 * width_in)
        projections["down_proj" if is_up else "gate_up_proj"] = _Fitted(
            known.lora, known.a_ERX.new_zeros(num_experts, rank, a), known.b_EYR.new_zeros(num_experts, b, rank)
        )
    return modules


def _per_expert(block: str, names: ExpertNames, up: _Fitted, down: _Fitted) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    gate_rows, up_rows = _gate_and_up(up)
    for expert in range(up.a_ERX.shape[0]):
        name = f"{block}.{expert}"
        tensors |= _pair(f"{name}.{names.gate}", up.a_ERX[expert], up.b_EYR[expert, gate_rows])
        tensors |= _pair(f"{name}.{names.up}", up.a_ERX[expert], up.b_EYR[expert, up_rows])
        tensors |= _pair(f"{name}.{names.down}", down.a_ERX[expert], down.b_EYR[expert])
    return tensors


def _stacked(block: str, _names: ExpertNames, up: _Fitted, down: _Fitted) -> dict[str, Tensor]:
    """PEFT's own two matrices: expert slowest in A, fastest in B; gate and up rows as the base model has them."""
    return {
        f"{PREFIX}{key}.lora_{side}.weight": matrix
        for key, each in ((f"{block}.base_layer", up), (block, down))
        for side, matrix in (
            ("A", each.a_ERX.flatten(0, 1)),
            ("B", each.b_EYR.permute(1, 2, 0).flatten(1)),
        )
    }


def _gate_and_up(up: _Fitted) -> tuple[slice, slice]:
    rows = up.b_EYR.shape[1]
    if up.lora.interleaved:
        return slice(0, rows, 2), slice(1, rows, 2)
    return slice(0, rows // 2), slice(rows // 2, rows)


def _pair(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}


def _config(adapter: SavedAdapter, names: ExpertNames, rank: int, scaling: float) -> dict[str, Any]:
    alpha = scaling * rank
    linears = {_leaf(lora) for lora in adapter.loras if not lora.is_experts}
    has_experts = any(lora.is_experts for lora in adapter.loras)
    split = {names.gate, names.up, names.down} if has_experts and not names.stacked else set()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(linears | split),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    if has_experts and names.stacked:
        config["target_parameters"] = [f"{names.block}.{EXPERTS}.{name}" for name in ("gate_up_proj", "down_proj")]
    return config


def _names_for(adapter: SavedAdapter, server: Server) -> ExpertNames:
    names = server.models.get(adapter.model_type)
    if names is None:
        raise ConfigError(
            f"--format {server.name.lower()}: how {server.name} names the experts of {adapter.model_type} is not known "
            f"to this version, and it does not guess; it knows {', '.join(sorted(server.models))}. "
            "`expertune merge` writes a full checkpoint, which needs no adapter."
        )
    return names


def _check_features(adapter: SavedAdapter, server: Server) -> None:
    for key, harmless in _MORE_THAN_LORA.items():
        value = getattr(adapter.peft_config, key, harmless[0])
        if value not in harmless:
            raise ConfigError(
                f"--format {server.name.lower()}: the adapter was trained with {key}={value!r}, which is more than "
                "W + s B A; `expertune merge` can put it into a full checkpoint"
            )
    if adapter.rest:
        raise ConfigError(
            f"--format {server.name.lower()}: the adapter has {next(iter(adapter.rest))}, which is no LoRA of the base "
            "model's Linear layers or experts"
        )
    if not any(lora.scaling for lora in adapter.loras):
        raise ConfigError(f"--format {server.name.lower()}: the adapter adapts nothing")


def _check_modules(adapter: SavedAdapter, server: Server) -> None:
    option = f"--format {server.name.lower()}"
    by_block: dict[str, set[str]] = {}
    for lora in adapter.loras:
        if lora.is_experts:
            if not lora.module.endswith(f".mlp.{EXPERTS}"):
                raise ConfigError(f"{option}: experts are expected in mlp.experts, and the model has {lora.module}")
            continue
        if lora.parameter or _leaf(lora) not in server.linears:
            reason = _NO_KV_B if _leaf(lora) == "kv_b_proj" else "it was not found to read such a one"
            raise ConfigError(
                f"{option}: {lora.name} has an adapter that {server.name} would not apply: {reason}. It serves "
                f"adapters of the experts and of {', '.join(sorted(server.linears))}; `expertune merge` takes them all."
            )
        by_block.setdefault(lora.module.rpartition(".")[0], set()).add(_leaf(lora))
    for block, present in by_block.items():
        for group in server.together:
            if present & group and not group <= present:
                raise ConfigError(
                    f"{option}: {block} has an adapter on {', '.join(sorted(present & group))} only; "
                    f"{server.read} needs {' and '.join(sorted(group))} together"
                )
        if server.name == "SGLang" and "k_proj" in present and "q_proj" not in present:
            raise ConfigError(f"{option}: {block} has an adapter on k_proj without q_proj, which is not served")


def _leaf(lora: SavedLora) -> str:
    return lora.module.rpartition(".")[2]


def _start(adapter: SavedAdapter, server_name: str, rank: int) -> str:
    offered = next((each for each in _VLLM_RANKS if each >= rank), rank)
    start = SERVERS[server_name].start.replace("{rank}", str(offered)).replace("{base}", adapter.base_model)
    if server_name == "sglang" and adapter.model_type in _FUSES_SHARED_EXPERTS:
        start += " --disable-shared-experts-fusion"
    return start
