"""Counterparts: dense class -> sparse class, for the modules inside a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from .layers import number_layers


class FusedGELU(NewGELUActivation):
    """The same function in one kernel: written out, it keeps five tensors for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.gelu(input, approximate="tanh")


# filled by `register_family`
COUNTERPARTS: dict[type, type] = {NewGELUActivation: FusedGELU}


def adopt(model: nn.Module) -> None:
    """Give the models inside `model` (the encoder inside a head) their sparse class too, and layers their numbers."""
    number_layers(model)
    for module in model.modules():
        if type(module) in COUNTERPARTS:
            module.__class__ = COUNTERPARTS[type(module)]
    for module in model.modules():
        own = getattr(module, "number_layers", None)
        if own is not None:
            own()
