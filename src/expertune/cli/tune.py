"""`expertune tune`: the fastest tiles of our kernels for a model on this machine's GPU."""

from pathlib import Path
from typing import Annotated

import typer

from expertune.cli.failing import reporting_errors
from expertune.cli.output import Output
from expertune.errors import ConfigError


def tune(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR|ID",
            help="A model's folder or hub id: its sizes are read, not its weights.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME|E,H,I,K",
            help="A model of `expertune bench`, as in --shape OLMoE, or experts, hidden, intermediate and experts per "
            "token. May be repeated.",
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens",
            metavar="N",
            min=1,
            help="Tokens in a step on one GPU, micro_batch_size x sequence_len; 8192 unless given. May be repeated.",
        ),
    ] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option("--rank", metavar="R", min=1, help="Of the adapters; 16 unless given. May be repeated."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Timed calls of each tile.")] = 20,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Of the random tensors; a new one unless given.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="FILE",
            help="Where the results go; $XDG_CACHE_HOME/expertune/tiles.json (or ~/.cache/...), which training reads.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print, write nothing.")] = False,
) -> None:
    """Measure which tiles of our kernels are fastest for a model on this GPU; training then uses them."""
    console = Output()
    with reporting_errors():
        if model is None and not shape:
            raise ConfigError("--model, --shape: say what to tune for, as in --shape Qwen3-30B-A3B or --model FOLDER")

        from expertune.bench.cases import select_cases

        cases = select_cases(shape, tokens or (), rank or ()) if shape else []

        from expertune.tune.run import cases_of, find_cache, find_gpu, run_tune

        device, timer = find_gpu()
        if model is not None:
            from expertune.tune.shapes import shape_of_model

            cases = [*cases_of(shape_of_model(model), tokens or (), rank or ()), *cases]

        from expertune.tune.cache import this_machine

        path = find_cache(cache, dry_run=dry_run)
        run_tune(
            cases,
            console,
            path,
            device=device,
            timer=timer,
            machine=this_machine(device),
            repeats=repeats,
            seed=seed,
        )
