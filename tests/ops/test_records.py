"""The recorder, through Triton's own hook chains: launches are played on the CPU, and real on a GPU."""

import threading
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expertune.ops.records import KernelRecord, KernelRecorder, LaunchDescription, gpu_facts

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
LazyDict = pytest.importorskip("triton.compiler").LazyDict
runtime = pytest.importorskip("triton.knobs").runtime

COMPILED = SimpleNamespace(num_warps=8, num_stages=3, shared=196608)


@LaunchDescription
def describe_product(grid: tuple[int, ...], metadata: Any, args: dict[str, Any]) -> dict[str, str]:
    return {"name": "product", "shape": f"S{args['num_rows']}", "tile": f"{args['BLOCK']}x64"}


class FakeClock:
    """Events are numbers; the n-th pair lies times_ms[n] apart."""

    def __init__(self, times_ms: Callable[[int], float] = lambda n: 1.0) -> None:
        self.times_ms, self.capturing = times_ms, False
        self.events = count()
        self.read = 0

    def can_time(self) -> bool:
        return not self.capturing

    def event(self) -> int:
        return next(self.events)

    def elapsed_ms(self, start: int, end: int) -> float:
        self.read += 1
        assert end > start
        return self.times_ms(start // 2)


def launch(
    description: Callable[..., dict[str, Any]] | None = describe_product,
    *,
    num_rows: int = 64,
    compiled: Any = COMPILED,
    fails: bool = False,
    between: Callable[[], object] = lambda: None,
) -> None:
    """What Triton's `CompiledKernel.launch_metadata` and its launcher do, in 3.6 and 3.9."""
    metadata = LazyDict({"name": "_kernel", "function": 0, "stream": 0})
    if description is not None:
        metadata.add(description, ((1, 1, 1), compiled, {"num_rows": num_rows, "BLOCK": 128}))
    runtime.launch_enter_hook(metadata)
    between()
    if not fails:
        runtime.launch_exit_hook(metadata)


def hooks_of(recorder: KernelRecorder) -> tuple[int, ...]:
    """How many hooks of a recorder are in the two chains."""
    chains = runtime.launch_enter_hook, runtime.launch_exit_hook
    return tuple(sum(getattr(hook, "__self__", None) is recorder for hook in chain.calls) for chain in chains)


@pytest.fixture(autouse=True)
def chains_as_they_were() -> Iterator[None]:
    before = list(runtime.launch_enter_hook.calls), list(runtime.launch_exit_hook.calls)
    yield
    assert (runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls) == before


def test_a_launch_is_recorded_with_what_was_compiled_and_the_median_time() -> None:
    with KernelRecorder(clock=FakeClock(lambda n: [5.0, 1.0, 2.0][n])) as recorder:
        for _ in range(3):
            launch()
    assert recorder.summarise() == (
        KernelRecord(
            name="product",
            shape="S64",
            tile="128x64",
            num_warps=8,
            num_stages=3,
            shared_memory_bytes=196608,
            calls=3,
            median_ms=2.0,
        ),
    )
    assert recorder.problem is None


def test_the_installed_triton_hands_over_what_a_description_needs() -> None:
    """Its own code between a launch and the hooks, on a kernel that is not there."""
    compiler = pytest.importorskip("triton.compiler.compiler")
    source = compiler.ASTSource.__new__(compiler.ASTSource)
    source.fn = SimpleNamespace(launch_metadata=describe_product, arg_names=["num_rows", "BLOCK"])
    kernel = SimpleNamespace(name="_kernel", function=0, src=source, metadata=COMPILED, _init_handles=lambda: None)
    with KernelRecorder(clock=FakeClock()) as recorder:
        metadata = compiler.CompiledKernel.launch_metadata(kernel, (1, 1, 1), 0, 32, 16)
        runtime.launch_enter_hook(metadata)
        runtime.launch_exit_hook(metadata)
    (record,) = recorder.summarise()
    assert (record.name, record.shape, record.tile, record.num_warps) == ("product", "S32", "16x64", 8)


def test_shapes_and_compilations_are_kept_apart_and_the_most_time_comes_first() -> None:
    with KernelRecorder(clock=FakeClock(lambda n: 1.0 if n < 2 else 3.0)) as recorder:
        launch(num_rows=1)
        launch(num_rows=1)
        launch(num_rows=2)
        launch(num_rows=2, compiled=SimpleNamespace(num_warps=4, num_stages=3, shared=0))
        launch(num_rows=2)
    seen = [(record.shape, record.num_warps, record.calls, record.median_ms) for record in recorder.summarise()]
    assert seen == [("S2", 8, 2, 3.0), ("S2", 4, 1, 3.0), ("S1", 8, 2, 1.0)]


def test_nothing_is_seen_before_start_after_stop_and_after_reset() -> None:
    recorder = KernelRecorder(clock=FakeClock())
    launch()
    assert recorder.summarise() == ()
    recorder.start()
    recorder.start()  # once more does not count twice
    launch()
    recorder.stop()
    recorder.stop()
    launch()
    assert [record.calls for record in recorder.summarise()] == [1]
    recorder.start()
    launch()
    recorder.stop()
    assert [record.calls for record in recorder.summarise()] == [2], "a second start goes on counting"
    recorder.reset()
    assert recorder.summarise() == ()


def test_hooks_are_taken_out_after_an_exception() -> None:
    recorder = KernelRecorder(clock=FakeClock())

    def step() -> None:
        with recorder:
            assert hooks_of(recorder) == (1, 1)
            launch()
            raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        step()
    assert hooks_of(recorder) == (0, 0)
    assert [record.calls for record in recorder.summarise()] == [1]


def test_other_hooks_stay() -> None:
    seen: list[Any] = []
    runtime.launch_enter_hook.add(seen.append)
    try:
        with KernelRecorder(clock=FakeClock()):
            launch()
        launch()
    finally:
        runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 2


def test_foreign_kernels_are_ignored_and_their_descriptions_not_called() -> None:
    def synchronises(grid: Any, metadata: Any, args: Any) -> dict[str, Any]:
        raise AssertionError("called")

    with KernelRecorder(clock=FakeClock()) as recorder:
        launch(None)
        launch(synchronises)
    assert recorder.summarise() == ()
    assert recorder.problem is None


def test_a_launch_that_another_hook_has_described_is_seen() -> None:
    def get(metadata: Any) -> None:  # as Proton's hook does
        metadata.get()

    def foreign(grid: Any, metadata: Any, args: Any) -> dict[str, Any]:
        return {"shape": "not ours"}

    runtime.launch_enter_hook.add(get)
    try:
        with KernelRecorder(clock=FakeClock()) as recorder:
            launch()
            launch(foreign)
    finally:
        runtime.launch_enter_hook.remove(get)
    assert [record.name for record in recorder.summarise()] == ["product"]
    assert recorder.problem is None


def test_a_bad_description_is_a_problem_on_record_and_no_exception() -> None:
    with KernelRecorder(clock=FakeClock()) as recorder:
        launch(LaunchDescription(lambda grid, metadata, args: {"name": args["misspelt"]}))
        launch()
    assert recorder.problem == "a launch could not be described: KeyError: 'misspelt'"
    assert [record.calls for record in recorder.summarise()] == [1]


def test_a_failed_launch_is_not_counted_and_disturbs_no_other() -> None:
    with KernelRecorder(clock=FakeClock()) as recorder:
        launch(num_rows=1, fails=True)
        launch(None)  # its exit hook must not end the failed one
        launch(num_rows=2)
    assert [(record.shape, record.calls) for record in recorder.summarise()] == [("S2", 1)]


def test_the_first_launches_are_timed_and_all_are_counted() -> None:
    clock = FakeClock()
    with KernelRecorder(max_samples=3, clock=clock) as recorder:
        for _ in range(10):
            launch()
        assert next(clock.events) == 6, "events were recorded beyond max_samples"
        assert clock.read == 0, "the host waited while recording"
    assert [record.calls for record in recorder.summarise()] == [10]
    assert clock.read == 3


def test_during_a_capture_launches_are_counted_but_not_timed() -> None:
    clock = FakeClock()
    with KernelRecorder(clock=clock) as recorder:
        clock.capturing = True
        launch()
        launch()
        assert next(clock.events) == 0, "an event was recorded into the graph"
        (record,) = recorder.summarise()
        assert (record.calls, record.median_ms) == (2, None)
        clock.capturing = False
        launch()
    (record,) = recorder.summarise()
    assert (record.calls, record.median_ms) == (3, 1.0)


def test_launches_of_two_threads_do_not_mix() -> None:
    both = threading.Barrier(2, timeout=30)

    def thread(num_rows: int) -> None:
        for _ in range(20):
            launch(num_rows=num_rows, between=both.wait)  # each is between its hooks while the other is

    with KernelRecorder(clock=FakeClock()) as recorder:
        threads = [threading.Thread(target=thread, args=(num_rows,)) for num_rows in (1, 2)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert sorted((record.shape, record.calls) for record in recorder.summarise()) == [("S1", 20), ("S2", 20)]


def test_without_triton_it_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_triton(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("expertune.ops.records.import_module", no_triton)
    with KernelRecorder(clock=FakeClock()) as recorder:
        launch()
    assert recorder.summarise() == ()
    assert recorder.problem is None


def test_replaced_hooks_are_a_problem_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None))
    monkeypatch.setattr("expertune.ops.records.import_module", lambda name: knobs)
    with KernelRecorder(clock=FakeClock()) as recorder:
        pass
    assert recorder.problem is not None
    assert "launch hooks" in recorder.problem


def test_the_cpu_has_no_gpu_facts() -> None:
    assert gpu_facts(torch.device("cpu")) is None


@LaunchDescription
def _describe_double(grid: tuple[int, ...], metadata: Any, args: dict[str, Any]) -> dict[str, str]:
    dtype = str(args["x_ptr"].dtype).removeprefix("torch.")
    return {"name": "double", "shape": f"N{args['num']} {dtype} G{grid[0]}", "tile": str(args["BLOCK"])}


@triton.jit(launch_metadata=_describe_double)
def _double_kernel(x_ptr, out_ptr, num, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < num)
    tl.store(out_ptr + offsets, 2 * x, mask=offsets < num)


def double(x: torch.Tensor, block: int = 128, num_warps: int = 2) -> torch.Tensor:
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), block),)
    _double_kernel[grid](x, out, x.numel(), BLOCK=block, num_warps=num_warps, num_stages=2)
    return out


