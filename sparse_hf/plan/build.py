"""From a pattern to the list of its non-empty blocks, by refinement.

Coarse squares of the (query, key) plane are classified with the pattern's closed form `blocks`; empty ones are dropped,
the others are cut in four, down to the block size. The work is proportional to what is found, never to n^2. Random blocks,
which lie in any coarse square, are looked up instead: each query block says what it draws.

Legend: b batch row, i query block, j key block; q0..q1 and k0..k1 are inclusive corners in key coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, reduce
from math import prod
from operator import and_, or_

import torch
from torch import Tensor

from ..pattern import EMPTY, FULL, PARTIAL, Pattern, RandomBlocks
from ..pattern.base import Marks, written_out
from .layout import Layout

# batch row, query block and key block of each, [N] int64
Squares = tuple[Tensor, Tensor, Tensor]

# squares to begin with at most, and how many blocks one sweep may list at most if all were full
FEW = 1 << 12
SWEEP = 1 << 22


@dataclass(frozen=True)
class Grid:
    """The plane that is cut into blocks."""

    q_len: int
    kv_len: int
    q_offset: int
    block_size: int

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_size)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_size)

    def corners(self, i: Tensor, j: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        side = size * self.block_size
        q0, k0 = i * side, j * side
        q1 = (q0 + side).clamp(max=self.q_len) - 1
        k1 = (k0 + side).clamp(max=self.kv_len) - 1
        return q0 + self.q_offset, q1 + self.q_offset, k0, k1


class Classifier:
    """The state of any rectangle of one batch: the pattern's own, cut down by padding, packing and marks."""

    def __init__(self, pattern: Pattern, layout: Layout, kv_len: int):
        self.pattern, self.layout, self.kv_len = pattern, layout, kv_len
        self.real = _running_count(layout.real)
        # marks only matter to a pattern that asks for them
        self.marks = _running_count(layout.marks) if pattern.uses_marks else None

    def __call__(self, b: Tensor, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        if self.layout.start is None:
            return self.pattern.blocks(q0, q1, k0, k1, self._marks(b, (q0, q1), (k0, k1), self.kv_len))
        # two ranges that do not overlap share at most one sequence, the one that runs from the earlier into the later;
        # two that overlap are told apart only if one sequence holds both
        disjoint = torch.minimum(q1, k1) < torch.maximum(q0, k0)
        first = torch.where(disjoint, torch.minimum(q1, k1), torch.minimum(q0, k0))
        last = torch.where(disjoint, torch.maximum(q0, k0), torch.maximum(q1, k1))
        start, end = self.layout.start[b, last].long(), self.layout.end[b, last].long()
        shared = (start >= 0) & (self.layout.start[b, first] == start)
        mixed = ~disjoint & ~shared & (start >= 0)
        inside = [torch.maximum(q0, start), torch.minimum(q1, end), torch.maximum(k0, start), torch.minimum(k1, end)]
        empty = ~shared | (inside[0] > inside[1]) | (inside[2] > inside[3])
        a0, a1, c0, c1 = (torch.where(empty, start.clamp(min=0), corner) for corner in inside)
        origin = start.clamp(min=0)
        marks = self._marks(b, (a0, a1), (c0, c1), end + 1 - origin)
        state = self.pattern.blocks(a0 - origin, a1 - origin, c0 - origin, c1 - origin, marks)
        whole = (q0 >= start) & (q1 <= end) & (k0 >= start) & (k1 <= end)
        if self.real is not None:
            whole &= (self._count(self.real, b, q0, q1) == q1 - q0 + 1) & (
                self._count(self.real, b, k0, k1) == k1 - k0 + 1
            )
        state = torch.where(whole, state, state.clamp(max=PARTIAL))
        return torch.where(mixed, PARTIAL, torch.where(empty, EMPTY, state)).to(torch.int8)

    def _marks(self, b: Tensor, queries: tuple, keys: tuple, length) -> Marks:
        if self.marks is None:
            return Marks(length=length)
        return Marks(self._mark_state(b, *queries), self._mark_state(b, *keys), length)

    def _mark_state(self, b: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        found = self._count(self.marks, b, x0, x1)
        return ((found > 0).to(torch.int8) + (found == x1 - x0 + 1)).to(torch.int8)

    @staticmethod
    def _count(running: Tensor, b: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        return running[b, x1 + 1] - running[b, x0]


def _running_count(flags: Tensor | None) -> Tensor | None:
    if flags is None:
        return None
    return torch.nn.functional.pad(flags.long().cumsum(1), (1, 0))


def list_tables(
    patterns: tuple[Pattern, ...], grid: Grid, layout: Layout, batch_rows: int, cap_at_partial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of a `BlockPlan`, made on the default device, where patterns and layout are: row offsets, columns, full."""
    # rows of the batch that are alike, but for a mask function, are listed once
    copies = torch.arange(batch_rows // layout.rows)[:, None]
    swept = cache(partial(_sweep, grid=grid, layout=layout))
    rows, columns = batch_rows * len(patterns) * grid.q_blocks, max(1, grid.kv_blocks)
    keys, full = [], []
    for p, pattern in enumerate(patterns):
        b, i, j, is_full = list_blocks(pattern, grid, layout, swept)
        key = (((b + copies) * len(patterns) + p) * grid.q_blocks + i) * columns + j  # [copies, N]
        keys.append(key.flatten())
        full.append(is_full.expand_as(key).flatten())
    key, order = torch.cat(keys).sort()
    is_full = torch.cat(full)[order] & (not cap_at_partial)
    counts = torch.bincount(key // columns, minlength=rows)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), (key % columns).int(), is_full


def list_blocks(
    pattern: Pattern, grid: Grid, layout: Layout, swept: Callable[[Pattern], Squares]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The non-empty blocks `b, i, j` and which of them are full, in any order; `swept` is `_sweep`."""
    rest, drawn = _drawn_apart(pattern)
    found = [swept(rest)] if rest is not None else []
    found += [_drawn(part, grid, layout) for part in drawn]
    b, i, j = (torch.cat(sides) for sides in zip(*found, strict=True))
    if drawn:
        key = ((b * grid.q_blocks + i) * grid.kv_blocks + j).unique()
        j, i = key % grid.kv_blocks, key // grid.kv_blocks
        b, i = i // grid.q_blocks, i % grid.q_blocks
    state = Classifier(pattern, layout, grid.kv_len)(b, *grid.corners(i, j, 1))
    kept = (state > EMPTY).nonzero().flatten()
    return b[kept], i[kept], j[kept], state[kept] == FULL


def has_draws(pattern: Pattern) -> bool:
    """Are there random blocks that are looked up?"""
    return bool(_drawn_apart(pattern)[1])


def _drawn_apart(pattern: Pattern) -> tuple[Pattern | None, list[RandomBlocks]]:
    """Random blocks that hold all pairs which the rest of a pattern, None for none, does not."""
    rest, drawn = [], []
    for term in written_out(pattern) or [(pattern,)]:
        random = next((part for part in term if isinstance(part, RandomBlocks)), None)
        if random is None:
            rest.append(reduce(and_, term))
        else:
            drawn.append(random)
    return (reduce(or_, rest) if rest else None), drawn


def _sweep(pattern: Pattern, grid: Grid, layout: Layout) -> Squares:
    """Blocks among which are all that are not empty, found by refinement."""
    size, axes = 1, (layout.rows, grid.q_blocks, grid.kv_blocks)
    # a batch of many rows has many squares even if each row is one
    while prod(axes) > max(FEW, layout.rows):
        size *= 2
        axes = layout.rows, -(-grid.q_blocks // size), -(-grid.kv_blocks // size)
    squares = tuple(side.flatten() for side in torch.meshgrid(*map(torch.arange, axes), indexing="ij"))
    if size == 1:
        return squares
    classify = Classifier(pattern, layout, grid.kv_len)
    pieces = (side.split(max(1, SWEEP // size**2)) for side in _not_empty(squares, size, classify, grid))
    found = [_cut(piece, size, classify, grid) for piece in zip(*pieces, strict=True)]
    return tuple(torch.cat(sides) for sides in zip(*found, strict=True))


def _cut(squares: Squares, size: int, classify: Classifier, grid: Grid) -> Squares:
    """Squares of `size` blocks a side cut down to blocks, what is empty dropped on the way."""
    below, beside = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    while size > 1:
        size //= 2
        b, i, j = (side[:, None] for side in squares)
        i, j = 2 * i + below, 2 * j + beside
        exists = (i * size < grid.q_blocks) & (j * size < grid.kv_blocks)
        squares = b.expand_as(i)[exists], i[exists], j[exists]
        if size > 1:
            squares = _not_empty(squares, size, classify, grid)
    return squares


def _not_empty(squares: Squares, size: int, classify: Classifier, grid: Grid) -> Squares:
    b, i, j = squares
    kept = classify(b, *grid.corners(i, j, size)) > EMPTY
    return b[kept], i[kept], j[kept]


def _drawn(random: RandomBlocks, grid: Grid, layout: Layout) -> Squares:
    """The blocks that the draws touch, some of them several times."""
    if layout.start is None:
        b, x = torch.cartesian_prod(torch.arange(layout.rows), torch.arange(0, grid.kv_len, random.size)).unbind(1)
        origin = torch.zeros_like(x)
    else:
        place = torch.arange(grid.kv_len) - layout.start
        b, x = ((layout.start >= 0) & (place % random.size == 0)).nonzero(as_tuple=True)
        origin = layout.start[b, x].long()
    draw, exists = random.draws((x - origin) // random.size)  # [T, count]
    # first query and first key of each draw, [T, count, 1, 1]
    q = (x - grid.q_offset)[:, None, None, None]
    k = (origin[:, None] + draw * random.size)[:, :, None, None]
    step = torch.arange((random.size - 1) // grid.block_size + 2)
    i, j = q // grid.block_size + step[:, None], k // grid.block_size + step
    there = (i * grid.block_size < q + random.size) & (j * grid.block_size < k + random.size)
    there = there & (i >= 0) & (i < grid.q_blocks) & (j < grid.kv_blocks) & exists[:, :, None, None]
    return tuple(side.expand_as(there)[there] for side in (b[:, None, None, None], i, j))
