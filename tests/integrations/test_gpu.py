"""The same model on a GPU: fp32 equal to the CPU's, bf16 no further from it than PEFT's own path is."""

import pytest
import torch
from peft import PeftModel

from tests.comparing import relative_error
from tests.tiny import VOCAB, tiny_model, with_adapter

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4}


def gradients(model: PeftModel, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (4, 33), generator=torch.Generator().manual_seed(7)).to(device)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"logits": output.logits.detach().float().cpu()}


@pytest.mark.parametrize("rank", [1, 12, 16])
def test_fp32_equals_the_cpu(rank: int) -> None:
    want = gradients(with_adapter(tiny_model("eager", **SIZES), rank=rank), "cpu")
    got = gradients(with_adapter(tiny_model("expertune", **SIZES), rank=rank).cuda(), "cuda")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) < 1e-4, name


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_as_close_to_fp32_as_pefts_fold(adapter_dtype: torch.dtype) -> None:
    want = gradients(with_adapter(tiny_model("eager", **SIZES)), "cpu")
    errors = {}
    for implementation in ("grouped_mm", "expertune"):
        model = with_adapter(tiny_model(implementation, **SIZES).to("cuda", torch.bfloat16))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        got = gradients(model, "cuda")
        assert got.keys() == want.keys()
        experts = [name for name in want if "experts" in name or name == "logits"]
        errors[implementation] = {name: relative_error(got[name], want[name]) for name in experts}
    ours, pefts = (torch.tensor(list(errors[name].values())) for name in ("expertune", "grouped_mm"))
    assert ours.median() <= 1.2 * pefts.median(), errors
    assert ours.max() <= 1.5 * pefts.max(), errors
