"""Scores that look at more than one pair: antidiagonals of squares, columns and diagonals.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; T groups of queries and M blocks of keys, of C and c
squares a side; a piece has m queries or groups and n keys or blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..backend import AttentionCall
from ..chosen.best_keys import Allows
from .chosen_rest import Rest

# numbers that exist at once
MAX_NUMBERS = 1 << 24


@dataclass(frozen=True, eq=False)
class AntidiagonalScores:
    """Weights of squares, of which a row of squares has 1 for all blocks to choose from, summed by group and block: `[B, H, m, n]`,
    or `[B, G, m, n]`.

    Args:
        query: `[B, H, T, C, side * D]`, the queries of a square's rows in reverse.
        present: `[B, T, C]`, which rows of squares have a query.
        key: `[B, G, M, c, side * D]`.
        scale: what multiplies the sum of an antidiagonal.
        allows: which blocks a group may choose.
        shares_heads: have the query heads of a key head one score, the sum of theirs?
    """

    query: Tensor
    present: Tensor
    key: Tensor
    scale: float
    allows: Allows
    shares_heads: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        heads = (self.key if self.shares_heads else self.query).shape[1]
        return self.query.shape[0], heads, self.query.shape[2], self.key.shape[2]

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def numbers_per_score(self) -> int:
        batch, heads, _, rows, _ = self.query.shape
        return 3 * batch * heads * rows * self.key.shape[3]

    @cached_property
    def _total(self) -> Tensor:
        """The log of what the weights of each row of squares add up to, `[B, H, T, C]`."""
        groups, blocks = self.shape[2:]
        step = max(1, MAX_NUMBERS // max(1, self.numbers_per_score * blocks))
        pieces = [slice(first, min(first + step, groups)) for first in range(0, groups, step)]
        return torch.cat([self._squares(some, slice(0, blocks)).flatten(-2).logsumexp(-1) for some in pieces], 2)

    def _squares(self, groups: slice, blocks: slice) -> Tensor:
        """`[B, H, m, C, n, c]`, -inf where a group may not choose."""
        query = self.query[:, :, groups].unflatten(1, (self.key.shape[1], -1))  # [B, G, R, m, C, F]
        key = self.key[:, :, None, blocks]
        rows, columns = query.shape[3:5], key.shape[3:5]
        found = query.flatten(3, 4) @ key.flatten(3, 4).mT * self.scale
        found = found.unflatten(-1, columns).unflatten(3, rows).flatten(1, 2)
        group, block = (
            torch.arange(some.start, some.stop, device=self.device) for some in (groups, blocks)
        )  # fmt: skip
        allowed = self.allows(group[:, None], block)  # [B or 1, 1, m, n]
        return found.masked_fill(~allowed[:, :, :, None, :, None], -torch.inf)

    def scores(self, queries: slice, keys: slice) -> Tensor:
        total = self._total[:, :, queries, :, None, None]
        weights = (self._squares(queries, keys) - total.where(total > -torch.inf, 0)).exp()
        there = self.present[:, None, queries, :, None, None]
        found = weights.where(there, 0).sum((3, 5))
        return found.unflatten(1, (self.key.shape[1], -1)).sum(2) if self.shares_heads else found


@dataclass(frozen=True, eq=False)
class Worth:
    """A score of each query and key that is looked up: of the key, or of its distance from the query: `[B, H, m, n]`.

    Args:
        worth: `[B, H, K]`, by key, or by the distance counted from where the sequence starts.
        queries: Q.
        q_offset: key index of the first query.
        start: `[B or 1, K]`, where the sequence of each token starts, for distances; None: by key.
    """

    worth: Tensor
    queries: int
    q_offset: int
    start: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, keys = self.worth.shape
        return batch, heads, self.queries, keys

    @property
    def device(self) -> torch.device:
        return self.worth.device

    @property
    def numbers_per_score(self) -> int:
        return 3 * self.worth.shape[0] * self.worth.shape[1]

    def scores(self, queries: slice, keys: slice) -> Tensor:
        batch, heads, _ = self.worth.shape
        if self.start is None:
            return self.worth[:, :, None, keys].expand(-1, -1, queries.stop - queries.start, -1)
        x = torch.arange(queries.start, queries.stop, device=self.device) + self.q_offset
        key = torch.arange(keys.start, keys.stop, device=self.device)
        distance = (x[:, None] - key).abs() + self.start[:, x, None]  # [B or 1, m, n]
        index = distance.clamp(max=self.worth.shape[2] - 1)[:, None].expand(batch, heads, -1, -1)
        return self.worth.gather(2, index.flatten(2)).view_as(index)


def slash_worth(call: AttentionCall, rest: Rest, count: int) -> tuple[Worth, Worth]:
    """What keys, and what distances, are worth to the last `count` queries of each sequence.

    A sequence whose end is not there yet, in slots of a static cache, ends with the queries of the call.
    """
    start, end, real = rest.bounds
    offset, (batch, heads, queries, _) = rest.positions.q_offset, call.q.shape
    own = slice(offset, offset + queries)
    x = torch.arange(offset, offset + queries, device=call.q.device)
    is_last = (real[:, own] & (end[:, own].clamp(max=offset + queries - 1) - x < count)).expand(batch, -1)
    start, real = start.expand(batch, -1), real.expand(batch, -1)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    columns, diagonals = (torch.zeros(batch, heads, call.k.shape[2], dtype=wide, device=x.device) for _ in range(2))
    step = max(1, MAX_NUMBERS // max(1, 3 * heads * call.k.shape[2]))
    for b in range(batch):
        for some in is_last[b].nonzero()[:, 0].split(step):
            weights = _weights(call, rest, b, some)  # [H, r, K]
            columns[b] += weights.sum(1)
            diagonals[b] += _by_distance(weights, some + offset, start[b], real[b])
    of_distance = Worth(diagonals, queries, offset, start)
    return Worth(columns, queries, offset), of_distance


def _weights(call: AttentionCall, rest: Rest, b: int, queries: Tensor) -> Tensor:
    """The weights `[H, r, K]` of some queries of a row, over all keys that they may choose."""
    query, keys = call.q[b, :, queries], torch.arange(call.k.shape[2], device=queries.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(0, (call.k.shape[1], -1))
    scores = (grouped @ call.k[b, :, None].to(wide).mT).flatten(0, 1) * call.scoring.scale
    row = torch.full((1, 1), b if rest.positions.sequences.rows > 1 else 0, device=queries.device)
    return scores.masked_fill(~rest.cut.allows(row, 0, queries[:, None], keys), -torch.inf).softmax(-1).nan_to_num()


def _by_distance(weights: Tensor, x: Tensor, start: Tensor, real: Tensor) -> Tensor:
    """The sums `[H, K]` of weights `[H, r, K]` of queries `[r]` by distance, counted from where their sequences start."""
    slot = torch.arange(len(start), device=x.device)
    distance = slot - start
    mine = real & (start == start[x][:, None])  # [r, K]
    total = weights.new_zeros(len(weights), weights.shape[2])
    for key, there in ((x[:, None] - distance, distance >= 0), (x[:, None] + distance, distance > 0)):
        there = there & mine & (key >= 0) & (key < len(start))
        index = key.clamp(0, len(start) - 1).expand(len(weights), -1, -1)
        total += weights.gather(2, index).where(there, 0).sum(1)
    return total
