"""Layers of a pass that ask what one before them has asked: they go straight to attention, on tensors of their own.

To find what a layer sees takes its host as long as to launch it, and most layers of a model ask the same. What was found is
remembered on the mask request, which dies with the pass.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention import attention, route
from ...attention.backend import AttentionCall
from ...attention.dropout import Dropout
from ...attention.operator import has_no_content
from ...attention.scoring import Scoring
from ...attention.slots.new_tokens import Filled, slots_attention
from ...pattern import Pattern
from ...pattern.base import as_pattern
from ...plan import BatchInfo
from .cache import LAYERS_SEE
from .chosen_keys import LATENTS, LEARNING
from .indexer import INDEXED
from .layer_call import LayerCall, tokens_first
from .mask_request import MaskRequest
from .streaming_cache import StreamingCache

# attributes of an attention module that say how it reads its mask
READ_OF_MODULE = ("is_decoder", "is_causal", "is_cross_attention", "has_relative_attention_bias")
# arguments that mean something else in each layer
OF_ONE_LAYER = (LAYERS_SEE, INDEXED, "turned_sinks", "computed_by", "position_bias", "alibi_slopes")


@dataclass(frozen=True, eq=False)
class AnsweredLayer:
    """The call of a layer without its tensors and its dropout.

    `told` holds the arguments that layers were told apart by, so that no others get their numbers; `first` is the attention module
    that was answered, and `is_whole` whether its pairs are of positions in a whole text, and its gradients a backend's own.
    """

    pattern: Pattern
    q_offset: int
    scoring: Scoring
    batch: BatchInfo
    backend: str
    told: Mapping[str, Any]
    first: Any
    is_whole: bool

    def joins(self, module: Any) -> bool:
        """May a module compute its projections with its attention? Never the first, which gradient checkpointing computes again and
        whose steps must be the same then."""
        return self.is_whole and module is not self.first

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Attention `[B, Q, H, D]`."""
        drawn = Dropout.draw(dropout)
        call = AttentionCall(
            query, key, value, self.pattern, self.q_offset, self.scoring, drawn, self.batch, wants_lse=False
        )
        return tokens_first(attention(call, self.backend)[0])


@dataclass(frozen=True, eq=False)
class AnsweredSlots:
    """The call of a layer over the slots of a streaming cache as they lie, without its tensors; `told` as of `AnsweredLayer`."""

    pattern: str
    scoring: Scoring
    filled: Filled
    told: Mapping[str, Any]

    def joins(self, module: Any) -> bool:
        """Never: the cache has the keys of a layer by now."""
        return False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Attention `[B, Q, H, D]`, which drops no weights: nobody trains behind such a cache."""
        return tokens_first(slots_attention(query, key, value, self.filled, self.pattern, self.scoring)[0])


def asked_alike(
    module: Any, sizes: tuple[torch.Size, torch.Size, torch.device], request: Any, how: tuple, told: Mapping[str, Any]
) -> tuple | None:  # fmt: skip
    """All that tells layers of a pass apart; None where nobody may go by what another was answered.

    Args:
        module: the attention module.
        sizes: of its queries, `[B, H, Q, D]`, and keys, `[B, G, K, D]`, and their device.
        request: what it got for its mask.
        how: other arguments of the attention function that every layer has.
        told: those that a model adds.
    """
    if type(request) is not MaskRequest or torch.compiler.is_compiling():
        return None
    if LEARNING.get() is not None or LATENTS.get() is not None:
        return None
    own, config = module.__dict__, module.config
    stack, layer = request.stack(module), own.get("layer_idx") or 0
    if layer >= len(stack.patterns) or stack.heads != sizes[0][1]:
        return None
    of_module = type(module), id(config), stack.patterns[layer], *[own.get(name) for name in READ_OF_MODULE]
    return *of_module, *how, *sizes, *told, *map(id, told.values())


def remember_answer(layer: LayerCall, call: AttentionCall, alike: tuple) -> None:
    """Have later layers of the pass find a call that was answered, if it has nothing of its own beside tensors and dropout."""
    request, told = layer.request, layer.kwargs
    if not _is_bare(layer) or layer.filled is not None or not isinstance(request.q_offset, int):
        return
    pattern, is_whole = as_pattern(layer.pattern), False
    if not has_no_content(call.q) and call.q.shape[2] == call.k.shape[2] and not pattern.uses_content:
        # as it was asked, to find what was decided then
        call.chosen_plan = None
        is_whole = not route(call, layer.backend).uses_autograd
    request.memo[alike] = AnsweredLayer(
        pattern, request.q_offset, layer.scoring, call.batch, layer.backend, told, layer.module, is_whole
    )  # fmt: skip


def remember_slots(layer: LayerCall, cache: StreamingCache, alike: tuple) -> None:
    """The same of a call over the slots of a cache, where none of its layers holds tokens of its own choice."""
    filled, own = layer.filled, layer.stack.patterns[layer.module.layer_idx]
    assert filled is not None
    if not _is_bare(layer) or filled.marks is not None or filled.oldest is not None:
        return
    kept = {kept for kept, pattern in zip(cache.patterns, layer.stack.patterns, strict=False) if pattern == own}
    if kept == {layer.pattern}:
        layer.request.memo[alike] = AnsweredSlots(layer.pattern, layer.scoring, filled, layer.kwargs)


def _is_bare(layer: LayerCall) -> bool:
    has_own = any(layer.kwargs.get(name) is not None for name in OF_ONE_LAYER)
    return layer.scoring.bias is None and layer.sinks is None and layer.opaque is None and not has_own
