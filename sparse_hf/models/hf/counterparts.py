"""Counterparts: dense class -> sparse class, for the modules inside a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from .config import SparseConfigMixin
from .layers import number_layers


class FusedGELU(NewGELUActivation):
    """The same function in one kernel: written out, it keeps five tensors for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.gelu(input, approximate="tanh")


# filled by `register_family`
COUNTERPARTS: dict[type, type] = {NewGELUActivation: FusedGELU}


def adopt(model: nn.Module) -> None:
    """Give the models inside `model` (the encoder inside a head) their sparse class too, and layers their numbers.

    A model inside that has a dense configuration of its own stays what it is, as the decoder of sounds in one of text does.
    """
    number_layers(model)
    for _, module in own_modules(model):
        if type(module) in COUNTERPARTS:
            module.__class__ = COUNTERPARTS[type(module)]
    for module in model.modules():
        own = getattr(module, "number_layers", None)
        if own is not None:
            own()


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a sparse model by name, without those of models inside that have a dense configuration of their own."""
    dense: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module.config, SparseConfigMixin):
            dense += (f"{name}.",)
        elif not name.startswith(dense):
            yield name, module
