"""`expertune bench`: our expert kernels beside their rivals and dense cuBLAS on this machine's GPU."""

from pathlib import Path
from typing import Annotated

import typer

from expertune.cli.failing import reporting_errors
from expertune.cli.output import Output

Tokens = Annotated[
    list[int] | None,
    typer.Option(
        "--tokens",
        metavar="N",
        min=1,
        help="Tokens in a step, 8192 unless given (and 1024 and 32768 for Qwen3-30B-A3B). May be repeated.",
    ),
]


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME|E,H,I,K",
            help="A model, as in --shape OLMoE, or experts, hidden, intermediate and experts per token. May be "
            "repeated; without it, all named models.",
        ),
    ] = None,
    tokens: Tokens = None,
    rank: Annotated[
        list[int] | None,
        typer.Option("--rank", metavar="R", min=1, help="Of the adapters; 16 unless given. May be repeated."),
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(
            "--routing",
            metavar="uniform|zipf",
            help="How tokens choose experts, uniform unless given. May be repeated.",
        ),
    ] = None,
    way: Annotated[
        list[str] | None,
        typer.Option(
            "--way",
            metavar="NAME",
            help="Only this way beside dense cuBLAS, as in --way scattermoe. May be repeated; without it, all.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Timed calls of each way.")] = 20,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Of the random tensors; a new one unless given.")
    ] = None,
    plot: Annotated[
        list[Path] | None,
        typer.Option("--plot", metavar="CSV", help="Measure nothing; draw what this bench.csv has. May be repeated."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where bench.csv and bench.png go.")
    ] = Path("runs/bench"),
) -> None:
    """Time the expert MLP with LoRA, forward and backward, beside its rivals and dense cuBLAS.

    Three times for each: from an idle GPU; queued, with the host ahead; sustained, as CUDA graphs that are replayed
    step after step, as in training. What cannot be captured has no sustained time.
    """
    console = Output()
    with reporting_errors():
        from expertune.bench.cases import select_cases

        if plot:
            from expertune.bench.run import make_output, plot_files

            make_output(output)
            plot_files(plot, console, output)
            return
        cases = select_cases(shape or (), tokens or (), rank or (), routing or ())

        from expertune.bench.run import find_gpu, make_output, run_bench
        from expertune.bench.ways import select_ways

        ways = select_ways(way or ())
        device, timer = find_gpu()
        make_output(output)
        run_bench(cases, ways, console, output, device=device, timer=timer, repeats=repeats, seed=seed)
