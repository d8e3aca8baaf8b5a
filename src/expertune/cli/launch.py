"""`expertune launch`: a training run in several processes of this machine, started by torchrun's launcher."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from expertune.cli.failing import FAILED, WRONG_USE, reporting_errors
from expertune.errors import ExpertuneError


def launch(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)],
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, help="Processes on this machine, one for each GPU.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set lora_r=32. May be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
) -> None:
    """Fine-tune in several processes: `torchrun --standalone --nproc-per-node NPROC -m expertune train CONFIG`.

    Several machines: the same torchrun on each, with its --nnodes and --rdzv-endpoint.
    """
    with reporting_errors():
        from expertune.distributed.sizes import sizes_for
        from expertune.train.config import load_config

        settings = load_config(config, overrides or []).config  # its problems are said once, not by every process
        sizes_for(
            nproc,
            expert=settings.expert_parallel_size,
            shard=settings.dp_shard_size,
            replicate=settings.dp_replicate_size,
        )
        train = ["train", str(config), *(part for item in overrides or [] for part in ("--set", item))]
        run_processes(nproc, ["-m", "expertune", *train, *(["--resume"] if resume else [])])


def run_processes(nproc: int, command: list[str]) -> None:
    """Run `python COMMAND` in `nproc` processes that know of each other.

    Raises ExpertuneError, naming the first process that failed, once torchrun has stopped the others.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", "--nproc-per-node", str(nproc), *command])
    except SignalException as error:  # passed on to the processes, of which the first has said what was saved
        raise typer.Exit(FAILED) from error
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: (_is_echo(item[1].exitcode), item[1].timestamp))
        if failure.exitcode == WRONG_USE:  # it has said what is wrong
            raise typer.Exit(WRONG_USE) from error
        how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with code {failure.exitcode}"
        raise ExpertuneError(
            f"rank {rank} (process {failure.pid}) {how}; the other processes were stopped. `--resume` goes on from the "
            "last checkpoint."
        ) from error


def _is_echo(exitcode: int) -> bool:
    """Whether a process that ended so was not the cause: torchrun stopped it, or it missed one that a signal ended."""
    return exitcode in (-signal.SIGTERM, FAILED)
