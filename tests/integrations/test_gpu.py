"""The same model on a GPU: fp32 equal to the CPU's, bf16 no further from the truth than PEFT's own path is."""

from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.comparing import relative_error
from tests.tiny import VOCAB, tiny_model, with_adapter

pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4}


def whole_model_gradients(model: PeftModel, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (4, 33), generator=torch.Generator().manual_seed(7)).to(device)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"logits": output.logits.detach().cpu()}


@pytest.mark.parametrize("rank", [1, 12, 16])
def test_fp32_equals_the_cpu(rank: int) -> None:
    want = whole_model_gradients(with_adapter(tiny_model("eager", **SIZES), rank=rank), "cpu")
    got = whole_model_gradients(with_adapter(tiny_model("expertune", **SIZES), rank=rank).cuda(), "cuda")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) < 1e-4, name


def experts_gradients(implementation: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One layer's adapted experts on fixed routing: in a whole model, rounding would send tokens elsewhere."""
    model = with_adapter(tiny_model(implementation, **SIZES))
    experts = model.get_base_model().model.layers[0].mlp.experts
    for name, parameter in experts.named_parameters():  # round first, so that the truth has the same weights
        to = adapter_dtype if ".lora_" in name else torch.bfloat16
        parameter.data = parameter.data.to(torch.bfloat16).to(to if dtype == torch.bfloat16 else torch.float32)
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(200, SIZES["hidden_size"], generator=generator).bfloat16()
    ids_TK = torch.rand(200, SIZES["num_experts"], generator=generator).topk(SIZES["num_experts_per_tok"]).indices
    weights_TK = torch.rand(ids_TK.shape, generator=generator).bfloat16()
    dy_TH = torch.randn(x_TH.shape, generator=generator).bfloat16()
    experts.cuda()
    x_TH, weights_TK = (t.to("cuda", dtype).requires_grad_() for t in (x_TH, weights_TK))
    y_TH = experts(x_TH, ids_TK.cuda(), weights_TK)
    y_TH.backward(dy_TH.to("cuda", dtype))
    grads = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    return grads | {"y": y_TH.detach(), "dx": x_TH.grad, "dweights": weights_TK.grad}


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_as_close_to_fp32_as_pefts_fold(adapter_dtype: torch.dtype) -> None:
    truth = experts_gradients("eager", torch.float32, torch.float32)
    pefts = experts_gradients("grouped_mm", torch.bfloat16, adapter_dtype)
    ours = experts_gradients("expertune", torch.bfloat16, adapter_dtype)
    assert ours.keys() == pefts.keys() == truth.keys()
    errors = {
        name: (relative_error(ours[name], truth[name]), relative_error(pefts[name], truth[name])) for name in truth
    }
    print(errors)
    for name, (error_ours, error_pefts) in errors.items():
        assert error_ours <= max(1.5 * error_pefts, 6e-3), (name, errors)
