"""A whole step as one CUDA graph, and what a capture that fails leaves behind."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from expertune.bench.rivals import Step

_WARM_UP_CALLS = 3  # libraries allocate what they keep for a stream in the first ones


def capture(step: Step, stream: torch.cuda.Stream) -> Callable[[], None]:
    """The step, forward and backward, as a graph: what is returned launches it, and holds the memory it works in.

    stream: that of every earlier call too. Autograd runs a leaf's part on the stream where its node was made, which
    lives as long as anything computed from the leaf, and a capture must not wait for another stream.

    Raises what keeps the step from being captured. Where torch itself waits for the device, that is before the capture.
    """
    gc.collect()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), _refusing_to_wait():
        for _ in range(_WARM_UP_CALLS):
            step()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    failure: Exception | None = None
    try:
        # Entered twice, because torch's context does not give the stream back when a capture fails.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            try:
                step()
            except Exception as error:
                failure = error  # says more than the end of the capture, which then fails too
    except Exception as error:
        failure = failure or error
        _clean_up(pool)
    if failure is not None:
        raise failure
    return graph.replay


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Inside, what waits for the device raises, as far as torch knows of it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch does not know of everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _clean_up(pool: tuple[int, int]) -> None:
    """What torch's `capture_end` leaves undone when it raises.

    The allocator takes the capture for one that goes on, so that `empty_cache` raises, and so does the default random
    generator, so that `randn` raises.
    """
    device = torch.cuda.current_device()
    with suppress(Exception):  # the first call raises where the capture did end; then the graph releases the pool
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
