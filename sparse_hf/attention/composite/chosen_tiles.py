"""Blocks that groups of queries choose, as a plan in tiles: pairs of positions and chosen ones in one table for each head.

Backends of tables of blocks run it like any other plan whose heads have patterns of their own.

Legend: B batch, H query heads, C heads of the choice, each with a table, Q queries, K keys; Nq and Nk tiles of queries and of keys, T
groups of queries, c blocks of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...pattern import EMPTY, FULL, Pattern
from ...pattern.base import Marks, joint
from ...plan import BlockPlan
from ...plan.cache import kept, remembered
from ...plan.tile_lists import TileLists
from ..backend import AttentionCall
from .chosen_blocks import Groups
from .chosen_lists import Flags, Kinds, find_kinds, flags_of, may_list

# tokens of a tile: the most where kernels run and elsewhere, and the least that tables are worth it for
KERNEL_TILE, PLAIN_TILE, LEAST_TILE = 64, 128, 16


@dataclass(frozen=True)
class Listed(Pattern, has_word=False):
    """Stands where a plan says its patterns: no form in positions is read of it, and `ChosenTiles` says its pairs.

    Args:
        parts: the patterns of positions, and of what may be chosen.
        is_aligned: is each tile of the plan chosen as a whole or not at all?
    """

    parts: tuple[Pattern, ...]
    is_aligned: bool = True

    def allows(self, q, k, marks=None):
        raise AssertionError("a plan of chosen tiles says its pairs itself")

    def blocks(self, q0, q1, k0, k1, marks=None):
        return torch.ones_like(q0 + k0, dtype=torch.int8)

    def reachable(self, k, q):
        return joint(q, k)

    @property
    def marks_add(self) -> bool:
        # without marks there would be other tables
        return False

    def on(self, device):
        return Listed(tuple(part.on(device) for part in self.parts), self.is_aligned)

    def signature(self, q0: Tensor, k0: Tensor, side: int, marks: Marks | None = None) -> list[Tensor] | None:
        if not self.is_aligned:
            return None
        found = [part.signature(q0, k0, side, marks) for part in self.parts]
        known = [numbers for numbers in found if numbers is not None]
        return [number for numbers in known for number in numbers] if len(known) == len(found) else None


@dataclass(frozen=True, eq=False)
class ChosenTiles(BlockPlan):
    """Tiles of positions, the same for all heads, and tiles that a head or a group of heads chose, whose pairs are those of the cut.

    Attributes:
        beside: the plan of positions.
        cut: the plan of the pairs that may be chosen.
        found: the blocks of each group, `[B, C, T, c]`, -1 for none.
        tiles: tiles of a group of queries, and of a block of keys.
    """

    beside: BlockPlan | None = None
    cut: BlockPlan | None = None
    found: Tensor | None = None
    tiles: tuple[int, int] = (1, 1)

    @kept
    def codes(self) -> Tensor:
        """Of chosen tiles, `((b * C + c) * Nq + i) * Nk + j`, ascending."""
        assert self.found is not None and self.cut is not None
        of_group, of_block = self.tiles
        i = torch.arange(self.q_blocks, device=self.device)
        # a tile of queries lies in one group
        block = self.found[:, :, (i + self.shift) // of_group]  # [B, C, Nq, c]
        j = (block * of_block)[..., None] + torch.arange(of_block, device=self.device)
        there = (block >= 0)[..., None] & (j < self.kv_blocks)
        row = torch.arange(self.batch_rows * len(self.patterns), device=self.device).view(len(block), -1, 1, 1, 1)
        codes = ((row * self.q_blocks + i[:, None, None]) * self.kv_blocks + j)[there].unique()
        return codes[self.state_of(codes, self.cut.patterns[0]) != EMPTY]

    @property
    def shift(self) -> int:
        """Tiles of the first group that come before the first query."""
        return self.q_offset // self.block_size % self.tiles[0]

    def own_lists(self, size: int) -> TileLists | None:
        kinds = self._kinds if size == self.block_size else None
        if kinds is None:
            return None
        assert self.found is not None
        make = partial(flags_of, self.found, -(-self.kv_blocks // self.tiles[1]))
        heads_of_table = len(self.heads) // len(self.patterns)
        return Flags(make, self.tiles, self.shift, heads_of_table).lists(kinds, self.found.shape[-1] * self.tiles[1])

    @property
    def _kinds(self) -> Kinds | None:
        """What positions say of tiles; None where lists are made of tables."""
        if not may_list(self.device):
            return None
        assert self.beside is not None and self.cut is not None
        return find_kinds(self.beside, self.cut.patterns[0])

    @property
    def is_bare(self) -> bool:
        return False

    def _is_chosen(self, row: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Is a tile, by its row of tables (without i) and its place, a chosen one?"""
        return is_among((row * self.q_blocks + i) * self.kv_blocks + j, self.codes)

    def chosen(self, b: Tensor, h: Tensor | int, q: Tensor, k: Tensor) -> Tensor:
        """Did query q choose key k, by the table h?"""
        assert self.cut is not None
        row, i, j = torch.broadcast_tensors(b * len(self.patterns) + h, q // self.block_size, k // self.block_size)
        return self._is_chosen(row, i, j) & self.cut.allows(b, 0, q, k)

    def allows(self, b: Tensor, p: Tensor | int, q: Tensor, k: Tensor) -> Tensor:
        assert self.beside is not None
        return self.beside.allows(b, 0, q, k) | self.chosen(b, p, q, k)

    def tile_numbers(self, group: Tensor, i: Tensor, j: Tensor) -> list[Tensor]:
        return [self._is_chosen(group, i, j).long()]

    @kept
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.beside is not None
        lines, columns = self.q_blocks, self.kv_blocks
        heads, rows = len(self.patterns), self.batch_rows * len(self.patterns)
        counts = self.beside.row_offsets.diff()
        line = torch.arange(len(counts), device=self.device).repeat_interleave(counts)
        held = (line % lines * columns + self.beside.columns) * 2 + self.beside.full
        # the rows of this table that a row of the other stands for: all, or the heads of a batch row
        own = torch.arange(rows if self.beside.batch_rows == 1 else heads, device=self.device)
        held = ((own[:, None] + line // lines * heads) * (lines * columns * 2) + held).flatten()
        code = torch.cat([held, self.codes * 2 + self._is_full(self.codes)]).unique()
        # of a tile that is listed as partial and as full the last is the full one
        code = code[(code >> 1).diff(append=code.new_full((1,), -1)) != 0]
        offsets = torch.searchsorted(code, torch.arange(rows * lines + 1, device=self.device) * (2 * columns))
        return offsets, (code // 2 % columns).int(), (code & 1).bool()

    def _is_full(self, codes: Tensor) -> Tensor:
        assert self.cut is not None
        return self.state_of(codes, self.cut.patterns[0]) == FULL

    def state_of(self, codes: Tensor, pattern: Pattern) -> Tensor:
        """What a pattern of positions says of tiles."""
        size, columns = self.block_size, self.kv_blocks
        q, k = codes // columns % self.q_blocks * size, codes % columns * size
        q1, k1 = (q + size).clamp(max=self.q_len) - 1, (k + size).clamp(max=self.kv_len) - 1
        offset = self.q_offset
        return pattern.blocks(q + offset, q1 + offset, k, k1, Marks(length=self.kv_len))


def is_among(codes: Tensor, known: Tensor) -> Tensor:
    """Which of the codes are among `known`, which ascend?"""
    if not len(known):
        return torch.zeros_like(codes, dtype=torch.bool)
    return known[torch.searchsorted(known, codes.contiguous()).clamp(max=len(known) - 1)] == codes


@remembered
def in_tiles(plan: BlockPlan, tile: int) -> BlockPlan:
    """The plan in blocks of another size, whose tables are made once."""
    return replace(plan, block_size=tile)


def largest_tile(device: torch.device) -> int:
    return KERNEL_TILE if may_list(device) else PLAIN_TILE


def chosen_tiles(call: AttentionCall, groups: Groups) -> ChosenTiles | None:
    """The plan of a choice; None where blocks or groups do not begin where tiles do."""
    positions, content = groups.rest.positions, groups.content
    tile = math.gcd(content.size, content.queries, largest_tile(call.q.device))
    if tile < LEAST_TILE or not positions.is_bare or positions.sequences.marks is not None or positions.q_offset % tile:
        return None
    batch, heads = call.q.shape[:2]
    tables = call.k.shape[1] if content.shares_heads else heads
    beside, cut = in_tiles(positions, tile), replace(groups.rest.cut, block_size=tile)
    return ChosenTiles(
        patterns=(Listed((beside.patterns[0], cut.patterns[0])),) * tables,
        heads=tuple(h * tables // heads for h in range(heads)), q_len=positions.q_len, kv_len=positions.kv_len,
        q_offset=positions.q_offset, block_size=tile, batch_rows=batch, sequences=positions.sequences,
        device=positions.device, beside=beside, cut=cut, found=groups.choose(call.q, call.k),
        tiles=(content.queries // tile, content.size // tile),
    )  # fmt: skip
