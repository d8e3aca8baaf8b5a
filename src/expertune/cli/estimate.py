"""`expertune estimate`: the memory of a run on each GPU, and the layout that fits; no GPU and no weights needed."""

import json
from pathlib import Path
from typing import Annotated

import typer

from expertune.cli.failing import reporting_errors
from expertune.cli.output import Output
from expertune.errors import ConfigError


def estimate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)],
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Such as H200 or H100.", show_default=False)
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option("--memory-gib", metavar="N", help="A GPU's memory, instead of its name.", show_default=False),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="How many of them there are.")] = 8,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set lora_r=32. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes, instead of the table.")] = False,
) -> None:
    """Estimate the memory of a run on each GPU, itemised, and the smallest layout that fits."""
    console = Output()
    with reporting_errors():
        if gpu is not None and memory_gib is not None:
            raise ConfigError("--gpu, --memory-gib: both say how much memory a GPU has; remove one of them")
        if memory_gib is not None and not memory_gib > 0:
            raise ConfigError(f"--memory-gib: got {memory_gib:g}, need more than 0")

        from expertune.cli.quiet import quiet_libraries
        from expertune.estimate.gpus import GIB, memory_of

        gpu_bytes = None if memory_gib is None else int(memory_gib * GIB)
        if gpu is not None:
            gpu_bytes = memory_of(gpu)
        quiet_libraries()

        from expertune.estimate.run import estimate as run_estimate
        from expertune.estimate.run import load_settings
        from expertune.estimate.show import as_mapping, print_estimate

        found = run_estimate(load_settings(config, overrides or []), gpu_bytes=gpu_bytes, num_gpus=gpus)
        if as_json:
            typer.echo(json.dumps(as_mapping(found), indent=2))
        else:
            print_estimate(found, console)
