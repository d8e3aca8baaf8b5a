"""Errors as the command line says them: one message, the right exit code, a traceback only for our own bugs."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from expertune.cli.output import Output
from expertune.errors import CollectiveError, ConfigError, DataError, ExpertuneError, Interrupted

FAILED, WRONG_USE = 1, 2
_GRACE_S = 3.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn what the block raises into a message on standard error and an exit code."""
    try:
        yield
    except (ConfigError, DataError) as error:
        _let_the_first_talk()
        _say(str(error))
        raise typer.Exit(WRONG_USE) from error
    except Interrupted as error:
        _let_the_first_talk()
        if os.environ.get("RANK", "0") == "0":  # they stopped together
            Output(stderr=True).print(str(error), markup=False)
        raise typer.Exit(FAILED) from error
    except CollectiveError as error:
        _say(str(error))
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_GRACE_S)  # torchrun is to see first the process that is gone, which this one only missed
        os._exit(FAILED)  # a GPU that waits for a message which never comes would hold up an orderly end
    except ExpertuneError as error:
        _say(str(error))
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        Output(stderr=True).print("stopped")
        raise typer.Exit(FAILED) from error
    except Exception as error:
        message = _of_the_machine(error)
        if message is None:
            raise
        _say(message)
        raise typer.Exit(FAILED) from error


def _let_the_first_talk() -> None:
    """Of torchrun's processes on a machine, which mostly fail alike, give the first time to say it and end the job.

    torchrun stops the others as soon as one has ended; an error that only one of them has is said a little later.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_GRACE_S)


def _say(message: str) -> None:
    console = Output(stderr=True)
    console.print("[bold red]error:[/]", end=" ")
    console.print(message, markup=False)


def _of_the_machine(error: Exception) -> str | None:
    """What to say of an error that is the machine's: memory or disk used up. None for any other."""
    first_line = next(iter(str(error).splitlines()), "")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU ran out of memory: {first_line}\n"
            "Ways out: a smaller micro_batch_size (with more gradient_accumulation_steps), a smaller sequence_len, "
            "gradient_checkpointing: true, activation_offloading: true."
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in first_line:
        return (
            f"the machine ran out of memory: {first_line or 'nothing more is known'}\n"
            "Ways out: a smaller micro_batch_size (with more gradient_accumulation_steps), a smaller sequence_len, "
            "gradient_checkpointing: true, bf16: true."
        )
    if (isinstance(error, OSError) and error.errno in _DISK_FULL) or "No space left on device" in str(error):
        return (
            f"the disk is full: {first_line}\n"
            "What was saved before is whole. Free some space; `expertune train CONFIG --resume` goes on with a run."
        )
    return None
