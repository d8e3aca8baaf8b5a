"""Models of many kinds spread over processes: their own losses and gradients of every adapter, as in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import expertune
from expertune.distributed.gradients import synchronise_gradients
from expertune.distributed.mesh import join_mesh
from expertune.distributed.parameters import whole_tensor
from expertune.distributed.sizes import ParallelSizes
from expertune.integrations.sharded_model import build_skeleton, spread_model
from tests.distributed.processes import Crew
from tests.integrations.architectures import VOCAB, architectures, build
from tests.tiny import randomize_lora_b

ROWS, LENGTH = 4, 12
KINDS = {
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {},  # biases, stored transposed, a gate of its own
    "glm4_moe": {},  # shared experts, a dense first layer
    "qwen3_next": {},  # linear attention
    "nemotron_h": {},  # no gate, latent experts
    "deepseek_v3": {"router": True},  # adapters on the router
}


def with_adapter(model: Any, *, router: bool = False) -> PeftModel:
    parameters = expertune.get_target_parameters(model, router=router)
    modules = [name for name in expertune.get_attention_modules(model) if name.endswith("_proj")]
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=modules or None, target_parameters=parameters))
    randomize_lora_b(adapted)
    return adapted


def rows() -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The mean over all tokens of ROWS rows, as far as these rows contribute to it."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return nats / (ROWS * (LENGTH - 1))


def in_processes(folder: str, sizes: ParallelSizes, options: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    mesh = join_mesh(sizes, "cpu", timeout_s=30)
    settings = {"experts_implementation": "expertune"}
    model = with_adapter(build_skeleton(folder, torch.float32, **settings), **options)
    parameters = spread_model(model, folder, torch.float32, mesh, torch.device("cpu"), **settings)
    own = rows().chunk(sizes.world)[mesh.rank]
    loss = loss_of(model, own) * sizes.world
    loss.backward()
    synchronise_gradients(parameters, mesh)
    grads = {}
    for sharded in parameters:
        assert sharded.parameter.grad is not None
        grads[sharded.name] = whole_tensor(sharded.parameter.grad, sharded, mesh).clone()
    return float(mesh.wire(None, "the test").sum(loss.detach() / sizes.world, "loss")), grads


def own_share(folder: str, sizes: ParallelSizes) -> dict[str, int]:
    """Values of the base model that this process holds: of experts and of the rest."""
    mesh = join_mesh(sizes, "cpu", timeout_s=30)
    settings = {"experts_implementation": "expertune"}
    model = with_adapter(build_skeleton(folder, torch.float32, **settings))
    assert all(p.untyped_storage().nbytes() <= 4 for p in model.parameters() if not p.requires_grad), "it takes memory"
    spread_model(model, folder, torch.float32, mesh, torch.device("cpu"), **settings)
    held = {"experts": 0, "rest": 0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            held["experts" if ".experts." in name else "rest"] += local.numel()
    return held


def test_each_process_holds_its_share(tmp_path: Path, two: Crew, four: Crew) -> None:
    model = build(next(each for each in architectures() if each.folder == "qwen3_moe"), "eager")
    model.save_pretrained(tmp_path)
    whole = {"experts": 0, "rest": 0}
    for name, parameter in model.named_parameters():
        whole["experts" if ".experts." in name else "rest"] += parameter.numel()
    for held in two.run(own_share, str(tmp_path), ParallelSizes(expert=2)):
        assert held == {"experts": whole["experts"] // 2, "rest": whole["rest"]}
    for held in four.run(own_share, str(tmp_path), ParallelSizes(expert=2, shard=2)):
        assert held == {"experts": whole["experts"] // 4, "rest": whole["rest"] // 2}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(kind, ParallelSizes(expert=2)) for kind in KINDS]
    + [(kind, ParallelSizes(expert=2, shard=2)) for kind in ("gpt_oss", "qwen3_next", "deepseek_v3")],
    ids=lambda value: "x".join(map(str, vars(value).values())) if isinstance(value, ParallelSizes) else value,
)
def test_loss_and_gradients(kind: str, sizes: ParallelSizes, tmp_path: Path, two: Crew, four: Crew) -> None:
    build(next(each for each in architectures() if each.folder == kind), "eager").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, experts_implementation="expertune"
    ).train()
    model = with_adapter(base, **KINDS[kind])
    loss = loss_of(model, rows())
    loss.backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    results = (two if sizes.world == 2 else four).run(in_processes, str(tmp_path), sizes, KINDS[kind])
    for got_loss, got in results:
        assert got_loss == pytest.approx(float(loss.detach()), rel=1e-6)
        assert got.keys() == want.keys()
        for name, grad in want.items():
            assert grad is not None
            assert float(grad.norm()) > 0, f"{name} has no gradient, so equality says nothing"
            error = float((got[name] - grad).norm() / grad.norm())
            assert error < 1e-4, f"{name}: {error:.1e}"
