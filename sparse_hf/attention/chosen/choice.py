"""What is chosen for each query: keys, or blocks of keys of which those of a band of distances are seen.

Legend: B batch, H query heads, G key heads, Q queries, K keys; C heads of the choice, N chosen keys of a query, at most; c chosen blocks
of a query, of S keys each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """Keys that are at least `near` and at most `far` tokens before a query, and not among the `first`."""

    near: int
    far: int
    first: int


EVERY_KEY = Band(0, 0, 0)


@dataclass(frozen=True, eq=False)
class ChosenKeys:
    """The keys of each query, `[B or 1, C, Q, N]` with C one of 1, G and H; below 0 is none.

    With `size` above 1, each `size` places side by side are one block of keys, in order, that begins at a multiple of `size`.
    """

    index: Tensor
    size: int = 1
    # keys of a number in the table, and where the first query is, which nobody asks for where each key is named
    per_entry: ClassVar[int] = 1
    offset: ClassVar[int] = 0
    band: ClassVar[Band] = EVERY_KEY

    @property
    def table(self) -> Tensor:
        """What kernels read, int32."""
        return self.index.int().contiguous()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B or 1, C, Q and N."""
        batch, heads, queries, chosen = self.index.shape
        return batch, heads, queries, chosen

    @property
    def blocks(self) -> Tensor:
        """The block of each `size` places, `[B or 1, C, Q, N / size]`, below 0 for none."""
        last = self.table.unflatten(-1, (-1, self.size)).amax(-1)
        return last.where(last < 0, last // self.size)

    def of_queries(self, queries: slice) -> ChosenKeys:
        """The choice of some queries, side by side."""
        return replace(self, index=self.index[:, :, queries])

    def keys(self, rows: int | slice, heads: Tensor | slice, queries: Tensor | slice) -> Tensor:
        """The keys of some queries of some heads of batch rows, or of one, `[..., heads, m, N]`, below 0 for none."""
        return self.index[rows][..., heads, :, :][..., queries, :]

    def as_mask(self, keys: int, queries: Tensor | slice = slice(None)) -> Tensor:
        """The choice of some queries as pairs, `[B or 1, C, m, K]` bool: n x n, for weights that somebody wants to see."""
        return _as_mask(self.keys(slice(None), slice(None), queries), keys)


@dataclass(frozen=True, eq=False)
class ChosenBlocks:
    """The blocks of each query, `[B, C, Q, c]` int32 with C one of G and H, of which it sees what is in a band; below 0 is none.

    A block x has the keys from `x * size` up to, without, `(x + 1) * size`, as far as there are so many. Which of them a query sees is
    known from their numbers: no key is written out but for whom asks.

    Args:
        size: S, above 1.
        offset: key index of the first query.
        length: K.
    """

    blocks: Tensor
    size: int
    band: Band
    offset: int
    length: int

    @property
    def per_entry(self) -> int:
        """Keys of a number in the table."""
        return self.size

    @property
    def table(self) -> Tensor:
        """What kernels read, int32."""
        return self.blocks.contiguous()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, C, Q and N."""
        batch, heads, queries, count = self.blocks.shape
        return batch, heads, queries, count * self.size

    @property
    def index(self) -> Tensor:
        """The keys of all queries, `[B, C, Q, N]` int32, -1 for none."""
        return self.keys(slice(None), slice(None), slice(None))

    def of_queries(self, queries: slice) -> ChosenBlocks:
        """The choice of some queries, side by side."""
        return replace(self, blocks=self.blocks[:, :, queries], offset=self.offset + (queries.start or 0))

    def keys(self, rows: int | slice, heads: Tensor | slice, queries: Tensor | slice) -> Tensor:
        """The keys of some queries of some heads of batch rows, or of one, `[..., heads, m, N]` int32, -1 for none."""
        block, device = self.blocks[rows][..., heads, :, :][..., queries, :], self.blocks.device
        place = torch.arange(self.blocks.shape[2], dtype=torch.int32, device=device)[queries] + self.offset
        key = (block[..., None] * self.size + torch.arange(self.size, dtype=torch.int32, device=device)).flatten(-2)
        behind = place[:, None] - key
        # none of the keys of a block below 0 is a key
        there = (key >= self.band.first) & (key < self.length) & (behind >= self.band.near) & (behind <= self.band.far)
        return key.masked_fill_(~there, -1)

    def as_mask(self, keys: int, queries: Tensor | slice = slice(None)) -> Tensor:
        """The choice of some queries as pairs, `[B, C, m, K]` bool: n x n, for weights that somebody wants to see."""
        return _as_mask(self.keys(slice(None), slice(None), queries), keys)


Choice = ChosenKeys | ChosenBlocks


def _as_mask(index: Tensor, keys: int) -> Tensor:
    mask = torch.zeros(*index.shape[:3], keys + 1, dtype=torch.bool, device=index.device)
    return mask.scatter_(-1, torch.where(index < 0, keys, index).long(), True)[..., :keys]