class Double(torch.autograd.Function):
    threads: list[int]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, threads: list[int]) -> torch.Tensor:
        ctx.threads = threads
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.threads.append(threading.get_ident())
        return double(dout.contiguous(), block=256, num_warps=4), None


def test_a_described_kernel_runs() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(1000, device=device)
    torch.testing.assert_close(double(x), 2 * x)


@pytest.mark.gpu
def test_real_launches_of_the_main_thread() -> None:
    x = torch.randn(2**20, device="cuda")
    double(x)  # compiles
    with KernelRecorder() as recorder:
        for _ in range(5):
            double(x)
        double(x, block=512, num_warps=8)
        double(x[:1000].half())
    records = {(record.shape, record.tile): record for record in recorder.summarise()}
    assert recorder.problem is None
    assert set(records) == {
        ("N1048576 float32 G8192", "128"),
        ("N1048576 float32 G2048", "512"),
        ("N1000 float16 G8", "128"),
    }
    many = records["N1048576 float32 G8192", "128"]
    assert (many.name, many.num_warps, many.num_stages, many.calls) == ("double", 2, 2, 5)
    assert records["N1048576 float32 G2048", "512"].num_warps == 8
    assert many.shared_memory_bytes >= 0
    for record in records.values():
        assert record.median_ms is not None
        assert 0 < record.median_ms < 10
    # 8 MiB in and out: at the 20 TB/s that no GPU has it would be 0.4 microseconds
    assert many.median_ms > 4e-4  # type: ignore[operator]


