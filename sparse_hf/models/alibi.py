"""ALiBi (arXiv:2108.12409): a bias that falls with the distance, a slope for each head.

Legend: B batch, H heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .distances import distances_of
from .hf.cache import of_streaming
from .hf.mask_request import MaskRequest
from .hf.positions import Positions

ALIBI = Positions("alibi")


def alibi_arguments(slopes: Tensor, attention_mask: Any, query: Tensor, key: Tensor, cache: Any) -> dict[str, Any]:
    """The arguments of attention that say of ALiBi: a bias by distance, or slopes where a cache has dropped keys.

    Args:
        slopes, attention_mask, query, key: see `by_distance`.
        cache: of the layer, None without one.
    """
    streaming = of_streaming(cache)
    if streaming:
        return {**streaming, "alibi_slopes": slopes}
    return {"position_bias": by_distance(slopes, attention_mask, query, key)}


def by_distance(slopes: Tensor, attention_mask: Any, query: Tensor, key: Tensor) -> Tensor:
    """The bias `[H, distances]` of the distances (key - query) of `distances_of`.

    Dense classes add the same number to all keys of a query, which a softmax does not see.

    Args:
        slopes: `[H]`.
        attention_mask: as a layer gets it.
        query: `[B, H, Q, D]`.
        key: `[B, H, K, D]`.
    """
    past = MaskRequest.of(attention_mask, query, key).q_offset
    return slopes[:, None].float() * distances_of(query.shape[2], key.shape[2], past, key.device)
