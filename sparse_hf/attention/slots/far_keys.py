"""Attention to a few keys of any positions, which are kept far behind a window: first tokens, marked ones, summaries.

What it gives is merged with the attention to near keys, so that no pair may be in both.

Legend: B batch, H query heads, G key heads, Q queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...pattern.base import Marks, as_pattern
from ..scoring import Scoring
from ..strides import folded
from .new_tokens import under
from .pairs import pairs_by_head

# scores that are computed at once
SCORES = 1 << 24


class FarKeys(NamedTuple):
    """Keys and values `[B, G, S, D]`, and of which positions they are.

    Args:
        places: `[B or 1, S]`, the positions of keys in their rows; negative where there is none.
        marked: `[B, S]` bool, the tokens that `marked()` speaks of; None where nothing is.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    marked: Tensor | None = None

    @classmethod
    def of_first(cls, keys: Tensor, values: Tensor) -> FarKeys:
        """The first tokens of each row."""
        return cls(keys, values, torch.arange(keys.shape[2], device=keys.device)[None])


def far_attention(
    q: Tensor, far: FarKeys, own: Tensor, pattern: str, scoring: Scoring, least: int = -1, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]` and lse `[B, H, Q]` of a pattern's pairs; what sees none gives 0 and an lse of -inf.

    Args:
        q: `[B, H, Q, D]`.
        far: the keys.
        own: `[B or 1, Q]`, the positions of queries in their rows.
        pattern: the text of a causal pattern.
        scoring: scale and soft cap.
        least: keys that are no more than that before a query are not seen.
        slopes: `[H]`, by which scores fall with the distance (ALiBi).
    """
    if torch.compiler.is_compiling():
        return _operator(q, *far, own, slopes, pattern, least, scoring.scale, scoring.softcap)
    return _computed(q, far, own, slopes, pattern, least, scoring)


def _computed(
    q: Tensor, far: FarKeys, own: Tensor, slopes: Tensor | None, pattern: str, least: int, scoring: Scoring
) -> tuple[Tensor, Tensor]:  # fmt: skip
    at_once = max(1, SCORES // (q.shape[0] * q.shape[1] * max(1, far.keys.shape[2])))
    if q.shape[2] > at_once:
        pieces = zip(q.split(at_once, 2), own.split(at_once, 1), strict=True)
        found = [_computed(one, far, places, slopes, pattern, least, scoring) for one, places in pieces]
        return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)
    work, mask = torch.promote_types(q.dtype, torch.float32), _mask(far, own, pattern, least)
    blind = ~mask.any(-1, keepdim=True)
    opened = folded((mask | blind).expand(-1, q.shape[1], -1, -1), far.keys.shape[1])
    bias = None
    if slopes is not None:
        apart = (far.places[:, None, :] - own[:, :, None]).to(work)[:, None]  # [B or 1, 1, Q, S]
        bias = slopes.to(work)[:, None, None] * apart
    return under((q, far.keys, far.values), opened, blind, bias, scoring, True, work)


def _mask(far: FarKeys, own: Tensor, pattern: str, least: int) -> Tensor:
    """`[B or 1, H or 1, Q, S]` bool."""
    form, places = as_pattern(pattern), far.places[:, None, :]
    there = (places >= 0) & (own[:, :, None] - places > least)
    # marked queries that see everything see no far keys: nothing was dropped by then
    marked = None if far.marked is None else far.marked[:, None, :]
    about = Marks(None if marked is None else torch.zeros_like(marked), marked)
    return pairs_by_head(form, own.clamp(min=0)[:, :, None], places.clamp(min=0), about, there)


@torch.library.custom_op("sparse_hf::far_keys", mutates_args=())
def _operator(
    q: Tensor, keys: Tensor, values: Tensor, places: Tensor, marked: Tensor | None, own: Tensor, slopes: Tensor | None,
    pattern: str, least: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    far = FarKeys(keys, values, places, marked)
    out, lse = _computed(q, far, own, slopes, pattern, least, Scoring(scale, softcap))
    return out.contiguous(), lse.contiguous()


@_operator.register_fake
def _fake(q, keys, values, *rest):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], values.shape[-1])), q.new_empty(q.shape[:3], dtype=dtype)
