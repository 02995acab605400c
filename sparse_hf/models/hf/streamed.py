"""Parts of the attention of a layer behind a streaming cache that go by the true positions of keys.

Legend: B batch, H query heads, G key heads, Q new tokens, K keys, S slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.merge import merge
from ...attention.scoring import Scoring
from ...attention.slots.far_keys import FarKeys, far_attention
from ...attention.slots.new_tokens import Filled
from ...attention.slots.ring import positions_in
from .streaming_cache import StreamingCache
from .turning import first_keys, kept_with_sinks, near_pattern

Part = tuple[Tensor, Tensor]


def own_places(filled: Filled, new: int) -> Tensor:
    """The positions of new tokens in their rows, `[B or 1, Q]`."""
    own = (filled.seen + torch.arange(new, device=filled.seen.device))[None]
    return own if filled.begins is None else own - filled.begins.to(own.device)[:, None]


def to_pinned(
    cache: StreamingCache, layer: int, query: Tensor, pattern: str, filled: Filled, scoring: Scoring, slopes: Tensor | None
) -> Part | None:  # fmt: skip
    """Attention to tokens that a layer keeps for good, behind the keys that it gave; None if there are none."""
    far = cache.far_keys(layer, query.shape[2])
    if far is None:
        return None
    return far_attention(query, far, own_places(filled, query.shape[2]), pattern, scoring, slopes=slopes)


def over_sloped_slots(
    tensors: tuple[Tensor, Tensor, Tensor], filled: Filled, pattern: str, scoring: Scoring, slopes: Tensor, part: Part | None
) -> Part:  # fmt: skip
    """Attention to the slots of a cache as they lie, with scores that fall with the distance, and to what `part` found."""
    query, key, value = tensors
    own = own_places(filled, query.shape[2])
    places = positions_in(filled.ring, own[:, -1] + 1)
    if filled.oldest is not None:
        places = places.where((places < filled.ring.first) | (places >= filled.oldest[:, None]), -1)
    found = far_attention(query, FarKeys(key, value, places, filled.marks), own, pattern, scoring, slopes=slopes)
    return found if part is None else merge([found, part])


def sloped(scoring: Scoring, slopes: Tensor, keys: int) -> Scoring:
    """The scoring of keys that come in order, the queries last: those behind the first tokens are as far away as they seem."""
    bias = slopes[:, None].float() * torch.arange(1 - keys, keys, device=slopes.device)
    return Scoring(scoring.scale, scoring.softcap, bias)


def to_first(
    tensors: tuple[Tensor, Tensor, Tensor], filled: Filled, begins: Tensor | None, pattern: str, scoring: Scoring,
    slopes: Tensor,
) -> tuple[Part | None, str]:  # fmt: skip
    """Attention to first tokens that are further away than among keys in order, and the pattern of the others.

    Args:
        tensors: q, k and v, keys in order.
        begins: `[B]`, where rows begin among the keys; None is 0.
    """
    kept = kept_with_sinks(pattern)
    if kept is None:
        return None, pattern
    query, key, value = tensors
    far = FarKeys.of_first(*(first_keys(t, begins, kept.sinks) for t in (key, value)))
    own = own_places(filled, query.shape[2])
    assert kept.left is not None
    part = far_attention(query, far, own, pattern, scoring, least=kept.left, slopes=slopes)
    return part, near_pattern(pattern, False)
