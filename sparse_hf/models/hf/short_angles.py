"""Rotary angles that change as a text gets longer, held at those of short texts behind a cache with positions of its own.

With `positions="cache"` no key is further away than the cache is long. Where that is within the length from which on the angles of
"dynamic" or "longrope" change, the text that a layer sees is a short one however long the stream is, and its angles are those of
short texts at every token. Transformers goes by the position of the last token instead, which a stream leaves far behind.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .mask_request import said_of
from .positions import CHANGING, changing_angles

# what a rotary module of Transformers keeps of short texts
ORIGINAL = "original_inv_freq"


def hold_angles(model: nn.Module, config: Any) -> None:
    """Have a model's rotary modules give the angles of short texts in passes that ask for them; others are left as they are."""
    if changing_angles(config) is None:
        return
    for module in model.modules():
        is_rotary = any(name.endswith(ORIGINAL) for name in vars(module) | module._buffers)
        if is_rotary and _short not in module._forward_hooks.values():
            module.register_forward_hook(_short, with_kwargs=True)


def holds_angles(model: nn.Module) -> bool:
    """Does a model do as `hold_angles` has it?"""
    return any(_short in module._forward_hooks.values() for module in model.modules())


class _AsShort:
    """A rotary module as its `forward` finds it in a short text."""

    def __init__(self, module: nn.Module, prefix: str):
        self.module = module
        # some versions of Transformers write other angles into what they find
        setattr(self, f"{prefix}inv_freq", getattr(module, f"{prefix}{ORIGINAL}").clone())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _short(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """A hook: the cosines and sines of short texts, where a pass asks for them; None leaves them as they are."""
    if torch.compiler.is_compiling():
        return None
    turned = said_of(module.config).get("turned_sinks")
    if turned is None or not turned.holds_angles:
        return None
    layer_type = args[2] if len(args) > 2 else kwargs.get("layer_type")
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if kind not in CHANGING:
        return None
    # what Transformers has wrapped with the change of angles, and some versions with more
    forward = inspect.unwrap(type(module).forward)
    return forward(_AsShort(module, "" if layer_type is None else f"{layer_type}_"), *args, **kwargs)


# an error in the middle of a graph would have torch run this part without one, and the rest in graphs that ask no pass
@torch.compiler.disable()
def refuse_graphs_of_short_texts() -> None:
    """Raise NotImplementedError."""
    raise NotImplementedError(
        "positions='cache' holds the angles of this model at those of short texts, which compiled code does not; run without torch.compile"
    )
