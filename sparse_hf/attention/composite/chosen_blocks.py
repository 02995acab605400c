"""The blocks of keys that queries choose, `topk_blocks(...)`: what they are, what they are scored by, and which are chosen.

Queries of a group choose together, by the mean of what each of them scores; a group is one query unless the pattern says more. So do
the query heads of a key head, where the pattern says so.

Legend: B batch, H query heads, G key heads, C heads of the choice (G or H), Q queries, K keys, D head dim; M blocks, of S keys each,
of which c are chosen; T groups of queries in a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...pattern import FULL, TopKBlocks
from ...pattern.chosen import ANTIDIAGONAL
from ...plan.cache import kept
from ..backend import AttentionCall
from ..backends.triton.walk import why_unfit
from ..chosen.best_keys import Limits, choose
from ..chosen.choice import Choice, ChosenBlocks, ChosenKeys
from ..chosen.scores import DotScores
from ..chosen.selection import is_able
from ..launch import launch, power_of_two, strides_of
from ..strides import readable
from .chosen_rest import Rest
from .chosen_scores import AntidiagonalScores

# keys of blocks that are looked at at once, on the CPU and elsewhere, and numbers that are pooled at once
MAX_KEYS, MAX_KEYS_ELSEWHERE, MAX_POOLED = 1 << 20, 1 << 23, 1 << 26
# tokens that a kernel pools at once
MAX_POOLED_TOKENS = 64
# pairs of groups and blocks of which it is kept whether they may be chosen, and lengths whose groups are kept
MAX_ALLOWED, GROUPS_KEPT = 1 << 22, 8


@dataclass(frozen=True, eq=False)
class Blocks:
    """Neighbouring tokens of all sequences of a batch, `size` at a time, one block after the other.

    Legend: as above; B may be 1 where rows are alike.
    """

    rest: Rest
    size: int

    @kept
    def of_token(self) -> Tensor:
        """The block of each token, `[B, K]`."""
        return (self._begins.cumsum(-1) - 1).clamp(min=0)

    @kept
    def _begins(self) -> Tensor:
        start, _, real = self.rest.bounds
        return real & ((torch.arange(real.shape[1], device=real.device) - start) % self.size == 0)

    @kept
    def first(self) -> Tensor:
        """The first token of each block, `[B, M]`; K where a row has fewer."""
        begins, keys = self._begins, self._begins.shape[1]
        count = max(1, int(begins.sum(-1).max()))
        found = torch.full((begins.shape[0], count), keys, device=begins.device)
        row, key = begins.nonzero(as_tuple=True)
        found[row, self.of_token[row, key]] = key
        return found

    @kept
    def last(self) -> Tensor:
        """The last token of each block, `[B, M]`; -1 where a row has fewer."""
        _, end, _ = self.rest.bounds
        keys = end.shape[1]
        last = torch.minimum(self.first + self.size - 1, end.gather(1, self.first.clamp(max=keys - 1)))
        return last.masked_fill(self.first == keys, -1)

    def mean(self, t: Tensor, offset: int = 0, sides: bool = False) -> Tensor:
        """The mean of the tokens `[B, heads, tokens, D]` in each block, `[B, heads, M, D]`; of none 0.

        Args:
            offset: the number of the first of the tokens.
            sides: the mean of what is above zero, then that of what is below, `[B, heads, M, 2 D]`.
        """

        if self._are_pooled_by_kernel(t, offset):
            return self._by_kernel(t, "SIDES" if sides else "MEAN")

        def pool(some: Tensor, there: Tensor | None) -> Tensor:
            wide = torch.promote_types(some.dtype, torch.float32)
            some = some if there is None else some.where(there, 0)
            count = some.shape[3] if there is None else there.sum(3).clamp(min=1)
            total = some.sum(3, dtype=wide) / count
            if not sides:
                return total
            size = some.abs().sum(3, dtype=wide) / count
            return torch.cat([size + total, total - size], -1) / 2

        return self._pooled(t, offset, pool)

    def bounds(self, t: Tensor) -> Tensor:
        """The largest and the smallest number of each dimension in each block, `[B, heads, M, 2 D]`."""
        if self._are_pooled_by_kernel(t, 0):
            return self._by_kernel(t, "BOUNDS")

        def pool(some: Tensor, there: Tensor | None) -> Tensor:
            low, high = (some, some) if there is None else (some.where(there, edge) for edge in (torch.inf, -torch.inf))
            found = torch.cat([high.amax(3), low.amin(3)], -1).to(torch.promote_types(some.dtype, torch.float32))
            # rows with fewer blocks: no block may be infinite
            return found.nan_to_num(0, 0, 0)

        return self._pooled(t, 0, pool)

    def cut(self, t: Tensor, side: int, offset: int) -> tuple[Tensor, Tensor]:
        """Blocks of tokens `[B, heads, tokens, D]` cut into pieces of `side`, and which of these have a token.

        `[B, heads, M, S / side, side * D]`, zeros where there is no token, and `[B or 1, M, S / side]`.
        """

        def pool(some: Tensor, there: Tensor | None) -> Tensor:
            some = some if there is None else some.where(there, 0)
            some = torch.nn.functional.pad(some, (0, 0, 0, self.size - some.shape[3]))
            return some.to(torch.promote_types(some.dtype, torch.float32)).unflatten(3, (-1, side)).flatten(4)

        return self._pooled(t, offset, pool), self._inside(t, offset)[1].unflatten(2, (-1, side)).any(-1)

    def _are_side_by_side(self, t: Tensor, offset: int) -> bool:
        """Are these all tokens, whose blocks follow one another from the first?"""
        return self.rest.positions.is_bare and not offset and t.shape[2] == self.rest.positions.kv_len

    def _are_pooled_by_kernel(self, t: Tensor, offset: int) -> bool:
        return self._are_side_by_side(t, offset) and why_unfit(t, t) is None and t.numel() > 0

    def _by_kernel(self, t: Tensor, what: str) -> Tensor:
        """One of the `chosen_block_kernels`, in float32."""
        from . import chosen_block_kernels as kernels

        t = readable(t)
        batch, heads, length, dim = t.shape
        blocks = -(-length // self.size)
        found = torch.empty(
            batch, heads, blocks, dim if what == "MEAN" else 2 * dim, dtype=torch.float32, device=t.device
        )
        constants = {
            "H": heads, "WHAT": getattr(kernels, what).value, "D": dim, "BD": max(16, power_of_two(dim)),
            "BN": min(MAX_POOLED_TOKENS, max(16, power_of_two(self.size))),
        }  # fmt: skip
        launch(kernels.pool, (blocks, batch * heads), (t, found), strides_of(t), (length, self.size), constants)
        return found

    def _inside(self, t: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """The tokens of each block, counted from `offset`, and which of them there are: `[B, M, S]`."""
        inside = self.first[..., None] + torch.arange(self.size, device=t.device) - offset
        return inside, (inside <= self.last[..., None] - offset) & (inside >= 0) & (inside < t.shape[2])

    def _pooled(self, t: Tensor, offset: int, pool: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """What `pool` makes of the tokens of blocks, `[B, some heads, M, S, D]`, and of which of them there are; None: all."""
        if self._are_side_by_side(t, offset):
            # blocks stand side by side, and the last may be shorter
            whole = t.shape[2] // self.size * self.size
            parts = [t[:, :, :whole].unflatten(2, (-1, self.size)), t[:, :, None, whole:]]
            return torch.cat([pool(part, None) for part in parts if part.shape[2] and part.shape[3]], 2)
        inside, there = self._inside(t, offset)
        place = inside.clamp(0, t.shape[2] - 1)[:, None]
        row = torch.arange(t.shape[0], device=t.device)[:, None, None, None]
        some = max(1, MAX_POOLED // max(1, t.shape[0] * place.numel() // len(place) * t.shape[3]))
        heads = torch.arange(t.shape[1], device=t.device)[:, None, None].split(some)
        return torch.cat([pool(t[row, head, place], there[:, None, ..., None]) for head in heads], 1)


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of queries of a call, and what each may choose."""

    rest: Rest
    content: TopKBlocks
    queries: int

    @kept
    def keys(self) -> Blocks:
        """The blocks of keys."""
        return Blocks(self.rest, self.content.size)

    @kept
    def of_tokens(self) -> Blocks:
        """The groups of all tokens."""
        return Blocks(self.rest, self.content.queries)

    @kept
    def of_query(self) -> Tensor:
        """The group of each query, counted from the first of a call, `[B or 1, Q]`."""
        if self.content.queries == 1:
            return torch.arange(self.queries, device=self.rest.positions.device)[None]
        own = self.of_tokens.of_token[:, self.rest.positions.q_offset :][:, : self.queries]
        return own - own[:, :1]

    @kept
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """The first and the last token of each group, `[B or 1, T]`."""
        if self.content.queries == 1:
            token = (self.of_query + self.rest.positions.q_offset).expand(self.keys.of_token.shape[0], -1)
            return token, token
        own = self.of_tokens.of_token[:, self.rest.positions.q_offset :][:, :1]
        number = own + torch.arange(int(self.of_query.max()) + 1, device=own.device)
        number = number.clamp(max=self.of_tokens.first.shape[1] - 1)
        first = self.of_tokens.first.gather(1, number)
        last = self.of_tokens.last.gather(1, number)
        most = self.of_tokens.of_token.shape[1] - 1
        return first.clamp(max=most), last.clamp(0, most)

    @kept
    def own(self) -> Tensor:
        """The blocks that each group reaches into, `[B or 1, T, most of a group]`, -1 for none."""
        first, last = (self.keys.of_token.gather(1, token) for token in self._tokens)
        block = first[..., None] + torch.arange(self.content.own_blocks, device=first.device)
        return block.masked_fill(block > last[..., None], -1)

    @kept
    def limits(self) -> Limits:
        """Which blocks each group may choose beside its own."""
        band, size = self.rest.band, self.content.size
        if band is None or band.first or self.content.queries > 1:
            return Limits(allows=self.may_choose)
        # blocks before a query's own, but those that its window holds: all that begin so far before it
        return Limits(q_offset=self.rest.positions.q_offset - max(size, band.near), size=size)

    def may_choose(self, group: Tensor, block: Tensor) -> Tensor:
        """May groups `[m, 1]` choose blocks `[M]` beside their own? `[B or 1, 1, m, M]`."""
        known = self._allowed
        if known is None:
            return self._allows(group, block)
        return known if known.shape[2:] == (len(group), len(block)) else known[:, :, group, block]

    @kept
    def _allowed(self) -> Tensor | None:
        """All of it, where few of those steps are made that a GPU waits for."""
        blocks = self.keys.first.shape[1]
        shape = self.rest.bounds[0].shape[0], 1, self.own.shape[1], blocks
        if self.content.queries == 1 or not is_able(self.rest.positions.device) or math.prod(shape) > MAX_ALLOWED:
            return None
        group, block = (torch.arange(n, device=self.rest.positions.device) for n in shape[2:])
        return self._allows(group[:, None], block).expand(shape)

    def _allows(self, group: Tensor, block: Tensor) -> Tensor:
        start, _, real = self.rest.bounds
        row = torch.arange(start.shape[0], device=group.device).view(-1, 1, 1, 1)
        x, end = (token[row, group] for token in self._tokens)
        first, last = self.keys.first[row, block], self.keys.last[row, block]
        origin = start[row, x]
        # padding at the end of a row inherits the sequence before it
        allowed = real[row, x] & (last >= 0) & (origin == start[row, first.clamp(max=start.shape[1] - 1)])
        allowed = allowed & ((block < self.keys.of_token[row, x]) | (block > self.keys.of_token[row, end]))
        if self.rest.is_causal:
            allowed = allowed & (last < x)
        place = (x - origin).clamp(min=0)
        begin, end = (first - origin).clamp(min=0), (last - origin).clamp(min=0)
        held = self.rest.positions.patterns[0].blocks(place, place + (self.content.queries - 1), begin, end)
        return allowed & (held != FULL)

    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        """The blocks of each group, its own last, `[B, C, T, c]` int32, -1 for none."""
        heads = (k if self.content.shares_heads else q).shape[1]
        own = self.own[:, None].int().expand(q.shape[0], heads, -1, -1)
        others = self.content.count - own.shape[-1]
        if others < 1:
            return own
        scorer = self._antidiagonals(q, k) if self.content.scores == "antidiagonal" else DotScores(*self._scored(q, k))
        found = choose(scorer, others, self.limits)
        return torch.cat([found, own], -1)

    def _antidiagonals(self, q: Tensor, k: Tensor) -> AntidiagonalScores:
        side, offset = ANTIDIAGONAL, self.rest.positions.q_offset
        # [B, heads, blocks, squares, side * D], zeros where there is no token
        query, present = self.of_tokens.cut(q, side, offset)
        key, _ = self.keys.cut(k, side, 0)
        number = self._numbers
        row, head = (torch.arange(n, device=q.device) for n in q.shape[:2])
        query = query[row[:, None, None], head[:, None], number[:, None]].unflatten(-1, (side, -1)).flip(-2).flatten(-2)
        present = present.expand(len(row), -1, -1)[row[:, None], number]
        scale = q.shape[-1] ** -0.5 / side
        return AntidiagonalScores(query, present, key, scale, self.may_choose, self.content.shares_heads)

    @kept
    def _numbers(self) -> Tensor:
        """The groups of a call among all of a text, `[B or 1, T]`."""
        number = self.of_tokens.of_token[:, self.rest.positions.q_offset, None]
        number = number + torch.arange(self._tokens[0].shape[1], device=number.device)
        return number.clamp(max=self.of_tokens.first.shape[1] - 1)

    def _scored(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What the score of a group and a block is the product of, `[B, C, T, F]` and `[B, G, M, F]`."""
        of_bounds = self.content.scores == "bounds"
        key = self.keys.bounds(k) if of_bounds else self.keys.mean(k)
        query = self._scoring_queries(q, of_bounds)
        if self.content.shares_heads:
            query = query.unflatten(1, (k.shape[1], -1)).mean(2, dtype=torch.promote_types(q.dtype, torch.float32))
        return query, key

    def _scoring_queries(self, q: Tensor, of_bounds: bool) -> Tensor:
        """`[B, H, T, F]`."""
        if self.content.queries == 1:
            # the largest product with numbers between two bounds
            return torch.cat([q.relu(), -(-q).relu()], -1) if of_bounds else q
        pooled = self.of_tokens.mean(q, self.rest.positions.q_offset, of_bounds)  # of all groups of a text
        if pooled.shape[2] == self._numbers.shape[1] and self.rest.positions.is_bare:
            return pooled
        row = torch.arange(len(q), device=q.device)[:, None, None]
        return pooled[row, torch.arange(q.shape[1], device=q.device)[:, None], self._numbers[:, None]]


@lru_cache(maxsize=GROUPS_KEPT)
def find_groups(rest: Rest, content: TopKBlocks) -> Groups:
    """The groups of a call, whose numbers are found once where batch rows are alike."""
    return Groups(rest, content, rest.positions.q_len)


def block_choice(call: AttentionCall, content: TopKBlocks, rest: Rest) -> Choice:
    """The blocks of each query where their keys are known from numbers alone, else its keys, `[B, C, Q, c * S]`."""
    groups = find_groups(rest, content)
    found, positions = groups.choose(call.q, call.k), rest.positions
    if rest.band is not None and content.size > 1:
        blocks = found if content.queries == 1 else found[:, :, groups.of_query[0]]
        return ChosenBlocks(blocks, content.size, rest.band, positions.q_offset, positions.kv_len)
    # blocks of texts that begin elsewhere do so too
    size = content.size if positions.is_bare else 1
    return ChosenKeys(torch.cat(list(_keys_of_blocks(found, groups)), 2), size)


def _keys_of_blocks(found: Tensor, groups: Groups) -> Iterator[Tensor]:
    """The keys `[B, C, m, c * S]` of blocks `[B, C, T, c]`, some queries at a time."""
    (batch, heads, _, count), blocks = found.shape, groups.keys
    inside = torch.arange(blocks.size, device=found.device)
    row = torch.arange(blocks.first.shape[0], device=found.device).view(-1, 1, 1, 1)
    b, h = (torch.arange(n, device=found.device) for n in (batch, heads))
    of_query = groups.of_query.expand(batch, -1)
    most = MAX_KEYS if found.device.type == "cpu" else MAX_KEYS_ELSEWHERE
    for q in torch.arange(groups.queries, device=found.device).split(
        max(1, most // (batch * heads * count * blocks.size))
    ):
        block = found[b[:, None, None], h[:, None], of_query[:, None, q]].long()  # [B, C, m, c]
        first, last = (t[row, block.clamp(min=0)][..., None] for t in (blocks.first, blocks.last))
        keys = first + inside  # [B, C, m, c, S]
        there = (keys <= last) & (block >= 0)[..., None]
        keys, there = keys.flatten(3), there.flatten(3)
        there = there & groups.rest.holds(q[:, None], keys.clamp(max=blocks.of_token.shape[1] - 1))
        yield keys.masked_fill(~there, -1).int()
