"""From a pattern to the list of its non-empty blocks, by refinement.

Coarse squares of the (query, key) plane are classified with the pattern's closed form `blocks`; empty ones are dropped,
the others are cut into smaller ones, down to the block size. The work is proportional to what is found, never to n^2. Random
blocks, which lie in any coarse square, are looked up instead: each query block says what it draws. All squares of a size are
classified together, since on a GPU the number of steps counts and not what each of them does.

Legend: b batch row, i query block, j key block; q0..q1 and k0..k1 are inclusive corners in key coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial, reduce
from math import prod
from operator import and_, or_

import torch
from torch import Tensor

from ..pattern import EMPTY, FULL, PARTIAL, Pattern, RandomBlocks, full
from ..pattern.base import Marks, written_out
from .sequences import Sequences

# squares to begin with, at most
MAX_FIRST_SQUARES = 1 << 12
# squares that a larger one is cut into, a side
CUTS_A_SIDE = 4
# squares that are classified together, at most
MAX_SQUARES_AT_ONCE = 1 << 19

# first and last tokens of ranges
Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Grid:
    """The plane that is cut into blocks.

    Squares of it are `[3, N]` int64: batch row, and row and column in squares. A block that is listed is one number, its `code`,
    so that sorting orders blocks by row and column.
    """

    q_len: int
    kv_len: int
    q_offset: int
    block_size: int
    device: torch.device

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_size)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_size)

    def corners(self, squares: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q0, q1, k0 and k1 of squares of `size` blocks a side; of those beyond the last token all are that token."""
        side, (_, i, j) = size * self.block_size, squares
        q, k = i * side + self.q_offset, j * side
        last, last_key = self.q_offset + self.q_len - 1, self.kv_len - 1
        q0, q1 = q.clamp(max=last), (q + (side - 1)).clamp(max=last)
        return q0, q1, k.clamp(max=last_key), (k + (side - 1)).clamp(max=last_key)

    def holds(self, squares: Tensor, size: int) -> Tensor:
        """Which squares have blocks; those that are cut off the last ones may have none."""
        _, i, j = squares
        return (i < -(-self.q_blocks // size)) & (j < -(-self.kv_blocks // size))

    def codes(self, blocks: Tensor, is_full: Tensor) -> Tensor:
        b, i, j = blocks
        return ((b * self.q_blocks + i) * self.kv_blocks + j) * 2 + is_full


class Classifier:
    """The state of any rectangle of one batch: the pattern's own, cut down by padding, packing and marks."""

    def __init__(self, pattern: Pattern, sequences: Sequences, kv_len: int):
        self.pattern, self.sequences, self.kv_len = pattern, sequences, kv_len
        self.real = None if sequences.real is None else _running_count(sequences.real)
        # marks only matter to a pattern that asks for them
        asked = sequences.marks if pattern.uses_marks else None
        self.marks = None if asked is None else _running_count(asked)

    def __call__(self, b: Tensor, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        """EMPTY, PARTIAL or FULL of the rectangles with these corners in batch rows `b`, int8."""
        if self.sequences.start is None or self.sequences.end is None:
            return self.pattern.blocks(q0, q1, k0, k1, self._marks(b, (q0, q1), (k0, k1), self.kv_len))
        # two ranges that do not overlap share at most one sequence, the one that runs from the earlier into the later;
        # two that overlap are told apart only if one sequence holds both
        disjoint = torch.minimum(q1, k1) < torch.maximum(q0, k0)
        first = torch.where(disjoint, torch.minimum(q1, k1), torch.minimum(q0, k0))
        last = torch.where(disjoint, torch.maximum(q0, k0), torch.maximum(q1, k1))
        start, end = self.sequences.start[b, last].long(), self.sequences.end[b, last].long()
        shared = (start >= 0) & (self.sequences.start[b, first] == start)
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

    def _marks(self, b: Tensor, queries: Range, keys: Range, length: Tensor | int) -> Marks:
        if self.marks is None:
            return Marks(length=length)
        return Marks(self._mark_state(self.marks, b, *queries), self._mark_state(self.marks, b, *keys), length)

    def _mark_state(self, running: Tensor, b: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        found = self._count(running, b, x0, x1)
        return ((found > 0).to(torch.int8) + (found == x1 - x0 + 1)).to(torch.int8)

    @staticmethod
    def _count(running: Tensor, b: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        return running[b, x1 + 1] - running[b, x0]


def _running_count(flags: Tensor) -> Tensor:
    """Flags before each token, `[B, K + 1]`."""
    return torch.nn.functional.pad(flags.long().cumsum(1), (1, 0))


def list_tables(
    patterns: tuple[Pattern, ...], grid: Grid, sequences: Sequences, batch_rows: int, cap_at_partial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of a `BlockPlan`, made on the device of the grid, where patterns and sequences are: row offsets, columns, full."""
    swept = cache(partial(_swept, grid=grid, sequences=sequences))
    rows, columns = batch_rows * len(patterns) * grid.q_blocks, max(1, grid.kv_blocks)
    plane = max(1, grid.q_blocks) * columns * 2
    # rows of the batch that are alike, but for a mask function, are listed once
    copies = torch.arange(batch_rows // sequences.rows, device=grid.device)[:, None]

    def in_tables(code: Tensor, p: int) -> Tensor:
        b = code // plane
        return (code + ((b + copies) * len(patterns) + p - b) * plane).flatten()

    found = ((code, p) for p, pattern in enumerate(patterns) for code in list_blocks(pattern, grid, sequences, swept))
    code = torch.cat([in_tables(*one) for one in found]).unique()
    # of a block that is listed as partial and as full the last is the full one
    code = code[(code >> 1).diff(append=code.new_full((1,), -1)) != 0]
    offsets = torch.searchsorted(code, torch.arange(rows + 1, device=grid.device) * (2 * columns))
    return offsets, (code // 2 % columns).int(), (code & 1).bool() & (not cap_at_partial)


def list_blocks(
    pattern: Pattern, grid: Grid, sequences: Sequences, swept: Callable[[Pattern], Tensor]
) -> Iterator[Tensor]:
    """The codes of the non-empty blocks, `[N]` each, in any order, some of them several times; `swept` is `_swept`."""
    rest = []
    for term in written_out(pattern) or [(pattern,)]:
        random = next((part for part in term if type(part) is RandomBlocks), None)
        if random is None:
            rest.append(reduce(and_, term))
        else:
            yield _drawn(random, [part for part in term if part is not random], grid, sequences)
    if rest:
        yield swept(reduce(or_, rest))


def _swept(pattern: Pattern, grid: Grid, sequences: Sequences) -> Tensor:
    """The blocks that are not empty, found by refinement."""
    size, axes = 1, (sequences.rows, grid.q_blocks, grid.kv_blocks)
    # a batch of many rows has many squares even if each row is one
    while prod(axes) > max(MAX_FIRST_SQUARES, sequences.rows):
        size *= CUTS_A_SIDE
        axes = sequences.rows, -(-grid.q_blocks // size), -(-grid.kv_blocks // size)
    squares = torch.cartesian_prod(*(torch.arange(n, device=grid.device) for n in axes)).T
    return _not_empty(squares, size, Classifier(pattern, sequences, grid.kv_len), grid)


def _not_empty(squares: Tensor, size: int, classify: Classifier, grid: Grid) -> Tensor:
    """The blocks that are not empty in squares of `size` blocks a side."""
    state = classify(squares[0], *grid.corners(squares, size))
    kept = (state > EMPTY) & grid.holds(squares, size)
    if size == 1:
        return grid.codes(squares, state == FULL)[kept]
    found = squares[:, kept].split(max(1, MAX_SQUARES_AT_ONCE // CUTS_A_SIDE**2), 1)
    return torch.cat([_not_empty(_cut(some), size // CUTS_A_SIDE, classify, grid) for some in found])


def _cut(squares: Tensor) -> Tensor:
    step = torch.arange(CUTS_A_SIDE, device=squares.device)
    b, i, j = squares[:, :, None, None]
    return torch.stack(torch.broadcast_tensors(b, i * CUTS_A_SIDE + step[:, None], j * CUTS_A_SIDE + step)).flatten(1)


def _drawn(random: RandomBlocks, others: list[Pattern], grid: Grid, sequences: Sequences) -> Tensor:
    """The blocks of pairs that the draws and the `others` hold."""
    size = grid.block_size
    aligned = sequences.start is None and random.size % size == 0 == grid.q_offset % size
    # a block that lies in a drawn one is full of its pairs
    pattern = reduce(and_, others, full() if aligned else random)
    return _not_empty(_touched(random, grid, sequences, aligned), 1, Classifier(pattern, sequences, grid.kv_len), grid)


def _touched(random: RandomBlocks, grid: Grid, sequences: Sequences, aligned: bool) -> Tensor:
    """The blocks that the draws touch, some of them several times."""
    if sequences.start is None:
        first = torch.arange(0, grid.kv_len, random.size, device=grid.device)
        b, x = torch.cartesian_prod(torch.arange(sequences.rows, device=grid.device), first).unbind(1)
        origin = torch.zeros_like(x)
    else:
        position = torch.arange(grid.kv_len, device=grid.device) - sequences.start
        b, x = ((sequences.start >= 0) & (position % random.size == 0)).nonzero(as_tuple=True)
        origin = sequences.start[b, x].long()
    draw, exists = random.draws((x - origin) // random.size)  # [T, count]
    # first query and first key of each draw, [T, count, 1, 1]
    q = (x - grid.q_offset)[:, None, None, None]
    k = (origin[:, None] + draw * random.size)[:, :, None, None]
    reach = random.size // grid.block_size if aligned else (random.size - 1) // grid.block_size + 2
    step = torch.arange(reach, device=grid.device)
    i, j = q // grid.block_size + step[:, None], k // grid.block_size + step
    there = (i * grid.block_size < q + random.size) & (j * grid.block_size < k + random.size)
    there = there & (i >= 0) & (i < grid.q_blocks) & (j < grid.kv_blocks) & exists[:, :, None, None]
    return torch.stack(torch.broadcast_tensors(b[:, None, None, None], i, j))[:, there]
