"""Messages between processes whose failure says who waited, in which layer and for what.

A collective that stalls looks the same on every rank: silence. Gloo raises after the group's timeout, without a word of
the model; NCCL lets the host run on and kills the process from a thread of its own. So every collective goes through
`Wire`, which knows the layer: errors of either library come out as a CollectiveError, and where the host has to wait
(the counts of a dispatch, the end of a step) it waits by looking, with a clock.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expertune.errors import CollectiveError


@dataclass(frozen=True)
class Wire:
    """A group of processes and the place in the model that talks over it.

    group: None is the whole world. where: a layer's name, for messages. timeout_s: seconds until a wait is an error.
    """

    group: dist.ProcessGroup | None
    where: str
    timeout_s: float

    @property
    def size(self) -> int:
        """The number of processes in the group."""
        return dist.get_world_size(self.group)

    def exchange_rows(self, rows_PX: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Tensor:
        """Send `send[r]` rows [*, ...] to each rank r of the group, get `receive[r]` of each: [sum(receive), ...].

        rows_PX: sorted by destination. Zero rows in any direction are fine.
        """
        out = rows_PX.new_empty(sum(receive), *rows_PX.shape[1:])
        rows_PX = rows_PX.contiguous()
        with self._named(what):
            work = dist.all_to_all_single(out, rows_PX, list(receive), list(send), group=self.group, async_op=True)
            self._finish(work, rows_PX, what)
        return out

    def exchange_counts(
        self, counts_NC: Tensor, what: str, *, meanwhile: Callable[[], None] | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Send row r of [N, C] integers to rank r of the N in the group; returns what was sent and what each sent here.

        The host waits for the numbers: the one place in a layer where a stalled or lost rank is certain to be noticed.
        meanwhile: called once they are under way; the device need not wait for them with what it is given there. Its
        errors are its own.
        """
        received_NC = torch.empty_like(counts_NC)
        with self._named(what):
            work = dist.all_to_all_single(received_NC, counts_NC.contiguous(), group=self.group, async_op=True)
            read = self._start_reading((counts_NC, received_NC), work, what)
        if meanwhile is not None:
            meanwhile()
        with self._named(what):
            sent, received = read()
        return sent, received

    def sum(self, values: Tensor, what: str, *, wait: bool = False) -> Tensor:
        """Sum a tensor over the group, in place. wait: the host waits for it, with the clock."""
        return self._reduce(values, dist.ReduceOp.SUM, what, wait)

    def maximum(self, values: Tensor, what: str) -> Tensor:
        """The elementwise maximum over the group, in place; the host waits for it."""
        return self._reduce(values, dist.ReduceOp.MAX, what, True)

    def gather(self, values: Tensor, what: str) -> list[Tensor]:
        """The tensor of every rank of the group, in rank order; all of one shape."""
        out = [torch.empty_like(values) for _ in range(self.size)]
        with self._named(what):
            work = dist.all_gather(out, values.contiguous(), group=self.group, async_op=True)
            self._finish(work, values, what)
        return out

    def share(self, value: Any) -> Any:
        """What the first process of the whole job passes here, in every process; any value that can be pickled."""
        box = [value]
        with self._named("waiting for the first process"):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self, what: str) -> None:
        """Wait until every rank is here."""
        device = "cpu" if dist.get_backend(self.group) == "gloo" else "cuda"
        self._reduce(torch.zeros(1, device=device), dist.ReduceOp.SUM, what, True)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType, what: str, wait: bool) -> Tensor:
        with self._named(what):
            work = dist.all_reduce(values, op, group=self.group, async_op=True)
            self._finish(work, values, what, wait=wait)
        return values

    def _finish(self, work: dist.Work, values: Tensor, what: str, *, wait: bool = False) -> None:
        """On a CPU, wait until it is done; on a GPU make its stream wait, and the host too if asked to."""
        if not values.is_cuda:
            work.wait(timedelta(seconds=self.timeout_s))  # raises by itself
            return
        work.wait()
        if wait:
            self._wait_for_device(what)

    def _start_reading(self, tensors: Sequence[Tensor], work: dist.Work, what: str) -> Callable[[], list[Any]]:
        """What waits for the work and returns the tensors' values on the host."""
        if not tensors[0].is_cuda:

            def read_here() -> list[Any]:
                self._finish(work, tensors[0], what)
                return [values.tolist() for values in tensors]

            return read_here
        # Copies, which need no multiprocessor: the GPU may be full of what runs meanwhile. They have a stream of their
        # own, so that the current one has not to wait.
        pinned = [torch.empty(values.shape, dtype=values.dtype, pin_memory=True) for values in tensors]
        aside = torch.cuda.Stream(tensors[0].device, priority=-1)
        with torch.cuda.stream(aside):
            work.wait()
            for there, here in zip(tensors, pinned, strict=True):
                there.record_stream(aside)
                here.copy_(there, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()

        def read_there() -> list[Any]:
            self._wait_for_event(copied, what)
            return [here.tolist() for here in pinned]

        return read_there

    def _wait_for_device(self, what: str) -> None:
        """Wait until the current stream has come this far."""
        here = torch.cuda.Event()
        here.record()
        self._wait_for_event(here, what)

    def _wait_for_event(self, event: torch.cuda.Event, what: str) -> None:
        """By looking, with the clock."""
        start = time.monotonic()
        while not event.query():
            if time.monotonic() - start > self.timeout_s:
                raise self._error(what, f"nothing arrived for {self.timeout_s:g} s")
            time.sleep(0)  # other threads of Python may run

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """Within it, errors of messages that others send (FSDP2, DeepEP) also come out as a CollectiveError."""
        try:
            yield
        except CollectiveError:
            raise
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or any(library in str(error) for library in ("gloo", "DeepEP")):
                raise self._error(what, next(iter(str(error).splitlines()))) from error
            raise

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except CollectiveError:
            raise
        except RuntimeError as error:  # DistBackendError and what gloo raises
            raise self._error(what, next(iter(str(error).splitlines()), type(error).__name__)) from error

    def _error(self, what: str, problem: str) -> CollectiveError:
        ranks = dist.get_process_group_ranks(self.group) if self.group is not None else range(dist.get_world_size())
        others = ", ".join(str(rank) for rank in ranks if rank != dist.get_rank())
        return CollectiveError(
            f"rank {dist.get_rank()}: {what} in {self.where} failed, waiting for rank {others}: {problem}. "
            "One of them has stopped, is stuck or was killed: its own output says why. `--resume` goes on from the "
            "last checkpoint; ddp_timeout is how long to wait."
        )
