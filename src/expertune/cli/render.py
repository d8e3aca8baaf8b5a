"""What the commands print at their end."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from expertune.errors import ConfigError

if TYPE_CHECKING:
    from expertune.train.config import KeyInfo
    from expertune.train.run import RunReport


def program() -> str:
    """How to call this program again from the same place: `expertune`, or the path of it in its virtual environment."""
    if shutil.which("expertune"):
        return "expertune"
    script = Path(sys.executable).parent / "expertune"
    return _short(script) if script.is_file() else "python -m expertune"


def print_run_report(report: "RunReport", output_dir: Path, console: Console) -> None:
    """Print held-out loss and samples before and after, where everything is, and what to type next."""
    for index, (prompt, after) in enumerate(report.samples_after):
        earlier = report.samples_before[index][1] if index < len(report.samples_before) else "(not sampled: resumed)"
        text = Text.assemble(
            (prompt + "\n", "dim"), ("before: ", "bold"), f"{earlier}\n", ("after:  ", "bold green"), after
        )
        console.print(Panel(text, title=f"sample {index + 1}", title_align="left"))
    before, after_loss = report.heldout_loss_before, report.heldout_loss_after
    if after_loss is not None:
        console.print(f"held-out loss {f'{before:.4f} → ' if before is not None else ''}[bold]{after_loss:.4f}[/]")
    console.print(
        f"{report.steps} steps in {report.seconds:.0f} s, {report.trainable_parameters:,} parameters trained, "
        f"peak memory {report.peak_memory_gib:.2f} GiB, experts on {report.experts_backend}",
        markup=False,
    )
    for line in report.adapter_audit.in_words() if report.adapter_audit is not None else ():
        console.print(line, markup=False)
    console.print(f"adapter: {_short(output_dir / 'adapter')}", markup=False)
    run, merged = shlex.quote(_short(output_dir)), shlex.quote(_short(output_dir / "merged"))
    console.print(f"next:    {program()} generate {run}", markup=False)
    console.print(f"         {program()} merge {run} --output {merged}", markup=False)


def _short(path: Path) -> str:
    """The path from the current directory, or in full, whichever is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


def print_config_keys(console: Console, only: str | None) -> None:
    """Print the keys of the configuration, section by section."""
    from expertune.train.config import iter_keys

    keys = list(iter_keys()) if only is None else _keys_named(only)
    for section in dict.fromkeys(key.section for key in keys):
        table = Table("key", "type", "default", "meaning", title=section, title_justify="left", expand=True)
        for key in keys:
            if key.section == section:
                table.add_row(Text(key.path, "bold"), Text(key.needs), Text(key.default), Text(key.meaning))
        console.print(table)


def _keys_named(name: str) -> list["KeyInfo"]:
    """The key of this name with those inside it, otherwise the keys whose name contains it."""
    from expertune.train.config import iter_keys
    from expertune.train.config.problems import nearest

    keys = list(iter_keys())
    found = [key for key in keys if key.path == name or key.path.startswith((f"{name}.", f"{name}[]."))]
    found = found or [key for key in keys if name.lower() in key.path]
    if not found:
        near = nearest(name, [key.path for key in keys])
        hint = f"the nearest is {near}; " if near else ""
        raise ConfigError(f"no key contains {name!r}; {hint}`expertune config` lists them all")
    return found


def print_json_schema() -> None:
    """Print the JSON schema, for editors that complete YAML."""
    from expertune.train.config import json_schema

    print(json.dumps(json_schema(), indent=2))
