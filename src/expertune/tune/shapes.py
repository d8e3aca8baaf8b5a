"""The sizes of a model's experts, out of its Transformers configuration; no weights are read."""

from pathlib import Path
from typing import Any

from expertune.bench.cases import ExpertShape
from expertune.errors import ConfigError

# The names under which configurations keep a size; the first that is there counts.
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_HIDDEN = ("hidden_size",)
_INTERMEDIATE = ("moe_intermediate_size", "intermediate_size")  # the second is of the dense layers where both exist
_TOP_K = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_k", "moe_topk")


def shape_of_model(model: str) -> ExpertShape:
    """The shape of a model's folder or hub id; raises ConfigError if it has no configuration, or no experts.

    A name on the hub is resolved by Transformers, which fetches the configuration alone.
    """
    from transformers import AutoConfig

    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"--model: {folder} is no model's folder (no config.json)")
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # whatever a configuration's own code finds wrong with it
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"--model: {model} has no configuration that Transformers can read: {line.strip()}"
        ) from error
    return shape_of_config(config, model)


def shape_of_config(config: Any, model: str) -> ExpertShape:
    """The shape that a configuration says; of its language model where it has several parts."""
    text = config.get_text_config()
    sizes = [_size(text, names, model) for names in (_EXPERTS, _HIDDEN, _INTERMEDIATE, _TOP_K)]
    shape = ExpertShape(Path(model).name or model, *sizes)
    if shape.top_k > shape.num_experts:
        raise ConfigError(f"--model: {model} says {shape.top_k} of {shape.num_experts} experts for each token")
    return shape


def _size(config: Any, names: tuple[str, ...], model: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"--model: {model} has {name}: {value!r}, need one whole number; {_WAY_OUT}")
        return value
    raise ConfigError(
        f"--model: the configuration of {model} ({type(config).__name__}) has none of {', '.join(names)}; is it a "
        f"mixture of experts? If so, {_WAY_OUT}"
    )


_WAY_OUT = "give the sizes with --shape E,H,I,K (experts, hidden, intermediate, experts per token)"
