"""DeepEP as the transport, through a stand-in for its package: the oracle, the all-to-all's numbers, refusals."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from expertune.distributed.deep_ep import DeepEP, open_deep_ep
from expertune.distributed.dispatch import AllToAll, ExpertShard, Transport, return_from_experts, send_to_experts
from expertune.distributed.mesh import EXPERT, ParallelMesh, join_mesh
from expertune.distributed.sizes import ParallelSizes
from expertune.errors import CollectiveError, ConfigError
from expertune.integrations import sharded_model
from expertune.train import processes
from expertune.train.config import load_config
from tests.distributed.processes import Crew
from tests.distributed.runs import adapter_of, log_of, train_here, wide_model, write_run
from tests.distributed.test_dispatch import CASES, EXPERTS, Case, assert_equals_the_oracle, through
from tests.train.runs import write_config

FAKE = Path(__file__).parent / "fake_deep_ep"
IN_BF16 = {
    name: replace(case, dtype=torch.bfloat16)
    for name, case in CASES.items()
    if case.backend == "torch_grouped" and case.dtype == torch.float32
}


@contextmanager
def fake_package() -> Iterator[None]:
    """Within it, `import deep_ep` finds the stand-in."""
    sys.path.insert(0, str(FAKE))
    try:
        yield
    finally:
        sys.path.remove(str(FAKE))
        sys.modules.pop("deep_ep", None)


def meet(size: int, timeout_s: float = 30) -> tuple[ParallelMesh, DeepEP]:
    mesh = join_mesh(ParallelSizes(expert=size), "cpu", timeout_s)
    transport = open_deep_ep(
        mesh.wire(EXPERT, "the model"), num_local=EXPERTS // size, widths=[256], dtype=torch.bfloat16
    )
    return mesh, transport


def shard_of(mesh: ParallelMesh, transport: Transport, where: str = "the test's layer") -> ExpertShard:
    return ExpertShard(mesh.wire(EXPERT, where), mesh.index(EXPERT), EXPERTS // mesh.sizes.expert, transport)


def both_ways(case: Case) -> list[dict[str, Any]]:
    """In one process of several: by DeepEP, and by the all-to-all."""
    with fake_package():
        mesh, transport = meet(len(case.tokens))
        return [through(shard_of(mesh, each), case) for each in (transport, AllToAll())]


@pytest.mark.parametrize("name", IN_BF16)
def test_it_equals_the_oracle_and_the_all_to_all(name: str, two: Crew, four: Crew) -> None:
    case = IN_BF16[name]
    got = (two if len(case.tokens) == 2 else four).run(both_ways, case)
    assert_equals_the_oracle([by_deep_ep for by_deep_ep, _ in got], case)
    for by_deep_ep, by_all_to_all in got:
        assert by_deep_ep["arrived"] == by_all_to_all["arrived"]
        for key in ("y", "dx", "dweights"):
            assert torch.equal(by_deep_ep[key], by_all_to_all[key]), f"{key} is not the same bit for bit"


def strided(_: None) -> list[torch.Tensor]:
    """Experts that return their rows, for a token of both processes and one of the first; nothing is contiguous."""
    with fake_package():
        mesh, transport = meet(2)
        x_TH = torch.randn(32, 2).bfloat16().T.requires_grad_()
        ids_TK = torch.tensor([[0, 4], [1, 2]]).T.contiguous().T
        arrived = send_to_experts(x_TH, ids_TK, torch.ones(2, 2).T, shard_of(mesh, transport))
        y_TH = return_from_experts(arrived.x_RH.T.contiguous().T, arrived)
        (dx_TH,) = torch.autograd.grad(y_TH.sum(), x_TH)  # the upstream gradient has strides of zero
        return [x_TH.detach(), y_TH.detach(), dx_TH]


def test_tensors_with_other_strides(two: Crew) -> None:
    times_T1 = torch.tensor([[2.0], [1.0]]).bfloat16()
    for x_TH, y_TH, dx_TH in two.run(strided, None):
        assert torch.equal(y_TH, x_TH * times_T1)
        assert torch.equal(dx_TH, times_T1.expand(2, 32))


def called_meanwhile(_: None) -> list[int]:
    with fake_package():
        mesh, transport = meet(2)
        x_TH, ids_TK = torch.zeros(2, 32, dtype=torch.bfloat16), torch.tensor([[0, 4], [1, 5]])
        counts = []
        for each in (transport, AllToAll()):
            calls: list[None] = []
            shard = replace(shard_of(mesh, each), meanwhile=partial(calls.append, None))
            send_to_experts(x_TH, ids_TK, torch.ones(2, 2), shard)
            counts.append(len(calls))
        return counts


def test_both_transports_call_what_runs_meanwhile(two: Crew) -> None:
    assert two.run(called_meanwhile, None) == [[1, 1]] * 2


def stall(_: None) -> str | None:
    """The second process never comes to the layer; and a message of DeepEP's own."""
    with fake_package():
        mesh, transport = meet(2, timeout_s=1)
        if mesh.rank == 1:
            time.sleep(3)
            return None
        shard = shard_of(mesh, transport, "model.layers.7.mlp.experts")
        x_TH, ids_TK = torch.zeros(2, 32, dtype=torch.bfloat16), torch.tensor([[0, 4], [1, 5]])
        with pytest.raises(CollectiveError) as caught:
            send_to_experts(x_TH, ids_TK, torch.ones(2, 2), shard)
        return str(caught.value)


