"""Tiles of `blockwise` by PyTorch's own attention kernel for CPUs, which keeps no scores in memory: twice as fast forward.

Its backward kernel is slower than products of whole tiles, many times so in 16 bits, so that gradients are left to `blockwise`.

Legend: G key heads, R query heads per key head, m queries and n keys of a tile, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...dropout import Dropout
from ...merge import merge
from ...scoring import Scoring
from .tiles import AnyTile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_run(q: Tensor, v: Tensor, scoring: Scoring, dropout: Dropout) -> bool:
    """Can the kernel compute this?"""
    plain = not dropout and scoring.is_plain
    return plain and q.device.type == "cpu" and q.dtype in DTYPES and q.shape[-1] == v.shape[-1]


def attend_rows(
    query: Tensor, tiles: Iterable[AnyTile], sources: Sequence[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor] | None:
    """Out `[G, R, m, D]` and lse `[G, R, m]` of a query block, or None if it has no tile.

    Args:
        query: `[G, R, m, D]`.
        sources: keys and values `[G, K, D]` of each piece that tiles speak of.
    """
    found: tuple[Tensor, Tensor] | None = None
    for tile in tiles:
        tile_q, (keys, values) = query[..., tile.queries, :], sources[tile.piece]
        of_tile = _attend(tile_q, tile.of_keys(keys), tile.of_keys(values), tile, scale)
        if found is None and tile_q.shape == query.shape:
            found = of_tile
            continue
        out, lse = found or (
            torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
        )  # fmt: skip
        # what is merged again and again is not rounded in between
        found = out.float(), lse
        of_rows = found[0][..., tile.queries, :], lse[..., tile.queries]
        for into, merged in zip(of_rows, merge([of_rows, of_tile]), strict=True):
            into.copy_(merged)
    return found


def _attend(query: Tensor, keys: Tensor, values: Tensor, tile: AnyTile, scale: float) -> tuple[Tensor, Tensor]:
    mask, sees = tile.additive(query)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.flatten(1, 2)[None], keys[None], values[None], attn_mask=mask, scale=scale
    )
    out, lse = out[0].view(query.shape), lse[0].view(query.shape[:-1])
    # of a query that sees nothing it says 0
    return out, lse if sees is None else lse.masked_fill(~sees, -torch.inf)
