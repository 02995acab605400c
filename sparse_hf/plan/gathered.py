"""Marked tokens of a plan, gathered side by side.

Tokens that are scattered over a text then cost what they are, and not the blocks that they are in. A plan without its marks
holds fewer pairs. Those that are missing have a marked key or a marked query:

- every query sees the marked keys, as far as the plan holds the pair with its marks and not without;
- a marked query sees what the whole plan holds for it, and counts nowhere else.

Legend: B batch rows (1 when all are alike), P patterns, M most marked tokens of any row, Nq and Nk blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pattern import EMPTY, FULL, PARTIAL, Pattern
from ..pattern.base import either_side
from .block_plan import BlockPlan, Run, as_runs
from .cache import kept, remembered
from .classify import Classifier
from .sequences import Sequences

NONE_MARKED, ALL_MARKED = 0, 2


@dataclass(frozen=True, eq=False)
class Gathered:
    """Some queries of a plan against some of its keys, in blocks of their own; looks like a `BlockPlan` to backends.

    `queries` and `keys` are indices `[B, M]` in ascending order, -1 beyond their number; None stands for all. Pairs that
    `without` holds are left out.
    """

    plan: BlockPlan
    queries: Tensor | None = None
    keys: Tensor | None = None
    without: BlockPlan | None = None

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return self.plan.patterns

    @property
    def heads(self) -> tuple[int, ...]:
        return self.plan.heads

    @property
    def batch_rows(self) -> int:
        return self.plan.batch_rows

    @property
    def device(self) -> torch.device:
        return self.plan.device

    @property
    def block_size(self) -> int:
        return self.plan.block_size

    @property
    def q_len(self) -> int:
        return self.plan.q_len if self.queries is None else self.queries.shape[1]

    @property
    def kv_len(self) -> int:
        return self.plan.kv_len if self.keys is None else self.keys.shape[1]

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_size)

    def block_range(self, first: int, last: int, length: int) -> tuple[int, int]:
        return self.plan.block_range(first, last, length)

    def query_index(self, b: int, first: int, last: int) -> Tensor:
        """Indices in the plan of the queries `first..last` (end exclusive) of batch row b, -1 for none."""
        return self._index(self.queries, b, first, last)

    def key_index(self, b: int, first: int, last: int) -> Tensor:
        """Indices in the plan of the keys `first..last` (end exclusive) of batch row b, -1 for none."""
        return self._index(self.keys, b, first, last)

    def _index(self, index: Tensor | None, b: int, first: int, last: int) -> Tensor:
        if index is None:
            return torch.arange(first, last, device=self.plan.device)
        return index[b if len(index) > 1 else 0, first:last]

    def mask(self, b: int, p: int, q_range: tuple[int, int], k_range: tuple[int, int]) -> Tensor:
        """As of a `BlockPlan`: `[queries, keys]` bool."""
        q, k = self.query_index(b, *q_range)[:, None], self.key_index(b, *k_range)[None, :]
        exists = (q >= 0) & (k >= 0)
        row, q, k = torch.full((1, 1), b, device=self.plan.device), q.clamp(min=0), k.clamp(min=0)
        allowed = self.plan.allows(row, p, q, k) & exists
        return allowed if self.without is None else allowed & ~self.without.allows(row, p, q, k)

    @kept
    def runs(self) -> list[list[Run]]:
        """Per table row `(b * P + p) * Nq + i`, its key blocks as runs of neighbours."""
        found = []
        for state in self._states().flatten(0, -2):
            columns = state.nonzero().flatten()
            found.append(list(as_runs(columns.tolist(), (state[columns] == FULL).tolist())))
        return found

    def _states(self) -> Tensor:
        """`[B, P, Nq, Nk]` int8: what holds of every rectangle between two blocks holds of the tokens gathered in them."""
        plan = self.plan
        sequences = plan.sequences.to("cpu")
        q0, q1, q_full = _corners(self.queries, self.q_len, plan)
        k0, k1, k_full = _corners(self.keys, self.kv_len, plan)
        shape = plan.batch_rows, q0.shape[1], k0.shape[1]
        b = torch.arange(plan.batch_rows, device="cpu").clamp(max=sequences.rows - 1)[:, None, None].expand(shape)
        q0, q1, q_full = (t[:, :, None].expand(shape) for t in (q0 + plan.q_offset, q1 + plan.q_offset, q_full))
        k0, k1, k_full = (t[:, None, :].expand(shape) for t in (k0, k1, k_full))
        exists = (q1 >= q0) & (k1 >= k0)
        corners = [t[exists] for t in (b, q0, q1, k0, k1)]
        # the queries of these blocks are all marked, or else count as unmarked ones; so do the keys
        sides = (ALL_MARKED if self.keys is None else NONE_MARKED), (None if self.keys is None else ALL_MARKED)
        states = torch.zeros(shape[0], len(plan.patterns), *shape[1:], dtype=torch.int8, device="cpu")
        for p, pattern in enumerate(pattern.on("cpu") for pattern in plan.patterns):
            if self.without is not None and not pattern.marked_sides[1]:
                continue
            found = _Sided(pattern, sequences, plan.kv_len, sides)(*corners)
            if self.without is not None:
                rest = Classifier(pattern, replace(sequences, marks=None), plan.kv_len)(*corners)
                found = torch.where(rest == EMPTY, found, found.clamp(max=PARTIAL)).where(rest != FULL, EMPTY)
            whole = (q_full & k_full)[exists] & (plan.mask_function is None)
            states[:, p][exists] = torch.where(whole, found, found.clamp(max=PARTIAL)).to(torch.int8)
        return states


class _Sided(Classifier):
    """Ranges whose tokens are all marked, or none, on the sides that are not None."""

    def __init__(self, pattern: Pattern, sequences: Sequences, kv_len: int, sides: tuple[int | None, int | None]):
        super().__init__(pattern, sequences, kv_len)
        self.sides = sides

    def _marks(self, b, queries, keys, length):
        marks = super()._marks(b, queries, keys, length)
        if marks.q is None or marks.k is None:
            return marks
        q, k = (
            found if side is None else torch.full_like(found, side)
            for found, side in zip((marks.q, marks.k), self.sides, strict=True)
        )
        return marks._replace(q=q, k=k)


def _corners(index: Tensor | None, length: int, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """First and last token of each block, and whether the block is full of tokens: `[B or 1, blocks]` each."""
    size = plan.block_size
    if index is None:
        first = torch.arange(0, length, size, device="cpu")[None]
        return first, (first + size).clamp(max=length) - 1, torch.ones_like(first, dtype=torch.bool)
    index = index.cpu()
    blocks = torch.nn.functional.pad(index, (0, -length % size), value=-1).unflatten(1, (-1, size))
    last = blocks.amax(-1)
    # a block without tokens: the last comes before the first
    first = torch.where(last >= 0, blocks[..., 0], 0)
    there = torch.arange(blocks.shape[1] * size, device="cpu").view(1, -1, size) < length
    return first, last, ((blocks >= 0) | ~there).all(-1)


@dataclass(frozen=True, eq=False)
class Stage:
    """Queries that are computed together (`[B, M]` indices, -1 beyond their number; None: all), over disjoint pieces."""

    queries: Tensor | None
    pieces: tuple[BlockPlan | Gathered, ...]


@remembered
def stages(plan: BlockPlan) -> tuple[Stage, ...]:
    """What a plan is made of: one stage, unless tokens are marked. Later stages take their queries from earlier ones."""
    marks = plan.sequences.marks
    if marks is None or not all(p.marks_add for p in plan.patterns):
        return (Stage(None, (plan,)),)
    asks_queries, asks_keys = either_side(plan.patterns)
    rest = _without_marks(plan)
    last = plan.q_offset + plan.q_len
    pieces = (rest, Gathered(plan, keys=_indices(marks), without=rest)) if asks_keys else (rest,)
    marked_queries = marks[:, plan.q_offset : last]
    if not asks_queries or not marked_queries.any():
        return (Stage(None, pieces),)
    alone = Gathered(plan, queries=_indices(marked_queries))
    return Stage(None, pieces), Stage(alone.queries, (alone,))


def _without_marks(plan: BlockPlan) -> BlockPlan:
    sequences = replace(plan.sequences, marks=None).collapsed()
    batch_rows = plan.batch_rows if plan.mask_function is not None else sequences.rows
    return replace(plan, sequences=sequences, batch_rows=batch_rows)


def _indices(flags: Tensor) -> Tensor:
    """Where `[B, L]` flags stand: `[B, M]`, -1 beyond their number."""
    most = int(flags.sum(1).max())
    order = flags.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.where(flags.gather(1, order), order, -1)