def test_a_stall_names_rank_and_layer(two: Crew) -> None:
    message, _ = two.run(stall, None)
    for part in ("rank 0", "meeting", "model.layers.7.mlp.experts", "waiting for rank 1", "--resume", "ddp_timeout"):
        assert part in message


def time_out(_: None) -> str:
    with fake_package():
        mesh, transport = meet(2)

        def dispatch(*_: Any, **__: Any) -> None:
            raise RuntimeError("Failed: DeepEP error csrc/deep_ep.cpp:508 'DeepEP error: CPU recv timeout'")

        transport.buffer.dispatch = dispatch
        x_TH, ids_TK = torch.zeros(2, 32, dtype=torch.bfloat16), torch.tensor([[0, 4], [1, 5]])
        with pytest.raises(CollectiveError) as caught:
            send_to_experts(x_TH, ids_TK, torch.ones(2, 2), shard_of(mesh, transport))
        return str(caught.value)


def test_its_own_timeout_names_the_layer(two: Crew) -> None:
    assert "sending tokens in the test's layer failed" in two.run(time_out, None)[0]


def train_with_fake(config: Path) -> list[bool]:
    """One process's part of a run; for each buffer that was opened, whether Python leaves it alone."""
    opened: list[DeepEP] = []

    def opening(*args: Any, **kwargs: Any) -> DeepEP:
        opened.append(open_deep_ep(*args, **kwargs))
        return opened[-1]

    with fake_package(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_check_backend", lambda *_: None)  # there is no GPU, which it looks at
        patch.setattr(sharded_model, "open_deep_ep", opening)
        train_here(config)
    return [transport.buffer.explicitly_destroy for transport in opened]


def test_a_run_equals_the_all_to_all(tmp_path: Path, two: Crew) -> None:
    model = wide_model(tmp_path / "model")
    keys: dict[str, Any] = {
        "expert_parallel_size": 2,
        "gradient_checkpointing": True,
        "bf16": True,
        "max_steps": 3,
        "sample_prompts": None,
    }
    both = {}
    for name, backend in {"deep_ep": "deep_ep", "gloo": None}.items():
        config = write_run(tmp_path / name, model, batches=2, **keys, expert_parallel_backend=backend)
        assert two.run(train_with_fake, config, timeout_s=120) == [[True] if backend else []] * 2
        both[name] = [entry["loss"] for entry in log_of(tmp_path / name)], adapter_of(tmp_path / name)
    (losses, adapter), (want_losses, want_adapter) = both["deep_ep"], both["gloo"]
    assert len(losses) == 3
    assert losses == want_losses
    assert adapter.keys() == want_adapter.keys()
    assert all(torch.equal(adapter[name], want_adapter[name]) for name in adapter)


WIRE: Any = SimpleNamespace(size=2, group=None)
FITS: dict[str, Any] = {"num_local": 4, "widths": [256], "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float32}, "adds up bf16 only, and the experts are in torch.float32; need bf16: true"),
        ({"widths": [256, 2880]}, "rows have 2880 values; need a multiple of 256, at most 7936"),
        ({"widths": [8192]}, "rows have 8192 values; need a multiple of 256, at most 7936"),
        ({"num_local": 256}, "512 / 2 = 256 experts on each process, and deep_ep takes 128"),
    ],
)
def test_models_that_it_cannot_carry(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_deep_ep(WIRE, **(FITS | changes))


class _Old:
    """deep_ep.Buffer before 1.2."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0) -> None:
        pass


class _NoPeers:
    """deep_ep.Buffer where GPUs cannot reach each other."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0, explicitly_destroy: bool = False) -> None:
        raise RuntimeError("Failed: CUDA error csrc/deep_ep.cpp:160 'peer access is not supported'")

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda *_: 128)

    get_combine_config = get_dispatch_config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"EPBuffer": object, "__version__": "2.5.0"}, "got deep_ep 2.5.0, which has no deep_ep.Buffer("),
        (
            {"Buffer": _Old},
            "deep_ep (no version), which has no deep_ep.Buffer(explicitly_destroy=...); need DeepEP",
        ),
        ({"Buffer": _NoPeers}, "cannot share memory between these GPUs: Failed: CUDA error"),
    ],
)
def test_packages_that_cannot_be_used(content: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("deep_ep")
    vars(package).update(content)
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_deep_ep(WIRE, **FITS)


def test_a_package_that_refuses_to_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep_ep.py").write_text("assert False, 'Invalid NCCL versions'\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be imported: AssertionError: Invalid NCCL versions"):
        open_deep_ep(WIRE, **FITS)


@pytest.mark.parametrize(
    ("x_TH", "top_k", "message"),
    [(torch.zeros(1, 256), 2, "x_TH: got torch.float32"), (torch.zeros(1, 256).bfloat16(), 33, "got K = 33; need at")],
)
def test_tokens_that_it_does_not_take(x_TH: torch.Tensor, top_k: int, message: str) -> None:
    ids_TK = torch.arange(top_k).view(1, -1)
    shard = ExpertShard(WIRE, 0, 64, DeepEP(None, torch.int64))
    with pytest.raises(ValueError, match=re.escape(message)):
        send_to_experts(x_TH, ids_TK, torch.ones(1, top_k), shard)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "expert_parallel_backend, expert_parallel_size: got deep_ep and 1"),
        ({"expert_parallel_size": 16}, "deep_ep works between 2, 4 or 8 processes of a machine"),
        ({"expert_parallel_size": 2, "bf16": False}, "expert_parallel_backend, bf16: got deep_ep, which adds up bf16"),
        ({"expert_parallel_size": 2, "bf16": False, "fp16": True}, "expert_parallel_backend, fp16: got deep_ep"),
    ],
)
def test_configurations_that_are_refused(
    keys: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FAKE))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write_config(tmp_path, expert_parallel_backend="deep_ep", **keys), ())


@pytest.mark.parametrize(
    ("num_gpus", "message"),
    [(2, "deep_ep works within one machine, and 4 does not divide its 2 processes"), (0, "got deep_ep; need gloo")],
)
def test_machines_where_it_does_not_run(
    num_gpus: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(processes, "join_mesh", lambda *_: pytest.fail("joined"))
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    config = write_config(tmp_path, expert_parallel_backend="deep_ep", expert_parallel_size=4)
    with pytest.raises(ConfigError, match=re.escape(message)):
        processes.join_processes(load_config(config, ()).config)
