"""From a pattern to the list of its non-empty blocks, by refinement.

Coarse squares of the (query, key) plane are classified with the pattern's closed form `blocks`; empty ones are dropped,
the others are cut in four, down to the block size. The work is proportional to what is found, never to n^2.

Legend: b batch row, i query block, j key block; q0..q1 and k0..k1 are inclusive corners in key coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pattern import EMPTY, FULL, PARTIAL, Pattern
from ..pattern.base import Marks
from .layout import Layout

# blocks per side of the coarsest squares, and how many blocks one sweep may list at most if all were full
COARSE = 64
SWEEP = 1 << 22
# squares that cost no more to look at than a few
FEW = 1 << 12


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


def list_blocks(
    pattern: Pattern, grid: Grid, layout: Layout, batch_rows: int, device, cap_at_partial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The non-empty blocks in row-major order.

    Returns `row = b * q_blocks + i` and `column = j` (int64) and `full` (bool), one entry per block.
    """
    classify = Classifier(pattern, layout, grid.kv_len)
    size = _coarsest(grid, batch_rows)
    strips, wide = -(-grid.q_blocks // size), size * grid.kv_blocks
    step = max(1, SWEEP // max(1, wide))
    # batch rows go together if one sweep takes more than a row
    at_once = max(1, SWEEP // max(1, wide * strips))
    found = []
    for b in range(0, batch_rows, at_once):
        together = range(b, min(b + at_once, batch_rows))
        for strip in range(0, strips, step):
            some = range(strip, min(strip + step, strips))
            found.append(_refine(classify, grid, (together, some, size), device, cap_at_partial))
    if not found:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return nothing, nothing, nothing.bool()
    rows, columns, full = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, columns, full


def _coarsest(grid: Grid, batch_rows: int) -> int:
    """Blocks per side of the squares to begin with: so few blocks that they are looked at one by one need no squares."""
    size = COARSE
    while size > 1 and batch_rows * -(-2 * grid.q_blocks // size) * -(-2 * grid.kv_blocks // size) <= FEW:
        size //= 2
    return size


def _refine(classify: Classifier, grid: Grid, begin: tuple[range, range, int], device, cap_at_partial: bool):
    rows, strips, size = begin
    j = range(-(-grid.kv_blocks // size))
    axes = (torch.arange(axis.start, axis.stop, device=device) for axis in (rows, strips, j))
    b, i, j = (side.reshape(-1) for side in torch.meshgrid(*axes, indexing="ij"))
    while True:
        state = classify(b, *grid.corners(i, j, size))
        kept = state > EMPTY
        b, i, j, state = b[kept], i[kept], j[kept], state[kept]
        if size == 1:
            break
        size //= 2
        b = b.repeat_interleave(4)
        i = torch.stack((2 * i, 2 * i, 2 * i + 1, 2 * i + 1), 1).reshape(-1)
        j = torch.stack((2 * j, 2 * j + 1, 2 * j, 2 * j + 1), 1).reshape(-1)
        exists = (i * size < grid.q_blocks) & (j * size < grid.kv_blocks)
        b, i, j = b[exists], i[exists], j[exists]
    row = b * grid.q_blocks + i
    order = (row * grid.kv_blocks + j).argsort()
    full = (state == FULL) & (not cap_at_partial)
    return row[order], j[order], full[order]


def list_tables(
    patterns: tuple[Pattern, ...], grid: Grid, layout: Layout, batch_rows: int, cap_at_partial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of a `BlockPlan`: row offsets, columns, full."""
    # [B * P * Nq] rows: pattern by pattern, then interleaved by sorting on the joint row number
    rows, columns, full = [], [], []
    layout_rows = layout.rows
    for p, pattern in enumerate(patterns):
        row, column, is_full = list_blocks(pattern, grid, layout, layout_rows, "cpu", cap_at_partial)
        repeats = batch_rows // layout_rows
        for copy in range(repeats):
            b, i = row // max(1, grid.q_blocks) + copy, row % max(1, grid.q_blocks)
            rows.append((b * len(patterns) + p) * grid.q_blocks + i)
            columns.append(column)
            full.append(is_full)
    row, column, is_full = torch.cat(rows), torch.cat(columns), torch.cat(full)
    if len(rows) > 1:
        order = row.argsort(stable=True)
        row, column, is_full = row[order], column[order], is_full[order]
    counts = torch.bincount(row, minlength=batch_rows * len(patterns) * grid.q_blocks)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), column.int(), is_full
