"""Real processes for the tests: gloo, started once for each number of them and used for many cases."""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from expertune.distributed.mesh import leave_mesh
from tests.interpreter import let_loops_have_bounds

PRELOADED = ["tests.distributed.runs", "tests.distributed.test_dispatch", "expertune.train.run"]


class Crew:
    """`size` processes that wait for a function to run together; each knows its rank by torchrun's variables."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)  # imported once, not by each process
        self.ends: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(size):
            here, there = context.Pipe()
            self._stacks(rank).touch()
            process = context.Process(target=_work, args=(rank, size, there, self._stacks(rank)), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
        """Run `function(*args)` in every process; the results by rank. Raises what the processes raised, as text."""
        with reserved_port() as port:  # a new one: who joins again must not meet the store that others are leaving
            for end in self.ends:
                end.send((function, args, port))
            deadline = time.monotonic() + timeout_s
            answers = [end.recv() if end.poll(max(deadline - time.monotonic(), 0)) else None for end in self.ends]
        problems = [f"rank {rank}:\n{got[1]}" for rank, got in enumerate(answers) if got is not None and not got[0]]
        late = " and ".join(str(rank) for rank, got in enumerate(answers) if got is None)
        if late:
            problems.append(f"rank {late} of {self.size} did not finish {function.__name__} in {timeout_s} s")
            problems += [f"rank {rank}, where it is:\n{stack}" for rank, stack in enumerate(self.stacks())]
            self.close()
            raise TimeoutError("\n".join(problems))
        if problems:
            raise AssertionError("\n".join(problems))
        return [value for _, value in answers]

    def stacks(self) -> list[str]:
        """Of all threads, of each process."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        return [self._stacks(rank).read_text() for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()

    def _stacks(self, rank: int) -> Path:
        return Path(self.folder.name) / str(rank)


def _work(rank: int, size: int, end: Connection, stacks: Path) -> None:
    faulthandler.register(signal.SIGUSR1, stacks.open("w"), all_threads=True)
    torch.set_num_threads(1)
    let_loops_have_bounds()
    while True:
        function, args, port = end.recv()
        os.environ |= torchrun_variables(rank, size, port)
        try:
            end.send((True, function(*args)))
        except BaseException:
            end.send((False, traceback.format_exc()))
            sys.stdout.flush()
        leave_mesh()  # torch remembers meshes by their shape: groups get the same names each time one is laid out


def torchrun_variables(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that is free at every address, and that nobody gets but who asks for it, as rank 0's store does."""
    with socket.socket() as bound:  # and never listening: another may, where both allow it
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("", 0))
        yield int(bound.getsockname()[1])


@contextmanager
def crew(size: int) -> Iterator[Crew]:
    started = Crew(size)
    try:
        yield started
    finally:
        started.close()
