"""A launcher goes to the kernel that was compiled for exactly such arguments."""

import ast
import importlib.util
import inspect
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from expertune import ops
from expertune.ops import triton_launch
from expertune.ops.integers import cdiv, next_power_of_2
from expertune.ops.triton_launch import Launcher, compile_only


@triton.jit
def _scale_kernel(x_ptr, out_ptr, number, count, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < count, other=0.0)
    tl.store(out_ptr + places, x * number * FACTOR, mask=places < count)


def _linear_like(x_ptr, capacity, num_in, BLOCK: tl.constexpr):
    """Only declared."""


class Recorded:
    """Stands in for a kernel function `(x_ptr, w_desc, number, CONSTANT)`: what it was asked to find or to compile, and
    what was launched of it."""

    def __init__(self, *, specialize: bool = True) -> None:
        self.params = [
            SimpleNamespace(
                name=name, is_constexpr=name.isupper(), do_not_specialize=not (specialize or name.isupper())
            )
            for name in ("x_ptr", "w_desc", "number", "CONSTANT")
        ]
        self.compiled: list[dict[str, int]] = []
        self.warmed_up: list[tuple[Any, ...]] = []
        self.launched: list[tuple[int, tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*args: Any, **options: int) -> Any:
            number = len(self.compiled)
            self.compiled.append({name: value for name, value in options.items() if name != "launch_pdl"})
            return Compiled(self, number)

        return compile_and_launch

    def warmup(self, *args: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **_: bool) -> None:
        self.warmed_up.append((*args, num_warps, num_stages))


class Compiled:
    """Stands in for what Triton compiled: `described` counts the launches for which it made a description."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Recorded, number: int) -> None:
        self.kernel, self.number, self.described = kernel, number, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any) -> None:
            self.described += 1
            self.kernel.launched.append((self.number, grid, args))

        return run

    def run(self, x: int, y: int, z: int, stream: str, function: str, metadata: str, *rest: Any) -> None:
        assert (stream, function, metadata, *rest[:3]) == ("stream 0", "function", "metadata", None, None, None)
        self.kernel.launched.append((self.number, (x, y, z), rest[3:]))


@contextmanager
def on_device(number: int) -> Iterator[None]:
    """As if this GPU were the current one."""
    active = SimpleNamespace(get_current_stream="stream {}".format)
    with (
        patch("torch.cuda.current_device", lambda: number),
        patch.object(triton_launch, "driver", SimpleNamespace(active=active)),
    ):
        yield


def all_launchers() -> dict[str, Launcher]:
    names = [module.name for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]
    launchers = {
        f"{module}.{name}": value
        for module in names
        for name, value in vars(import_module(module)).items()
        if isinstance(value, Launcher)
    }
    assert len(launchers) >= 12
    return launchers


def test_every_kernel_waits_for_those_before_it_first() -> None:
    for name, launcher in all_launchers().items():
        function = ast.parse(textwrap.dedent(inspect.getsource(launcher.kernel.fn))).body[0]
        assert isinstance(function, ast.FunctionDef)
        # Gluon's functions cannot call Triton's; those are for Hopper alone, where the one is the other.
        wait = (
            "tl.extra.cuda.gdc_wait()" if getattr(launcher.kernel, "is_gluon", bool)() else "wait_for_earlier_kernels()"
        )
        assert ast.unparse(function.body[0]) == wait, name


def launches(*calls: tuple[Any, ...], specialize: bool = True, **options: Any) -> int:
    """How many kernels these calls compile."""
    kernel = Recorded(specialize=specialize)
    launcher = Launcher(kernel)
    with on_device(0):
        for call in calls:
            launcher((2,), *call, **options)
    return len(kernel.compiled)


X = torch.zeros(64)


def block(rows: int) -> TensorDescriptor:
    return TensorDescriptor(X.view(8, 8), [8, 8], [8, 1], [rows, 8])


@pytest.mark.parametrize(
    "other",
    [
        (X.bfloat16(), None, 32, True), (X[1:], None, 32, True), (None, None, 32, True), (X, None, 33, True),
        (X, None, 1, True), (X, None, 2**31, True), (X, None, None, True), (X, None, 32.0, True), (X, None, 32, False),
        (X, block(4), 32, True),
    ],
    ids=str,
)  # fmt: skip
def test_what_triton_specialises_on_is_asked_for_anew(other: tuple[Any, ...]) -> None:
    assert launches((X, None, 32, True), other) == 2
    assert launches(other, other) == 1


def test_what_it_does_not_specialise_on_is_not() -> None:
    assert launches((X, None, 32, True), (torch.ones(7), None, 32, True), (X[4:], None, 32, True)) == 1
    assert launches(*((None, block(rows), 1, True) for rows in (4, 4, 8))) == 2
    assert launches((None, block(4), 1, True), (None, TensorDescriptor(X, [64], [1], [4]), 1, True)) == 2


def test_a_general_number_has_one_kernel_for_all_its_values() -> None:
    general = {"specialize": False}
    assert launches((X, None, 32, True), (X, None, 1, True), (X, None, 48, True), (X, None, -5, True), **general) == 1
    wide = (X, None, 2**31, True), (X, None, 2**31 + 1, True)
    assert launches((X, None, 32, True), *wide, **general) == 2, "64 bits are another type"
    assert launches((X, None, 32, True), (X, None, -(2**31) - 1, True), **general) == 2
    assert launches((X, None, 1, True), (X, None, 1.0, True), **general) == 2
    assert launches((X, None, 32, True), (X, None, 32, False), **general) == 2


def test_numbers_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "MOST_KEPT", 3)
    launcher = Launcher(kernel := Recorded())
    with on_device(0):
        for number in (*range(5), 4):
            launcher((2,), X, None, number, True)
    assert len(launcher._compiled) == 2
    assert len(kernel.compiled) == 5


def test_a_launch_is_described_for_those_who_listen_only() -> None:
    launcher, chain = Launcher(Recorded()), triton.knobs.runtime.launch_exit_hook
    with on_device(0):
        for _ in range(2):
            launcher((2,), X, None, 32, True)
        (compiled,) = launcher._compiled.values()
        assert compiled.described == 0
        chain.add(listener := lambda _: None)
        try:
            launcher((2,), X, None, 32, True)
        finally:
            chain.remove(listener)
        launcher((2,), X, None, 32, True)
    assert compiled.described == 1
    assert compiled.kernel.launched == [(0, (2, 1, 1), (X, None, 32, True))] * 3


def test_a_general_parameter_as_triton_declares_it() -> None:
    declared = JITFunction(_linear_like, do_not_specialize=["capacity"])
    launcher = Launcher(declared)
    with on_device(0):
        keys = {
            (capacity, num_in): launcher._key((X, capacity, num_in, 16), 0, 4, 3)
            for capacity in (1, 48, 49, 2**31) for num_in in (64, 65)
        }  # fmt: skip
    assert keys[48, 64] == keys[49, 64] == keys[1, 64]
    assert keys[48, 64] != keys[48, 65]
    assert keys[48, 64] != keys[2**31, 64]


def test_compile_only_compiles_what_is_not_compiled_and_launches_nothing() -> None:
    kernel = Recorded()
    launcher = Launcher(kernel)
    with on_device(0):
        launcher((2,), X, None, 32, True)
        with compile_only():
            launcher((2,), X.to("meta"), None, 32, True)
            launcher((2,), X.to("meta"), None, 7, True, num_warps=8)
        assert kernel.launched == []
        assert [warmed_up[2:] for warmed_up in kernel.warmed_up] == [(7, True, 8, 3)]
        launcher((2,), X, None, 32, True)
    assert len(kernel.compiled) == len(kernel.launched) == 1


def test_inside_of_another_compile_only_the_outer_one_decides() -> None:
    launcher = Launcher(kernel := Recorded())
    with on_device(0):
        with compile_only():
            with compile_only():
                launcher((2,), X, None, 32, True)
            launcher((2,), X, None, 48, True)
        assert len(kernel.warmed_up) == 2
        assert kernel.compiled == []
        launcher((2,), X, None, 32, True)
    assert len(kernel.compiled) == 1


def test_compile_only_ends_with_an_error() -> None:
    launcher = Launcher(kernel := Recorded())
    with on_device(0):
        with pytest.raises(KeyError), compile_only():
            raise KeyError
        launcher((2,), X, None, 32, True)
    assert len(kernel.compiled) == 1


def test_compile_only_without_tritons_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(triton, "AsyncCompileMode")
    launcher = Launcher(kernel := Recorded())
    with on_device(0), compile_only():
        launcher((2,), X, None, 32, True)
    assert len(kernel.warmed_up) == 1
    assert kernel.compiled == []


class Loadable:
    """What Triton compiled: notes which thread loads it."""

    src, metadata = "its source", "its metadata"

    def __init__(self, loaded_by: list[int]) -> None:
        self.loaded_by = loaded_by

    @property
    def run(self) -> None:
        self.loaded_by.append(get_ident())


def test_threads_build_what_launches_and_one_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    loaded: list[int] = []

    def build(*given: str) -> None:
        built.append((given, get_ident() == here))

    class Pool:
        """Triton's, without the rest of it."""

        def __init__(self, executor: Any, *, ignore_errors: bool) -> None:
            self.futures = [executor.submit(partial(kernels.__getitem__, place)) for place in range(len(kernels))]

        def __enter__(self) -> None:
            """Kernels are compiling."""

        def __exit__(self, *_: object) -> None:
            assert [future.result() for future in self.futures] == kernels

    class Kernel(Recorded):
        def warmup(self, *args: Any, **options: Any) -> Any:
            return next(compiled)

    here, kernels = get_ident(), [Loadable(loaded) for _ in range(3)]
    compiled = iter(kernels)
    monkeypatch.setattr(triton, "AsyncCompileMode", Pool, raising=False)
    launcher = Launcher(Kernel())
    with on_device(0):
        monkeypatch.setattr(triton_launch.driver.active, "launcher_cls", build, raising=False)
        with compile_only():
            for number in (3, 5, 7):
                launcher((2,), X, None, number, True)
            assert not loaded
    assert built == [(("its source", "its metadata"), False)] * 3
    assert loaded == [here] * 3


def test_an_error_of_a_compilation_is_its_own() -> None:
    with ThreadPoolExecutor() as threads, pytest.raises(ZeroDivisionError):
        triton_launch._Compiling(threads).submit(lambda: 1 // 0).result()


LAUNCHERS = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(NUMBER); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "__launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___launcher(void) { return PyModule_Create(&module); }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, as Triton does")
def test_kernels_that_are_launched_first_at_once_get_their_own_launchers(tmp_path: Path) -> None:
    """With modules as Triton 3.6 makes them; without the lock every tenth of these loads gets another's."""
    include, files = sysconfig.get_paths()["include"], [tmp_path / str(number) / "__launcher.so" for number in range(8)]
    for number, file in enumerate(files):
        file.parent.mkdir()
        source = file.with_suffix(".c")
        source.write_text(LAUNCHERS.replace("NUMBER", str(number)))
        subprocess.run(["gcc", source, "-shared", "-fPIC", "-I", include, "-o", file], check=True)

    def load(file: Path) -> Any:
        spec = importlib.util.spec_from_file_location("__launcher", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.launch

    class Loads(Recorded):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **_: found.append((args[2], load(files[args[2]])()))

    for file in files:
        load(file)
    found: list[tuple[int, int]] = []

    def launch_all(first: int) -> None:
        launcher = Launcher(Loads())
        for _ in range(20):
            launcher._compiled.clear()
            launcher((2,), X, None, first, True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with on_device(0), ThreadPoolExecutor(len(files)) as threads:
            list(threads.map(launch_all, range(len(files))))
    finally:
        sys.setswitchinterval(interval)
        sys.modules.pop("__launcher", None)
    assert len(found) == 20 * len(files)
    assert [pair for pair in found if pair[0] != pair[1]] == []


def test_one_is_first() -> None:
    what = object()
    with ThreadPoolExecutor() as threads:
        assert sorted(threads.map(lambda _: triton_launch.is_first(what, 1), range(20))) == [*[False] * 19, True]
    assert triton_launch.is_first(what, 2)


def test_the_interpreter_has_nothing_to_compile() -> None:
    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise AssertionError("launched")

    with compile_only():
        Launcher(Interpreted())((2,), X, None, 32, True)


@pytest.mark.gpu
def test_what_is_compiled_ahead_is_not_compiled_by_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand: list[bool] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda *, is_manual_warmup, **_: by_hand.append(is_manual_warmup)
    )
    launcher, x = Launcher(_scale_kernel), torch.randn(64, device="cuda")
    with compile_only():
        for factor in (7, 9):
            launcher((2,), x.to("meta"), x.to("meta"), 3, 64, factor, 32)
    assert by_hand == [True, True]
    for factor in (7, 9):
        launcher((2,), x, out := torch.empty_like(x), 3, 64, factor, 32)
        torch.testing.assert_close(out, x * 3 * factor)
    assert by_hand == [True, True]


def test_warps_stages_and_device_are_part_of_it() -> None:
    kernel = Recorded()
    launcher = Launcher(kernel)
    for device, warps, stages in ((0, 4, 3), (0, 8, 3), (0, 4, 2), (1, 4, 3), (0, 4, 3)):
        with on_device(device):
            launcher((3, 2), X, None, 5, True, num_warps=warps, num_stages=stages)
    assert len(kernel.compiled) == 4
    assert kernel.launched == [(0, (3, 2, 1), (X, None, 5, True))]


@pytest.mark.gpu
def test_it_computes_on_a_gpu_the_first_time_and_again() -> None:
    launcher = Launcher(_scale_kernel)
    for count, number, factor in ((64, 3, 2), (64, 3, 2), (63, 1, 2), (64, 3, 5), (64, 16, 5)):
        x, out = torch.randn(count, device="cuda"), torch.empty(count, device="cuda")
        launcher((cdiv(count, 32),), x, out, number, count, factor, 32)
        torch.testing.assert_close(out, x * number * factor)


def test_integers() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 128, 129)] == [1, 2, 4, 4, 8, 128, 256]