@pytest.mark.gpu
def test_real_launches_of_the_autograd_thread() -> None:
    x, threads = torch.randn(4096, device="cuda", requires_grad=True), list[int]()
    double(x.detach(), block=256, num_warps=4)  # compiles
    with KernelRecorder() as recorder:
        Double.apply(x, threads).sum().backward()
    assert threads
    assert threads[0] != threading.get_ident(), "the backward ran in the main thread: this tests nothing"
    (record,) = recorder.summarise()
    assert (record.tile, record.num_warps, record.calls) == ("256", 4, 1)
    assert record.median_ms is not None
    assert record.median_ms > 0


@pytest.mark.gpu
def test_real_hooks_are_taken_out_after_an_exception() -> None:
    x = torch.randn(64, device="cuda")
    recorder = KernelRecorder()

    def step() -> None:
        with recorder:
            double(x)
            raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        step()
    double(x)
    assert hooks_of(recorder) == (0, 0)
    assert [record.calls for record in recorder.summarise()] == [1]


@pytest.mark.gpu
def test_a_real_capture_is_counted_and_replays() -> None:
    x = torch.randn(4096, device="cuda")
    double(x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with KernelRecorder() as recorder:
        with torch.cuda.graph(graph):
            out = double(x)
        x.copy_(torch.ones_like(x))
        graph.replay()
    torch.testing.assert_close(out, torch.full_like(x, 2.0))
    (record,) = recorder.summarise()
    assert (record.calls, record.median_ms) == (1, None)


@pytest.mark.gpu
def test_gpu_facts_are_the_gpus() -> None:
    facts = gpu_facts(torch.device("cuda", 0))
    assert facts is not None
    assert facts.name == torch.cuda.get_device_name(0)
    assert facts.capability == ".".join(map(str, torch.cuda.get_device_capability(0)))
    assert facts.memory_bytes == pytest.approx(torch.cuda.mem_get_info(0)[1], rel=0.05)
    assert 48 * 1024 <= facts.shared_memory_bytes <= 512 * 1024
    if facts.capability == "9.0":
        assert facts.shared_memory_bytes == 227 * 1024
        assert facts.num_multiprocessors > 100
