"""The best keys of each query, from scores that are made in pieces.

Legend: B batch, C heads of the choice, Q queries, K keys, N chosen keys of a query; a piece has m queries and n keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...pattern.base import whole
from . import selection

# numbers that exist at once while scores are made and compared, and keys of a piece
MAX_SCORES, KEYS = 1 << 21, 2048
# below every score, also below -inf
_NONE = torch.iinfo(torch.int64).min
_LOW = (1 << 31) - 1


class Scorer(Protocol):
    """Scores of queries and keys, made piece by piece."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(B, C, Q, K)` of all scores."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def numbers_per_score(self) -> int:
        """How many numbers are made for a score, which says how large a piece may be."""
        ...

    def scores(self, queries: slice, keys: slice) -> Tensor:
        """`[B, C, m, n]` floating point; whatever is -inf is not chosen."""
        ...


# may queries `[m, 1]` choose keys `[n]`, given by index? Bool that broadcasts to `[B, C, m, n]`
Allows = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Limits:
    """The keys that each query may choose: from `start` up to, without, `end`, and where `allows` says so.

    Args:
        start, end: `[B, Q]` or `[1, Q]` integers; None is no limit.
        q_offset: place of the first query; where given, no query chooses a key that begins behind its own place.
        allows: of query and key indices; None allows all.
        size: tokens of a key, which is a block of them where that is more than one: key x begins at place `x * size`.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    q_offset: int | None = None
    allows: Allows | None = None
    size: int = 1

    @property
    def beside_causality(self) -> Limits:
        """What limits a choice beside `q_offset`."""
        return self if self.q_offset is None else replace(self, q_offset=None)

    def last_key(self, queries: slice, num_keys: int) -> int:
        """How many of the first keys have any that one of the queries may choose, at most."""
        if self.q_offset is None:
            return num_keys
        return max(0, min(num_keys, (queries.stop - 1 + self.q_offset) // self.size + 1))

    def seen(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """Bool that broadcasts to `[B, C, m, n]`; None for all."""
        query = torch.arange(queries.start, queries.stop, queries.step or 1, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        parts = []
        if self.q_offset is not None and (keys.stop - 1) * self.size > queries.start + self.q_offset:
            parts.append(key * self.size <= query + self.q_offset)
        if self.start is not None:
            parts.append(key >= self.start[:, None, queries, None])
        if self.end is not None:
            parts.append(key < self.end[:, None, queries, None])
        if self.allows is not None:
            parts.append(self.allows(query, key))
        if not parts:
            return None
        found = parts[0]
        for part in parts[1:]:
            found = found & part
        return found


NO_LIMITS = Limits()


@torch.no_grad()
def choose(scorer: Scorer, count: int, limits: Limits = NO_LIMITS) -> Tensor:
    """The `count` keys of each query with the highest scores, in memory O(Q count).

    Scores are compared in float32; of equal ones the lower key is taken. A query that may choose fewer keys gets these.

    Args:
        scorer: makes the scores.
        count: how many keys at most.
        limits: which keys a query may choose.

    Returns:
        `[B, C, Q, N]` int32 with N the lesser of `count` and K: keys in ascending order, then -1 where there are no more.

    Raises:
        ValueError: a count below 1.

    Examples:
        >>> query, key = torch.randn(1, 4, 300, 32), torch.randn(1, 2, 300, 32)
        >>> choose(DotScores(query, key), 16, Limits(q_offset=0)).shape
        torch.Size([1, 4, 300, 16])
    """
    whole("count", count, 1)
    batch, heads, queries, keys = scorer.shape
    count = min(count, keys)
    found = torch.full((batch, heads, queries, count), -1, dtype=torch.int32, device=scorer.device)
    if count and selection.is_able(scorer.device):
        selection.choose_into(found, scorer, limits)
    elif count:
        for some in _query_pieces(scorer, count):
            found[:, :, some] = _best(scorer, some, count, limits)
    return found


def _query_pieces(scorer: Scorer, count: int) -> Iterator[slice]:
    batch, heads, queries, keys = scorer.shape
    width = min(keys, KEYS) * max(scorer.numbers_per_score, 2 * batch * heads) + 2 * batch * heads * count
    step = max(1, MAX_SCORES // max(1, width))
    for first in range(0, queries, step):
        yield slice(first, min(first + step, queries))


def _best(scorer: Scorer, queries: slice, count: int, limits: Limits) -> Tensor:
    """`[B, C, m, N]` of some queries."""
    batch, heads, _, keys = scorer.shape
    shape = batch, heads, queries.stop - queries.start
    best = torch.full((*shape, 0), _NONE, dtype=torch.int64, device=scorer.device)
    for first in range(0, limits.last_key(queries, keys), KEYS):
        some = slice(first, min(first + KEYS, keys))
        ranks = _ranks(scorer.scores(queries, some), some, limits.seen(queries, some, scorer.device))
        best = torch.cat([best, ranks], -1) if best.shape[-1] else ranks
        if best.shape[-1] > count:
            best = best.topk(count, dim=-1, sorted=False).values
    key = (_LOW - (best & 0xFFFFFFFF)).masked_fill(best == _NONE, keys).sort(dim=-1).values
    key = torch.nn.functional.pad(key, (0, count - key.shape[-1]), value=keys)
    return key.masked_fill(key == keys, -1).int()


def _ranks(scores: Tensor, keys: slice, seen: Tensor | None) -> Tensor:
    """Whole numbers of 64 bits that are in the order of the scores, and of equal scores in that of the keys, downwards."""
    # minus zero is zero
    scores = scores.float() + 0.0
    bits = scores.view(torch.int32)
    # floats below zero are in the opposite order of their bits
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ranks = (order << 32) | (_LOW - torch.arange(keys.start, keys.stop, device=scores.device))
    hidden = scores == -torch.inf
    return ranks.masked_fill_(hidden if seen is None else hidden | ~seen, _NONE)
