"""From a YAML file and `--set` to a settled TrainConfig, or one ConfigError that names everything that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertune.train.config.axolotl import translate
from expertune.train.config.checking import check_values
from expertune.train.config.fields import is_null
from expertune.train.config.paths import locate_paths
from expertune.train.config.problems import Problem, raise_problems, top_key
from expertune.train.config.reading import read_config
from expertune.train.config.rules import check_rules
from expertune.train.config.schema import TrainConfig
from expertune.train.config.settle import settle


@dataclass(frozen=True)
class LoadedConfig:
    """config: settled. notes: what the person should know, one line each. given: the top-level keys that were set."""

    config: TrainConfig
    notes: tuple[str, ...]
    given: frozenset[str]


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load a configuration: the command line counts over the file, the file over the defaults.

    overrides: `key=value` each, the value in YAML; `datasets.0.path=rows.jsonl` reaches inside.
    Raises ConfigError with every problem, one line each: the key, what it got, what it needs, the way out, the line.
    """
    raw = read_config(path, overrides)
    translation = translate(raw.values)
    checked = check_values(translation.values)
    given = frozenset(name for name, value in translation.values.items() if not is_null(value))
    located = locate_paths(checked.config, raw.folder, skip=checked.wrong_keys)
    refused = [*translation.problems, *checked.problems, *located.problems]
    wrong = {top_key(key) for problem in refused for key in problem.keys}
    contradictions = [problem for problem in check_rules(checked.config, given) if not _touches(problem, wrong)]
    raise_problems(raw.source, [*refused, *contradictions], raw.places)
    return LoadedConfig(settle(located.config), (*translation.notes, *located.notes), given)


def _touches(problem: Problem, wrong: set[str]) -> bool:
    """Whether a rule rests on a key that is refused already; its value is only a stand-in."""
    return any(top_key(key) in wrong for key in (*problem.keys, *problem.depends))
