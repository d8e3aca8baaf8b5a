"""A model's loss and gradients on the device at hand, and what makes two of them equal."""

import torch
from torch import Tensor, nn

from tests.comparing import relative_error
from tests.tiny import VOCAB

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loss_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.to(DEVICE)
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach().cpu(), **grads}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert any("experts" in key for key in want)
    for key, value in want.items():
        assert relative_error(got[key], value) < (5e-6 if key == "loss" else 1e-4), key
