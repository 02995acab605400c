"""The primitives that list blocks: drawn at random, given as a table, or chosen per head."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from .base import Pattern, joint, state, whole

_WORD = 0xFFFFFFFF
# `RandomBlocks.blocks` looks at the draws of at most this many query blocks and calls the rest PARTIAL
LOOK = 16
# rectangles that it looks at together
PIECE = 1 << 14
# blocks per side of a square whose pairs fit into the bits of a number
MOST_BLOCKS = 6


def _signature(pattern: RandomBlocks | BlockTable, q0: Tensor, k0: Tensor, side: int) -> list[Tensor] | None:
    """Where blocks begin in the squares, and which of those that they reach into are held, as bits of one number."""
    count = (side - 1) // pattern.size + 2
    if count > MOST_BLOCKS:
        return None
    begin = torch.arange(count, device=q0.device) * pattern.size
    held = pattern.allows((q0[:, None] + begin)[:, :, None], (k0[:, None] + begin)[:, None, :])  # [T, count, count]
    bits = reduce(lambda number, bit: 2 * number + bit, held.flatten(1).unbind(1))
    return [q0 % pattern.size, k0 % pattern.size, bits]


def _mix(x: Tensor) -> Tensor:
    # a 32-bit finaliser in int64; multipliers below 2^31, so that no product overflows
    x = x.long()
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x31848BAB) & _WORD
    return x ^ (x >> 16)


@dataclass(frozen=True, repr=False)
class RandomBlocks(Pattern):
    """`count` key blocks of `size` positions per query block, a pure function of (seed, query block).

    Query block b draws from the blocks 0..R-1, where R is the smallest power of two above b: both directions are in reach,
    no sequence length is needed, and growing a sequence changes nothing. The range is cut into `count` strata,
    `[i * R // count, (i + 1) * R // count)`, and one block is drawn from each that is not empty, so that draws are
    distinct. Draws past the end of the sequence, or after the query in a causal model, are absent. After BigBird
    (arXiv:2007.14062, section 2), which draws from the whole of a sequence of known length.
    """

    count: int
    size: int
    seed: int = 0
    word = "random_blocks"

    def __post_init__(self):
        whole("random_blocks: count", self.count, 1)
        whole("random_blocks: size", self.size, 1)
        whole("random_blocks: seed", self.seed, 0)

    def _range(self, block: Tensor) -> Tensor:
        """Smallest power of two above `block`: the bits below its highest are filled, then one is added."""
        block = block.long()  # kernels count in int32
        for shift in (1, 2, 4, 8, 16, 32):
            block = block | (block >> shift)
        return block + 1

    def _begin(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """What all draws of a query block share: the range they are from, and the number that each mixes its own from."""
        return self._range(block), _mix((block & _WORD) ^ (self.seed & _WORD))

    def _draw(self, begin: tuple[Tensor, Tensor], stratum: Tensor | int) -> tuple[Tensor, Tensor]:
        """The key block that a query block draws from a stratum, and whether the stratum holds any."""
        reach, mixed = begin
        low, high = stratum * reach // self.count, (stratum + 1) * reach // self.count
        number = _mix(_mix(mixed + stratum & _WORD) + (self.seed >> 32 & _WORD) & _WORD)
        return low + number % (high - low).clamp(min=1), high > low

    def draws(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The key blocks that query blocks `[T]` draw, and whether there is such a draw: `[T, count]`."""
        return self._draw(self._begin(block[:, None]), torch.arange(self.count, device=block.device))

    def allows(self, q, k, marks=None):
        block, key = q // self.size, k // self.size
        begin, allowed = self._begin(block), ~joint(q, k)
        # a draw belongs to the query alone, so that numbers are mixed once a query and not once a pair
        for stratum in range(self.count):
            draw, exists = self._draw(begin, stratum)
            allowed = allowed | (torch.where(exists, draw, -1) == key)
        return allowed

    def blocks(self, q0, q1, k0, k1, marks=None):
        first, last = q0 // self.size, q1 // self.size
        low, high = k0 // self.size, k1 // self.size
        near = last - first < LOOK
        hits = self._hits(*torch.broadcast_tensors(first, last, low, high))
        return state(near & (hits == 0), (first == last) & (hits == high - low + 1))

    def _hits(self, *corners: Tensor) -> Tensor:
        """How many draws of the first `LOOK` query blocks lie in each rectangle, a piece of them at a time."""
        first, last = corners[:2]
        # rows of blocks that the tallest rectangle spans
        look = min(LOOK, int((last - first).max()) + 1) if len(first) else 1
        step = torch.arange(look, device=first.device)[:, None]
        stratum = torch.arange(self.count, device=step.device)
        found = []
        for piece in zip(*(corner.reshape(-1).split(PIECE) for corner in corners), strict=True):
            first, last, low, high = (corner[:, None, None] for corner in piece)
            draw, exists = self._draw(self._begin(first + step), stratum)
            found.append((exists & (first + step <= last) & (draw >= low) & (draw <= high)).sum((1, 2)))
        return torch.cat(found).view(corners[0].shape)

    def signature(self, q0, k0, side, marks=None):
        return _signature(self, q0, k0, side)

    def reachable(self, k, q):
        return joint(q, k)

    @property
    def grain(self) -> int:
        return self.size


