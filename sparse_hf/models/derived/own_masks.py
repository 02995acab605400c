"""The windows and chunks that a family has of its own: found by watching which masks its dense class asks for.

What a family calls the size, and on which side of a token it counts, is read off the mask functions of Transformers that
reach the attention of each layer of a tiny copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ...pattern import Chunk, Pattern, Window
from ..hf.mask_functions import leaves, name_of
from .tiny_model import FAILURES

PROBE = "sparse_probe"
Side = Literal["past", "both", "chunk"]
# Transformers' mask functions -> which side of a token they leave, and what they call the size
OVERLAYS: dict[str, tuple[Side, str]] = {
    "sliding_window_overlay.<locals>.inner_mask": ("past", "sliding_window"),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": ("both", "sliding_window"),
    "chunked_overlay.<locals>.inner_mask": ("chunk", "chunk_size"),
}
# but for numbers of experts and chunks of layers of another kind, beside which a window may go unset
FIELDS = re.compile(r"(?!.*(expert|mamba|ssm|layers|feed_forward)|chunk_size$).*(window|chunk|local).*")


@dataclass(frozen=True)
class OwnMask:
    """A mask of a family's own: `field` of the configuration plus `more` tokens on one side, on both, or in a chunk."""

    side: Side
    field: str
    more: int = 0

    def pattern(self, config: Any) -> Pattern | None:
        """The pairs that it leaves; None where the configuration sets no size."""
        size = getattr(config, self.field, None)
        if size is None:
            return None
        size += self.more
        if self.side == "chunk":
            return Chunk(size)
        # the overlay of the past counts the query itself
        return Window(size - 1, 0) if self.side == "past" else Window(size, size)


# kind of a layer ("" where all are alike) -> its mask, None where the dense class asks for none
OwnMasks = dict[str, OwnMask | None]


def find_own_masks(model: PreTrainedModel, inputs: dict[str, Any]) -> OwnMasks:
    """The masks of each kind of layers, of a tiny dense model whose windows are shorter than its text.

    A kind is absent where the configuration names no size, so that nobody knows what it would do with one.
    """
    config: Any = model.config
    if not _sizes(config):
        return {}
    asked: list[tuple[nn.Module, Callable | None]] = []
    token = _ASKED.set(asked)
    before = [(vars(c), vars(c).get("_attn_implementation_internal")) for c in _configs(model)]
    for values, _ in before:
        values["_attn_implementation_internal"] = PROBE
    try:
        with torch.no_grad():
            model(**inputs)
    except FAILURES:
        return {}
    finally:
        _ASKED.reset(token)
        for values, own in before:
            values["_attn_implementation_internal"] = own
    return {_kind(config, module): _own_mask(config, function) for module, function in asked}


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    found = (vars(module).get("config") for module in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


def kind_of(config: Any, layer: int) -> str:
    """The kind of a layer, "" where all are alike."""
    kinds = getattr(config, "layer_types", None)
    return kinds[layer] if isinstance(kinds, list) and layer < len(kinds) else ""


def _kind(config: Any, module: nn.Module) -> str:
    layer = vars(module).get("layer_idx")
    return kind_of(config, layer) if isinstance(layer, int) else ""


def _sizes(config: Any) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(config).items()
        if FIELDS.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool) and value > 1
    }


def _own_mask(config: Any, function: Callable | None) -> OwnMask | None:
    for leaf in () if function is None else leaves(function):
        if name_of(leaf) in OVERLAYS:
            side, called = OVERLAYS[name_of(leaf)]
            cells = dict(zip(leaf.__code__.co_freevars, leaf.__closure__ or (), strict=True))
            size = cells[called].cell_contents
            near = [(abs(size - v), name) for name, v in _sizes(config).items() if abs(size - v) <= 1]
            if near:
                field = min(near)[1]
                return OwnMask(side, field, size - _sizes(config)[field])
    return None


_ASKED: ContextVar[list[tuple[nn.Module, Callable | None]] | None] = ContextVar("asked", default=None)


class _Asked:
    """What stands for a mask: the function that it would be made of."""

    def __init__(self, function: Callable | None):
        self.function = function


def _mask(*_: Any, mask_function: Callable | None = None, **__: Any) -> _Asked:
    return _Asked(mask_function)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **_: Any):
    asked = _ASKED.get()
    if asked is not None:
        asked.append((module, attention_mask.function if isinstance(attention_mask, _Asked) else None))
    rows, heads, queries = query.shape[:3]
    return value.new_zeros(rows, queries, heads, value.shape[-1]), None


AttentionInterface.register(PROBE, _attention)
AttentionMaskInterface.register(PROBE, _mask)
