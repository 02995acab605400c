"""Layers as they stand in a model: some may have been dropped or repeated since it was made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

# what attention modules call the number by which they find their pattern
NUMBER_NAMES = ("layer_idx", "layer_id")


def layer_numbers(model: nn.Module, stacks: Iterable[str]) -> dict[str, list[int]]:
    """The numbers by which the layers find their pattern, in the order in which the model runs them.

    Args:
        stacks: the names of the model's stacks, as in `config.stacks`.
    """
    has_one = "" in stacks
    found: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            numbers = [_number(layer) for layer in module]
            stack = "" if has_one else "decoder" if "decoder" in name else "encoder"
            if None not in numbers:
                found.setdefault(stack, [number for number in numbers if number is not None])
    return found


def stacks_of(model: Any) -> list[str]:
    """The stacks of its configuration that a sparse model has layers of: an encoder by itself has no decoder's."""
    stacks = list(model.config.stacks)
    # attention knows which it belongs to
    sides = {
        bool(side)
        for module in model.modules()
        if hasattr(module, "layer_idx") and (side := vars(module).get("is_decoder")) is not None
    }
    named = {"decoder" if is_decoder else "encoder" for is_decoder in sides}
    return [stack for stack in stacks if stack in named] or stacks


def number_layers(model: nn.Module) -> None:
    """Number attention modules that Transformers leaves without a number, as it does in the encoders of mBART and Pegasus."""
    for module in model.modules():
        for index, layer in enumerate(module) if isinstance(module, nn.ModuleList) else ():
            for inner in layer.modules():
                if vars(inner).get("layer_idx", index) is None:
                    vars(inner)["layer_idx"] = index


def _number(layer: nn.Module) -> int | None:
    """The number that a layer's attention has."""
    numbers = (getattr(module, name, None) for module in layer.modules() for name in NUMBER_NAMES)
    return next((number for number in numbers if isinstance(number, int)), None)
