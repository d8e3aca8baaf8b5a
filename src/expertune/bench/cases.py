"""What is measured: named model shapes, tokens, rank and routing. Imports nothing heavy: names are checked at once."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from expertune.errors import ConfigError

UNIFORM, ZIPF = "uniform", "zipf"
ROUTINGS = (UNIFORM, ZIPF)


@dataclass(frozen=True)
class ExpertShape:
    """The sizes of one layer's experts.

    name: as on the command line. num_experts: E. hidden: H. intermediate: I. top_k: K, experts for each token.
    """

    name: str
    num_experts: int
    hidden: int
    intermediate: int
    top_k: int

    def base_flops(self, tokens: int) -> int:
        """FLOPs of the base products, forward and gradient of the input: 4 S (2 I H + H I), S = tokens * K."""
        return 4 * tokens * self.top_k * 3 * self.hidden * self.intermediate


SHAPES = (
    ExpertShape("Qwen3-30B-A3B", 128, 2048, 768, 8),
    ExpertShape("GLM-4.5-Air", 128, 4096, 1408, 8),
    ExpertShape("Mixtral-8x7B", 8, 4096, 14336, 2),
    ExpertShape("gpt-oss-20b", 32, 2880, 2880, 4),
    ExpertShape("OLMoE", 64, 2048, 1024, 8),
    ExpertShape("Qwen3.5-35B-A3B", 256, 2048, 512, 8),
)
DEFAULT_TOKENS = 8192
DEFAULT_RANK = 16
# The extra token counts of the default run: a short and a long batch of the first shape.
_MORE_TOKENS = {"Qwen3-30B-A3B": (8192, 1024, 32768)}


@dataclass(frozen=True)
class Case:
    """One measurement: every way computes it on the same tensors."""

    shape: ExpertShape
    tokens: int
    rank: int
    routing: str

    @property
    def title(self) -> str:
        return f"{self.shape.name}, {self.tokens} tokens, rank {self.rank}, {self.routing} routing"


def select_cases(
    shapes: Sequence[str] = (), tokens: Sequence[int] = (), ranks: Sequence[int] = (), routings: Sequence[str] = ()
) -> list[Case]:
    """Every combination that was asked for, in the order given.

    shapes: names, or sizes as "E,H,I,K"; none means all named shapes. tokens: none means 8192 (and without shapes also
    the extra counts of the first). ranks: none means 16. routings: none means uniform.
    Raises ConfigError for a name that does not exist or sizes that do not make sense.
    """
    sized = [
        (shape, count)
        for shape in ([find_shape(text) for text in shapes] or SHAPES)
        for count in (tokens or (() if shapes else _MORE_TOKENS.get(shape.name, ())) or (DEFAULT_TOKENS,))
    ]
    for routing in routings:
        if routing not in ROUTINGS:
            raise ConfigError(f"--routing: {unknown(routing, ROUTINGS)}")
    cases = product(sized, ranks or (DEFAULT_RANK,), routings or (UNIFORM,))
    return list(dict.fromkeys(Case(shape, count, rank, routing) for (shape, count), rank, routing in cases))


def find_shape(text: str) -> ExpertShape:
    """The shape of this name, in any case, or of the sizes "E,H,I,K"; raises ConfigError for anything else."""
    named = {shape.name.lower(): shape for shape in SHAPES}
    if text.strip().lower() in named:
        return named[text.strip().lower()]
    if "," not in text:
        raise ConfigError(
            f"--shape: {unknown(text, [shape.name for shape in SHAPES])}; or give sizes as E,H,I,K (experts, hidden, "
            "intermediate, experts per token), such as 128,2048,768,8"
        )
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"--shape: got {text!r}; need four whole numbers E,H,I,K of at least 1 (experts, hidden, intermediate, "
            "experts per token), such as 128,2048,768,8"
        )
    experts, hidden, intermediate, top_k = map(int, parts)
    if top_k > experts:
        raise ConfigError(f"--shape: got {text!r}; {top_k} experts per token (K) are more than {experts} experts (E)")
    return ExpertShape("x".join(parts), experts, hidden, intermediate, top_k)


def unknown(name: str, names: Iterable[str]) -> str:
    """What to say of a name that does not exist: the nearest one, and all."""
    known = list(names)
    lowered = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    hint = f"; the nearest is {lowered[near[0]]}" if near else ""
    return f"there is no {name!r}{hint}; there are {', '.join(known)}"