@dataclass(frozen=True, repr=False)
class BlockTable(Pattern):
    """An explicit layout: query block i of `size` positions sees the key blocks `rows[i]`; later query blocks see nothing."""

    size: int
    rows: tuple[tuple[int, ...], ...]
    word = "block_table"

    def __post_init__(self):
        whole("block_table: size", self.size, 1)
        if not isinstance(self.rows, (tuple, list)) or not all(isinstance(row, (tuple, list)) for row in self.rows):
            raise ValueError(
                f"block_table: rows is {self.rows!r}; it must hold one tuple of key blocks per query block"
            )
        rows = tuple(tuple(sorted({whole("block_table: a key block", j, 0) for j in row})) for row in self.rows)
        object.__setattr__(self, "rows", rows)

    def on(self, device) -> BlockTable:
        bound = copy.copy(self)
        # not a field: equality and the text form know nothing of it
        object.__setattr__(bound, "bound", _layout(self, str(device)))
        return bound

    def allows(self, q, k, marks=None):
        table = self.bound if hasattr(self, "bound") else _layout(self, str(q.device))
        block, key = q // self.size, k // self.size
        inside = (block < table.shape[0]) & (key < table.shape[1])
        return inside & table[block.clamp(max=table.shape[0] - 1), key.clamp(max=table.shape[1] - 1)]

    def blocks(self, q0, q1, k0, k1, marks=None):
        # listed blocks in a rectangle, from the table of running sums
        sums = _running(self, str(q0.device))
        first, last = (q0 // self.size, q1 // self.size)
        low, high = (k0 // self.size, k1 // self.size)
        rows, columns = sums.shape[0] - 1, sums.shape[1] - 1
        a, b = first.clamp(max=rows), (last + 1).clamp(max=rows)
        c, d = low.clamp(max=columns), (high + 1).clamp(max=columns)
        listed = sums[b, d] - sums[a, d] - sums[b, c] + sums[a, c]
        return state(listed == 0, listed == (last - first + 1) * (high - low + 1))

    def signature(self, q0, k0, side, marks=None):
        return _signature(self, q0, k0, side)

    def reachable(self, k, q):
        layout = _layout(self, str(q.device))
        # from each query block on, which key blocks are still listed
        later = layout.flip(0).cummax(0).values.flip(0)
        block, key = q // self.size, k // self.size
        inside = (block < later.shape[0]) & (key < later.shape[1])
        return inside & later[block.clamp(max=later.shape[0] - 1), key.clamp(max=later.shape[1] - 1)]

    @property
    def grain(self) -> int:
        return self.size


@lru_cache(maxsize=32)
def _layout(table: BlockTable, device: str) -> Tensor:
    """The table as a bool matrix `[query blocks, key blocks]`, at least 1 x 1."""
    columns = 1 + max((row[-1] for row in table.rows if row), default=0)
    layout = torch.zeros(max(1, len(table.rows)), columns, dtype=torch.bool)
    for i, row in enumerate(table.rows):
        layout[i, list(row)] = True
    return layout.to(device)


@lru_cache(maxsize=32)
def _running(table: BlockTable, device: str) -> Tensor:
    sums = _layout(table, device).long().cumsum(0).cumsum(1)
    return torch.nn.functional.pad(sums, (1, 0, 1, 0))


class PerHead(Pattern):
    """One pattern per head; outermost only."""

    word = "per_head"

    def __init__(self, *patterns: Pattern):
        if not patterns:
            raise ValueError("per_head needs one pattern per head, and got none")
        for pattern in patterns:
            if not isinstance(pattern, Pattern):
                raise TypeError(f"per_head: {pattern!r} is not a pattern")
            if pattern.heads is not None:
                raise TypeError("per_head stands outermost and does not nest")
            if pattern.uses_content:
                raise ValueError(
                    f"per_head holds {pattern}, which draws directions of its own for each head; use it alone"
                )
        self._heads = patterns

    @property
    def heads(self) -> tuple[Pattern, ...]:
        return self._heads

    @property
    def marked_sides(self) -> tuple[bool, bool]:
        return tuple(map(any, zip(*(p.marked_sides for p in self._heads), strict=True)))

    @property
    def uses_length(self) -> bool:
        return any(p.uses_length for p in self._heads)

    @property
    def grain(self) -> int:
        return math.gcd(*(p.grain for p in self._heads))

    def allows(self, q, k, marks=None):
        raise TypeError("per_head is one pattern per head; ask those in .heads")

    def blocks(self, q0, q1, k0, k1, marks=None):
        raise TypeError("per_head is one pattern per head; ask those in .heads")

    def reachable(self, k, q):
        seen = [p.reachable(k, q) for p in self._heads]
        return torch.stack(torch.broadcast_tensors(*seen)).any(0)

    def __eq__(self, other) -> bool:
        return isinstance(other, PerHead) and self._heads == other._heads

    def __hash__(self) -> int:
        return hash((PerHead, self._heads))

    def __repr__(self) -> str:
        return f"per_head({', '.join(map(str, self._heads))})"

    def __setattr__(self, name, value):
        if hasattr(self, "_heads"):
            raise AttributeError(f"a pattern is frozen; cannot set {name!r}")
        super().__setattr__(name, value)
