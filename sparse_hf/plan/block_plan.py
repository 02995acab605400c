"""`BlockPlan`: the waist between patterns and backends.

Legend: B batch rows (1 when all are alike), P distinct patterns (1 unless heads differ), Nq query blocks, N listed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..pattern import Pattern
from ..pattern.base import Marks
from .cache import kept
from .classify import Grid, list_tables
from .sequences import Sequences

# blocks of queries and of keys, of all batch rows, beyond which a GPU lists them sooner than a CPU
MAX_BLOCKS_LISTED_BY_CPU = 1 << 12
# a mask function of Transformers: (batch, head, query, key) index tensors -> bool tensor
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """Key blocks `first..last` (inclusive) that stand side by side in one query block, and which of them are partial.

    `partial` holds inclusive block ranges within the run; the rest of the run is full.
    """

    first: int
    last: int
    partial: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Which key blocks each query block attends to, as compact tables: O(non-empty blocks), never O(n^2).

    They are listed when they are first asked for, since not every backend asks. `row_offsets` is `[B * P * Nq + 1]` int64,
    `columns` `[N]` int32 and `full` `[N]` bool: query block i of batch row b under pattern p owns the entries
    `row_offsets[r] : row_offsets[r + 1]` with table row `r = (b * P + p) * Nq + i`, in ascending order of key block. Partial
    blocks are evaluated with `allows`. `heads[h]` is the pattern of head h; it is empty when all heads share one.

    Examples:
        >>> from sparse_hf import build_plan
        >>> plan = build_plan("window(128, 0)", 1024, block_size=128)
        >>> len(plan.columns), bool(plan.full.any())
        (15, False)
    """

    patterns: tuple[Pattern, ...]
    heads: tuple[int, ...]
    q_len: int
    kv_len: int
    q_offset: int
    block_size: int
    batch_rows: int
    sequences: Sequences
    mask_function: MaskFunction | None = None
    device: torch.device = torch.device("cpu")

    def __post_init__(self):
        # heads may share one
        moved = {key: p.on(self.device) for key, p in {id(p): p for p in self.patterns}.items()}
        object.__setattr__(self, "patterns", tuple([moved[id(p)] for p in self.patterns]))

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_size)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_size)

    @property
    def is_bare(self) -> bool:
        """Do all heads share one pattern, and is nothing said of the batch but perhaps which tokens are marked?"""
        said = self.sequences.start, self.sequences.real, self.mask_function
        return len(self.patterns) == 1 and all(one is None for one in said)

    @kept
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        # their making is many steps, which take a GPU as long for a short text as for a long one
        is_much = self.sequences.rows * (self.q_blocks + self.kv_blocks) > MAX_BLOCKS_LISTED_BY_CPU
        device = self.device if is_much else torch.device("cpu")
        patterns = tuple(p.on(device) for p in self.patterns)
        grid = Grid(self.q_len, self.kv_len, self.q_offset, self.block_size, device)
        offsets, columns, full = list_tables(
            patterns, grid, self.sequences.to(device), self.batch_rows, self.mask_function is not None
        )
        return offsets.to(self.device), columns.to(self.device), full.to(self.device)

    @property
    def row_offsets(self) -> Tensor:
        return self._tables[0]

    @property
    def columns(self) -> Tensor:
        return self._tables[1]

    @property
    def full(self) -> Tensor:
        return self._tables[2]

    def to(self, device: torch.device | str) -> BlockPlan:
        device = torch.device(device)
        return self if device == self.device else replace(self, sequences=self.sequences.to(device), device=device)

    def allows(self, b: Tensor, p: Any, q: Tensor, k: Tensor) -> Tensor:
        """Element by element: may query q see key k? Indices (not positions) that broadcast; `b` is the batch row.

        `p` is the number of a pattern; where several are one pattern, a tensor of numbers may be, which broadcasts too.

        Nothing here depends on tensor values, so that a compiled kernel can trace it.
        """
        x = q + self.q_offset
        sequences, pattern = self.sequences, self.patterns[p if isinstance(p, int) else 0]
        row = b if sequences.rows > 1 else torch.zeros_like(b)
        marks = Marks(length=self.kv_len)
        if sequences.marks is not None and pattern.uses_marks:
            marks = marks._replace(q=sequences.marks[row, x], k=sequences.marks[row, k])
        if sequences.start is None or sequences.end is None:
            allowed = pattern.allows(x, k, marks)
        else:
            origin, key_origin = sequences.start[row, x], sequences.start[row, k]
            if pattern.uses_length:
                marks = marks._replace(length=sequences.end[row, x] + 1 - origin)
            allowed = (origin == key_origin) & (origin >= 0)
            # outside a shared sequence positions mean nothing, but they stay non-negative
            allowed = allowed & pattern.allows(x - origin, k - key_origin, marks)
        if sequences.real is not None:
            allowed = allowed & sequences.real[row, x] & sequences.real[row, k]
        if self.mask_function is not None:
            allowed = allowed & self.mask_function(b, torch.zeros_like(b), x, k)
        return allowed

    def tile_numbers(self, group: Tensor, i: Tensor, j: Tensor) -> list[Tensor]:
        """What tells apart tiles whose pairs the patterns' signatures do not, `[T]` each, by their row of tables and place."""
        return []

    def own_lists(self, size: int) -> Any:
        """The `TileLists` of a plan that has them without its tables, in tiles of `size`; None: they are made of the tables."""
        return None

    def query_index(self, b: int, first: int, last: int) -> Tensor:
        """Indices of the queries `first..last` (end exclusive), counted from the plan's first query."""
        return torch.arange(first, last, device=self.device)

    def key_index(self, b: int, first: int, last: int) -> Tensor:
        """Indices of the keys `first..last` (end exclusive)."""
        return torch.arange(first, last, device=self.device)

    def mask(self, b: int, p: int, q_range: tuple[int, int], k_range: tuple[int, int]) -> Tensor:
        """`allows` on a rectangle of indices (ends exclusive): `[queries, keys]` bool."""
        q = torch.arange(*q_range, device=self.device)[:, None]
        k = torch.arange(*k_range, device=self.device)[None, :]
        row = torch.full((1, 1), b, device=self.device)
        return self.allows(row, p, q, k).expand(q.shape[0], k.shape[1])

    def block_range(self, first: int, last: int, length: int) -> tuple[int, int]:
        """Indices (end exclusive) that the blocks `first..last` cover."""
        return first * self.block_size, min((last + 1) * self.block_size, length)

    @kept
    def runs(self) -> list[list[Run]]:
        """Per table row, its key blocks as runs of neighbours: what a backend that takes slices loops over."""
        columns, offsets = self.columns.tolist(), self.row_offsets.tolist()
        full = self.full.tolist()
        return [list(as_runs(columns[a:b], full[a:b])) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]

    def table_rows(self) -> Iterator[tuple[int, int, int, list[Run]]]:
        """Batch row, pattern, query block and runs of every table row."""
        for row, runs in enumerate(self.runs):
            (b, p), i = divmod(row // self.q_blocks, len(self.patterns)), row % self.q_blocks
            yield b, p, i, runs

    def row_counts(self) -> Tensor:
        """Keys per query, `[B, P, Q]` int64: exact, block by block."""
        counts = torch.zeros(self.batch_rows, len(self.patterns), self.q_len, dtype=torch.int64, device="cpu")
        for b, p, i, runs in self.table_rows():
            q_range = self.block_range(i, i, self.q_len)
            into = counts[b, p, slice(*q_range)]
            for run in runs:
                into += _length(self.block_range(run.first, run.last, self.kv_len))
                for first, last in run.partial:
                    k_range = self.block_range(first, last, self.kv_len)
                    into += self.mask(b, p, q_range, k_range).sum(1).cpu() - _length(k_range)
        return counts

    @kept
    def pairs(self) -> int:
        """Number of (query, key) pairs over all batch rows and distinct patterns of the plan."""
        return int(self.row_counts().sum())

    @property
    def density(self) -> float:
        """Share of all pairs that the plan holds."""
        everything = self.q_len * self.kv_len * self.batch_rows * len(self.patterns)
        return self.pairs / everything if everything else 0.0

    def to_dense(self) -> Tensor:
        """The whole mask `[B, P, Q, K]` bool, from the tables. O(n^2): for the reference backend and tests."""
        dense = torch.zeros(
            self.batch_rows, len(self.patterns), self.q_len, self.kv_len, dtype=torch.bool, device=self.device
        )
        for b, p, i, runs in self.table_rows():
            q_range = self.block_range(i, i, self.q_len)
            for run in runs:
                dense[b, p, slice(*q_range), slice(*self.block_range(run.first, run.last, self.kv_len))] = True
                for first, last in run.partial:
                    k_range = self.block_range(first, last, self.kv_len)
                    dense[b, p, slice(*q_range), slice(*k_range)] = self.mask(b, p, q_range, k_range)
        return dense


def _length(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]


def as_runs(columns: list[int], full: list[bool]) -> Iterator[Run]:
    """Listed key blocks of a table row, in ascending order, as runs of neighbours."""
    begin = 0
    for at in range(1, len(columns) + 1):
        if at == len(columns) or columns[at] != columns[at - 1] + 1:
            yield Run(columns[begin], columns[at - 1], tuple(_partial(columns[begin:at], full[begin:at])))
            begin = at


def _partial(columns: list[int], full: list[bool]) -> Iterator[tuple[int, int]]:
    first = None
    for column, is_full in zip(columns, full, strict=True):
        if is_full and first is not None:
            yield first, column - 1
            first = None
        elif not is_full and first is None:
            first = column
    if first is not None:
        yield first, columns[-1]
