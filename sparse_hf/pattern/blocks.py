"""The primitives that list blocks: drawn at random, or given as a table."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from .base import Pattern, joint, state, whole
from .lasting import lasting

_BITS_32 = 0xFFFFFFFF
# query blocks of a rectangle whose draws `RandomBlocks.blocks` compares; a rectangle that is taller is PARTIAL
MAX_QUERY_BLOCKS = 16
# rectangles that are compared at once
RECTANGLES_AT_ONCE = 1 << 14
# blocks per side of a square whose pairs fit into the bits of a number
MAX_BLOCKS_PER_SIDE = 6
# matrices of block tables that are kept
TABLES_KEPT = 32


def _signature(pattern: RandomBlocks | BlockTable, q0: Tensor, k0: Tensor, side: int) -> list[Tensor] | None:
    """Where blocks begin in the squares, and which of those that they reach into are held, as bits of one number."""
    count = (side - 1) // pattern.size + 2
    if count > MAX_BLOCKS_PER_SIDE:
        return None
    begin = torch.arange(count, device=q0.device) * pattern.size
    held = pattern.allows((q0[:, None] + begin)[:, :, None], (k0[:, None] + begin)[:, None, :])  # [T, count, count]
    bits = reduce(lambda number, bit: 2 * number + bit, held.flatten(1).unbind(1))
    return [q0 % pattern.size, k0 % pattern.size, bits]


def _mix(x: Tensor) -> Tensor:
    # a 32-bit finaliser in int64; multipliers below 2^31, so that no product overflows
    x = x.long()
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _BITS_32
    x = ((x ^ (x >> 15)) * 0x31848BAB) & _BITS_32
    return x ^ (x >> 16)


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """`count` key blocks of `size` positions per query block, a pure function of (seed, query block).

    Query block b draws from the blocks 0..R-1, where R is the smallest power of two above b: both directions are in reach,
    no sequence length is needed, and growing a sequence changes nothing. The range is cut into `count` strata,
    `[i * R // count, (i + 1) * R // count)`, and one block is drawn from each that is not empty, so that draws are
    distinct. Draws past the end of the sequence, or after the query in a causal model, are absent. After BigBird
    (arXiv:2007.14062, section 2), which draws from the whole of a sequence of known length.

    Examples:
        >>> blocks = RandomBlocks(count=2, size=64, seed=0)
        >>> keys = blocks.allows(torch.tensor(1000), torch.arange(1024))
        >>> int(keys.sum())
        128
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
        return self._range(block), _mix((block & _BITS_32) ^ (self.seed & _BITS_32))

    def _draw(self, begin: tuple[Tensor, Tensor], stratum: Tensor | int) -> tuple[Tensor, Tensor]:
        """The key block that a query block draws from a stratum, and whether the stratum holds any."""
        reach, mixed = begin
        low, high = stratum * reach // self.count, (stratum + 1) * reach // self.count
        number = _mix(_mix(mixed + stratum & _BITS_32) + (self.seed >> 32 & _BITS_32) & _BITS_32)
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
        near = last - first < MAX_QUERY_BLOCKS
        hits = self._hits(*torch.broadcast_tensors(first, last, low, high))
        return state(near & (hits == 0), (first == last) & (hits == high - low + 1))

    def _hits(self, *corners: Tensor) -> Tensor:
        """How many draws of the first `MAX_QUERY_BLOCKS` query blocks lie in each rectangle."""
        first, last = corners[:2]
        # query blocks that the tallest rectangle spans
        tallest = min(MAX_QUERY_BLOCKS, int((last - first).max()) + 1) if len(first) else 1
        step = torch.arange(tallest, device=first.device)[:, None]
        stratum = torch.arange(self.count, device=step.device)
        found = []
        for some in zip(*(corner.reshape(-1).split(RECTANGLES_AT_ONCE) for corner in corners), strict=True):
            first, last, low, high = (corner[:, None, None] for corner in some)
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


@dataclass(frozen=True)
class BlockTable(Pattern):
    """An explicit layout: query block i of `size` positions sees the key blocks `rows[i]`; later query blocks see nothing.

    Examples:
        >>> torch.where(BlockTable(2, ((0,), (0, 1))).allows(torch.tensor(3), torch.arange(8)))[0].tolist()
        [0, 1, 2, 3]
    """

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

    def on(self, device):
        bound = copy.copy(self)
        # not a field: equality and the text form know nothing of it
        object.__setattr__(bound, "_matrix", _block_matrix(self, str(device)))
        return bound

    def allows(self, q, k, marks=None):
        table = getattr(self, "_matrix", None)
        if table is None:
            table = _block_matrix(self, str(q.device))
        block, key = q // self.size, k // self.size
        inside = (block < table.shape[0]) & (key < table.shape[1])
        return inside & table[block.clamp(max=table.shape[0] - 1), key.clamp(max=table.shape[1] - 1)]

    def blocks(self, q0, q1, k0, k1, marks=None):
        # listed blocks in a rectangle, from the table of running sums
        sums = _running_sums(self, str(q0.device))
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
        matrix = _block_matrix(self, str(q.device))
        # from each query block on, which key blocks are still listed
        later = matrix.flip(0).cummax(0).values.flip(0)
        block, key = q // self.size, k // self.size
        inside = (block < later.shape[0]) & (key < later.shape[1])
        return inside & later[block.clamp(max=later.shape[0] - 1), key.clamp(max=later.shape[1] - 1)]

    @property
    def grain(self) -> int:
        return self.size


@lru_cache(maxsize=TABLES_KEPT)
def _block_matrix(table: BlockTable, device: str) -> Tensor:
    """The table as a bool matrix `[query blocks, key blocks]`, at least 1 x 1."""
    columns = 1 + max((row[-1] for row in table.rows if row), default=0)
    with lasting():
        matrix = torch.zeros(max(1, len(table.rows)), columns, dtype=torch.bool, device="cpu")
        for i, row in enumerate(table.rows):
            matrix[i, list(row)] = True
        return matrix.to(device)


@lru_cache(maxsize=TABLES_KEPT)
def _running_sums(table: BlockTable, device: str) -> Tensor:
    """Listed blocks above and left of each corner, `[query blocks + 1, key blocks + 1]`."""
    with lasting():
        sums = _block_matrix(table, device).long().cumsum(0).cumsum(1)
        return torch.nn.functional.pad(sums, (1, 0, 1, 0))
