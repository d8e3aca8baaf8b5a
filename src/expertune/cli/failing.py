"""Errors as the command line says them: one message, the right exit code, a traceback only for our own bugs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from expertune.errors import ConfigError, DataError, ExpertuneError

FAILED, WRONG_USE = 1, 2


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn what the block raises into a message on standard error and an exit code."""
    console = Console(stderr=True)
    try:
        yield
    except (ConfigError, DataError) as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(WRONG_USE) from error
    except ExpertuneError as error:
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        console.print("stopped")
        raise typer.Exit(FAILED) from error
    except Exception as error:
        if not _out_of_memory(error):
            raise
        console.print("[bold red]error:[/]", end=" ")
        console.print(
            f"the GPU ran out of memory: {str(error).splitlines()[0]}\n"
            "Ways out: a smaller micro_batch_size (with more gradient_accumulation_steps), a smaller sequence_len, "
            "gradient_checkpointing: true, activation_offloading: true.",
            markup=False,
            highlight=False,
        )
        raise typer.Exit(FAILED) from error


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
