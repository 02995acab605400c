"""Parts of the attention of a layer behind a streaming cache that go by the true positions of keys.

Legend: B batch, H query heads, G key heads, Q new tokens, K keys, S slots, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from ...attention.merge import merge
from ...attention.scoring import Scoring
from ...attention.slots.far_keys import FarKeys, far_attention
from ...attention.slots.new_tokens import Filled, own_places
from ...attention.slots.ring import held_places
from ..distances import distances_of
from .inner_padding import PaddingFirst
from .layer_call import LayerCall, Part, tokens_first
from .streaming_cache import StreamingCache
from .turning import FarSinks, first_keys, kept_with_sinks, near_pattern


def to_pinned(layer: LayerCall, cache: StreamingCache) -> Part | None:
    """Attention to tokens that a layer keeps for good, behind the keys that it gave; None if there are none."""
    assert layer.filled is not None
    far = cache.far_keys(layer.module.layer_idx, layer.filled)
    if far is None:
        return None
    own = _own_places(layer)
    return far_attention(layer.tensors[0], far, own, layer.pattern, layer.scoring, slopes=_slopes(layer))


def over_streaming_slots(layer: LayerCall, part: Part | None) -> Tensor:
    """Attention `[B, Q, H, D]` to the slots of a streaming cache as they lie, and to what `part` found."""
    filled, far = layer.filled, _far_sinks(layer)
    assert filled is not None
    if _slopes(layer) is not None:
        out, lse = _over_sloped_slots(layer, filled)
        return tokens_first(layer.with_rest(out, lse, part)[0])
    if far is not None:
        part = far.part(layer.tensors, filled.seen, filled.begins, None, layer.kwargs, layer.scoring)
        layer.pattern = far.near
    return layer.over_slots(filled, part)


def with_turned_sinks(
    layer: LayerCall, part: Part | None, real: Tensor | None, order: PaddingFirst | None
) -> Part | None:
    """Attention to first tokens as if they were near, which leaves the pattern of the others; else `part`.

    Args:
        part: what is there already.
        real: `[B, K]`, true on real keys, which lie in order; None if all are.
        order: the order of keys where padding is inside a row.

    Raises:
        NotImplementedError: first tokens cannot be seen as if they were in a cache.
    """
    far = _far_sinks(layer)
    if far is None:
        return part
    if order is not None or layer.opaque is not None or layer.scoring.bias is not None:
        raise NotImplementedError(
            "this text is longer than the model was trained on, and its first tokens cannot be seen as among the keys of a streaming cache "
            "with padding inside a row, a mask of pairs or a bias by distance; pad on the left, or set model.generation_config."
            "cache_implementation = None, which leaves all positions as they are"
        )
    begins, filled = _begins(real), layer.filled
    seen, of_rows = (layer.request.q_offset, begins) if filled is None else (filled.seen, filled.begins)
    layer.pattern = far.near
    return far.part(layer.tensors, seen, of_rows, begins, layer.kwargs, layer.scoring)


def with_sloped_sinks(layer: LayerCall, part: Part | None, real: Tensor | None) -> Part | None:
    """`part` with attention to first tokens by ALiBi, which are further away than among keys in order.

    The others are as far away as they seem: their pattern and their bias are left in `layer`.
    """
    slopes, filled = _slopes(layer), layer.filled
    if slopes is None or filled is None:
        return part
    kept, first = kept_with_sinks(layer.pattern), None
    if kept is not None:
        assert kept.left is not None
        query, key, value = layer.tensors
        far = FarKeys.of_first(*(first_keys(t, _begins(real), kept.sinks) for t in (key, value)))
        own = _own_places(layer)
        first = far_attention(query, far, own, layer.pattern, layer.scoring, least=kept.left, slopes=slopes)
        layer.pattern = near_pattern(layer.pattern, False)
    layer.scoring = _by_distance(layer.scoring, slopes, layer.new, layer.tensors[1].shape[2])
    if first is None or part is None:
        return first or part
    return merge([first, part])


def _own_places(layer: LayerCall) -> Tensor:
    """The positions of new tokens in their rows, `[B or 1, Q]`."""
    assert layer.filled is not None
    return own_places(layer.filled.seen, layer.filled.begins, layer.new)


def _far_sinks(layer: LayerCall) -> FarSinks | None:
    turned = layer.kwargs.get("turned_sinks")
    return None if turned is None else turned.of_layer(layer.module.layer_idx, layer.pattern)


def _slopes(layer: LayerCall) -> Tensor | None:
    return layer.kwargs.get("alibi_slopes")


def _begins(real: Tensor | None) -> Tensor | None:
    """`[B]`, where rows begin among the keys; None is 0."""
    return None if real is None else real.int().argmax(1)


def _over_sloped_slots(layer: LayerCall, filled: Filled) -> Part:
    """Attention to the slots of a cache as they lie, with scores that fall with the distance."""
    query, key, value = layer.tensors
    own = _own_places(layer)
    far = FarKeys(key, value, held_places(filled.ring, own, filled.oldest), filled.marks)
    return far_attention(query, far, own, layer.pattern, layer.scoring, slopes=_slopes(layer))


def _by_distance(scoring: Scoring, slopes: Tensor, new: int, keys: int) -> Scoring:
    """The scoring of keys that come in order, the `new` ones last: those behind the first tokens are as far away as they seem."""
    distances = distances_of(new, keys, keys - new, slopes.device)
    return Scoring(scoring.scale, scoring.softcap, slopes[:, None].float() * distances)
