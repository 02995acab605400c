"""The best keys of each query by the kernels of `selection_kernels.py`, a piece of queries at a time.

Legend: B batch, C heads of the choice, I heads of an indexer, Q queries, K keys, D head dim, N chosen keys of a query; a piece has m
queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.triton import walk
from ..launch import launch, power_of_two, strides_of
from ..strides import readable
from .scores import DotScores, IndexerScores

if TYPE_CHECKING:
    from .best_keys import Limits, Scorer

# scores that exist at once, in float32, whatever makes them
MAX_SCORES = 1 << 27
# keys that a program compares at once, and sides of a tile of scores: the fastest on an H200
BLOCK, TILE_QUERIES, TILE_KEYS = 4096, 64, 128
# sides of a tile of products, and dimensions of them at a time
PRODUCT_QUERIES, PRODUCT_KEYS, PRODUCT_DIM = 64, 64, 32
# so many keys are compared at once with others of as many queries
FEW_KEYS, FEW_QUERIES = 2048, 4
# warps of a program
WARPS_OF_SCORES, WARPS_OF_CHOICE, WARPS_OF_FEW = 4, 8, 4
# head dims of an indexer
MAX_HEAD_DIM = 256


def is_able(device: torch.device) -> bool:
    """Can the kernels choose on a device?"""
    return device.type in walk.DEVICES and walk.IS_INSTALLED


def fused(scorer: Scorer) -> IndexerScores | None:
    """A scorer whose scores a kernel makes, without those of its heads; else None."""
    if not isinstance(scorer, IndexerScores) or scorer.scale <= 0 or scorer.key.shape[-1] > MAX_HEAD_DIM:
        return None
    return scorer if scorer.query.dtype == scorer.key.dtype and scorer.query.dtype in walk.DTYPES else None


def _has_kernel(scorer: Scorer) -> bool:
    """Does a kernel make the scores, and nothing beside them?"""
    if isinstance(scorer, DotScores):
        return scorer.query.dtype in walk.DTYPES and scorer.key.dtype in walk.DTYPES
    return fused(scorer) is not None


def choose_into(found: Tensor, scorer: Scorer, limits: Limits) -> None:
    """Write the best keys of all queries to `found` `[B, C, Q, N]` int32."""
    batch, heads, queries, keys = scorer.shape
    of_score = batch * heads if _has_kernel(scorer) else max(batch * heads, scorer.numbers_per_score)
    step = max(1, MAX_SCORES // max(1, keys * of_score))
    for first in range(0, queries, step):
        some = slice(first, min(first + step, queries))
        _select(_scores(scorer, some, limits), found[:, :, some], _end(limits, some))


def _end(limits: Limits, queries: slice) -> tuple[int, int] | None:
    """Where the first of some queries is, and how large a key: a query chooses none that begins behind it."""
    return None if limits.q_offset is None else (limits.q_offset + queries.start, limits.size)


def _scores(scorer: Scorer, queries: slice, limits: Limits) -> Tensor:
    """`[B, C, m, K]` float32, -inf where a query may not choose; behind all queries anything."""
    keys, indexer = slice(0, scorer.shape[3]), fused(scorer)
    if indexer is not None:
        scores = indexer_scores(indexer, queries, _end(limits, queries))
    elif isinstance(scorer, DotScores) and _has_kernel(scorer):
        scores = dot_scores(scorer, queries, _end(limits, queries))
    else:
        scores = scorer.scores(queries, keys).float().contiguous()
    # those that are left out by their place alone are not read
    seen = limits.beside_causality.seen(queries, keys, scorer.device)
    return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)


def dot_scores(scorer: DotScores, queries: slice, end: tuple[int, int] | None) -> Tensor:
    """`[B, C, m, K]` float32. With `end`, keys that begin behind a query may have anything."""
    from . import selection_kernels

    query, key = readable(scorer.query[:, :, queries]), readable(scorer.key)
    batch, heads, some, dim = query.shape
    keys = key.shape[2]
    found = torch.empty(batch, heads, some, keys, dtype=torch.float32, device=query.device)
    if found.numel():
        launch(
            selection_kernels.dot_scores, (-(-some // PRODUCT_QUERIES) * -(-keys // PRODUCT_KEYS), batch * heads), (query, key, found),
            strides_of(query, key), (*(end or (0, 1)), some, keys),
            {"IS_CAUSAL": end is not None, "C": heads, "G": key.shape[1], "D": dim, "BD": min(PRODUCT_DIM, max(16, power_of_two(dim))),
             "BM": PRODUCT_QUERIES, "BN": PRODUCT_KEYS, "PRECISION": "tf32x3"}, num_warps=WARPS_OF_SCORES,
        )  # fmt: skip
    return found


def indexer_scores(scorer: IndexerScores, queries: slice, end: tuple[int, int] | None) -> Tensor:
    """`[B, 1, m, K]` float32. With `end`, keys that begin behind a query may have anything."""
    from . import selection_kernels

    query, key = readable(scorer.query[:, queries]), readable(scorer.key)
    weights = (scorer.weights[:, queries].float() * scorer.scale).contiguous()
    batch, some, heads, dim = query.shape
    keys = key.shape[1]
    found = torch.empty(batch, 1, some, keys, dtype=torch.float32, device=query.device)
    if found.numel():
        launch(
            selection_kernels.indexer_scores, (-(-some // TILE_QUERIES), batch * -(-keys // TILE_KEYS)), (query, key, weights, found),
            (*query.stride()[:3], *key.stride()[:2], *weights.stride()[:2], found.stride(0)), (*(end or (0, 1)), some, keys),
            {"IS_CAUSAL": end is not None, "HEADS": heads, "D": dim, "BD": max(16, power_of_two(dim)), "BM": TILE_QUERIES,
             "BN": TILE_KEYS, "PRECISION": "ieee"}, num_warps=WARPS_OF_SCORES,
        )  # fmt: skip
    return found


def _select(scores: Tensor, found: Tensor, end: tuple[int, int] | None) -> None:
    """Write the best keys by scores `[B, C, m, K]`, contiguous, to `found` `[B, C, m, N]`, a part of a contiguous tensor.

    With `end`, those that begin behind a query are not read.
    """
    from . import selection_kernels

    batch, heads, some, keys = scores.shape
    if not found.numel():
        return
    if keys <= FEW_KEYS:
        launch(
            selection_kernels.select_of_few, (-(-some // FEW_QUERIES), batch * heads), (scores, found), (found.stride(1), found.stride(2)),
            (*(end or (0, 1)), some, keys, found.shape[3]),
            {"IS_CAUSAL": end is not None, "BM": FEW_QUERIES, "BN": max(32, power_of_two(keys)), "BC": power_of_two(found.shape[3])},
            num_warps=WARPS_OF_FEW,
        )  # fmt: skip
    else:
        launch(
            selection_kernels.select, (some, batch * heads), (scores, found), (found.stride(1), found.stride(2)),
            (*(end or (0, 1)), some, keys, found.shape[3]),
            {"IS_CAUSAL": end is not None, "BN": min(BLOCK, max(16, power_of_two(keys)))}, num_warps=WARPS_OF_CHOICE,
        )  # fmt: skip
