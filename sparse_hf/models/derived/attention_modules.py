"""The attention modules of a model that call Transformers' attention interface."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..hf.counterparts import own_modules

# what attention to another text or image is called in families whose class of attention is one for both
CROSSES = re.compile(
    r"(^|\.)(encoder_attn|encoder_decoder_attention|cross_?attn|cross_?attention)(\.|$)", re.IGNORECASE
)


@cache
def calls_interface(kind: type[nn.Module]) -> bool:
    """Does the `forward` of a class of modules, or the one that it goes on to, ask Transformers' attention interface for its function?"""
    for base in kind.__mro__:
        forward = vars(base).get("forward")
        code = None if forward is None else getattr(inspect.unwrap(forward), "__code__", None)
        if code is None:
            continue
        if "get_interface" in code.co_names or "super" not in code.co_names:
            return "get_interface" in code.co_names
    return False


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a sparse model that call the attention interface, by name."""
    return ((name, module) for name, module in own_modules(model) if calls_interface(type(module)))


def number_attention(model: PreTrainedModel) -> None:
    """Tell attention modules the number of their layer, their configuration and their stack, where they do not know them."""
    stacks = model.config.stacks
    for name, module in attention_modules(model):
        own: dict[str, Any] = vars(module)
        if not isinstance(own.get("layer_idx"), int):
            own["layer_idx"] = _number(name, module, model, set(stacks.values()))
        if not isinstance(own.get("config"), type(model.config)):
            own["config"] = model.config
        if CROSSES.search(name):
            own["is_cross_attention"] = True
        if "" not in stacks and "is_decoder" not in own:
            own["is_decoder"] = "decoder" in name


def _number(name: str, attention: nn.Module, model: nn.Module, counts: set[int]) -> int:
    """The place of an attention module in the list of layers that it is in; 0 where layers are shared."""
    found = getattr(attention, "layer_id", None)
    if isinstance(found, int):
        return found
    words = name.split(".")
    lists = [i for i in range(len(words)) if isinstance(model.get_submodule(".".join(words[:i])), nn.ModuleList)]
    as_long = [i for i in lists if len(model.get_submodule(".".join(words[:i]))) in counts]  # pyright: ignore[reportArgumentType]
    place = next(iter(as_long or lists[-1:]), None)
    return 0 if place is None else int(words[place])
