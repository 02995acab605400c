"""A plan as a window and global tokens, where it is one: what backends with window kernels compute.

The pairs of the pattern are `window | clip & globals`, where `globals` are the pairs whose query or key is a global token.
Each pair is counted exactly once, as one of three parts:

- rows: a global query sees all keys of its sequence (only where `clip` is everything; otherwise there are no such rows, nor
  where the pattern says `marked_keys()`, which makes no query global);
- columns: any other query sees the global keys within `clip` that its window does not hold;
- window: any other query sees its window.

Legend: B batch rows, S sequences (packed documents, or the batch rows), C global keys of the sequence that has most of
them. Queries are counted from the plan's first, keys in key coordinates: query i stands at key `i + q_offset`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pattern.forms import WindowForm, read_window
from .block_plan import BlockPlan
from .cache import kept, remembered


@dataclass(frozen=True, eq=False)
class Split:
    """A plan as a window and global tokens, with the tables that say where.

    `sequences` `[S, 5]` int32 holds, per sequence with a query, its batch row, its queries (first, last + 1) and its keys (first,
    last + 1); `columns` `[S, C]` int32 its global keys, -1 beyond their number. `rows` are the global queries as indices into
    the flattened `[B * Q]`, sequence by sequence, `row_counts` `[S]` their numbers. `padding_q` and `padding_k` are the tokens of no
    sequence, flattened alike; `whole` says that every batch row is one sequence without padding.
    """

    shape: WindowForm
    batch: int
    q_len: int
    kv_len: int
    q_offset: int
    whole: bool
    sequences: Tensor
    columns: Tensor
    rows: Tensor
    row_counts: Tensor
    padding_q: Tensor
    padding_k: Tensor

    @kept
    def longest(self) -> int:
        """Queries of the longest sequence."""
        return int((self.sequences[:, 2] - self.sequences[:, 1]).max()) if len(self.sequences) else 0

    def to(self, device) -> Split:
        moved = ("columns", "rows", "padding_q", "padding_k")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})

    @kept
    def leading(self) -> bool:
        """Are the global tokens the first of every batch row, the same number in each, and the queries all the tokens?"""
        alike = self.whole and self.q_len == self.kv_len and not self.shape.marked
        return alike and bool((self.columns >= 0).all())

    @kept
    def column_counts(self) -> Tensor:
        """Global keys of each sequence, `[S]` int32."""
        return (self.columns >= 0).sum(1, dtype=torch.int32)

    @kept
    def asked(self) -> Tensor:
        """Which of the flattened `columns` are queries too, in the order of `rows`."""
        first, last = (self.sequences_there[:, i, None] + self.q_offset for i in (1, 2))
        return ((self.columns >= 0) & (self.columns >= first) & (self.columns < last)).flatten().nonzero().flatten()

    @kept
    def sequences_there(self) -> Tensor:
        """`sequences` where the other tables are."""
        return self.sequences.to(self.columns.device)


@remembered
def split(plan: BlockPlan, batch: int) -> Split | str:
    """The plan for `batch` rows as a window and global tokens, its index tables on its device; or the reason why it is none."""
    if plan.mask_function is not None:
        return "a mask function can only be evaluated element by element"
    if plan.heads:
        return "heads have patterns of their own"
    if not plan.q_len or not plan.kv_len:
        return "there are no queries or no keys"
    shape = read_window(plan.patterns[0], plan.kv_len)
    if isinstance(shape, str):
        return shape
    layout = plan.layout.to("cpu")
    if layout.marks is None and shape.marked:
        shape = replace(shape, marked=False)
        if not shape.has_globals and shape.window is None:
            return "no token is marked, so that it holds no pair"
    found = _sequences(layout, batch, plan.kv_len)
    if isinstance(found, str):
        return found
    cut = _queries_of(found, plan, shape)
    if isinstance(cut, str):
        return cut
    flags = _global_tokens(shape, layout, found, batch, plan.kv_len)
    return _tables(plan, shape, cut, flags, layout.start is None, batch).to(plan.device)


def _sequences(layout, batch: int, kv_len: int) -> Tensor | str:
    """Batch row, first key, last key + 1 of every sequence, in order: `[S, 3]`."""
    if layout.start is None:
        b = torch.arange(batch)
        return torch.stack((b, torch.zeros_like(b), torch.full_like(b, kv_len)), 1)
    start, end = (t.long().expand(batch, -1) for t in (layout.start, layout.end))
    index = torch.arange(kv_len).expand(batch, -1)
    b, first = ((start == index) & (end >= index)).nonzero(as_tuple=True)
    found = torch.stack((b, first, end[b, first] + 1), 1)
    real = batch * kv_len if layout.real is None else int(layout.real.expand(batch, -1).sum())
    if real != int((found[:, 2] - found[:, 1]).sum()):
        return "padding inside a sequence"
    return found


def _queries_of(found: Tensor, plan: BlockPlan, shape: WindowForm) -> Tensor | str:
    """Adds the queries of each sequence: `[S, 5]`. Window kernels take the last query to stand at the last key."""
    b, k0, k1 = found.unbind(1)
    q0, q1 = ((k - plan.q_offset).clamp(0, plan.q_len) for k in (k0, k1))
    ahead = (q1 > q0) & (k1 > q1 + plan.q_offset)
    if ahead.any():
        if shape.has_rows or (shape.window is not None and shape.window.right != 0):
            return "queries that are not the last of the keys, with keys after them in reach"
        # no query sees the keys after the last one
        k1 = torch.where(ahead, q1 + plan.q_offset, k1)
    return torch.stack((b, q0, q1, k0, k1), 1)[q1 > q0]


def _global_tokens(shape: WindowForm, layout, found: Tensor, batch: int, kv_len: int) -> Tensor:
    flags = torch.zeros(batch, kv_len, dtype=torch.bool)
    if shape.marked:
        flags |= layout.marks
    for b, k0, k1 in found.tolist() if shape.first else ():
        flags[b, k0 : min(k0 + shape.first, k1)] = True
    return flags


def _tables(plan: BlockPlan, shape: WindowForm, sequences: Tensor, flags: Tensor, whole: bool, batch: int) -> Split:
    columns, rows, counts = [], [], []
    in_q, in_k = (torch.zeros(batch, n, dtype=torch.bool) for n in (plan.q_len, plan.kv_len))
    for b, q0, q1, k0, k1 in sequences.tolist():
        in_q[b, q0:q1], in_k[b, k0:k1] = True, True
        columns.append(flags[b, k0:k1].nonzero().flatten() + k0)
        asked = (
            flags[b, q0 + plan.q_offset : q1 + plan.q_offset].nonzero().flatten() if shape.has_rows else columns[-1][:0]
        )
        rows.append(asked + b * plan.q_len + q0)
        counts.append(len(asked))
    table = torch.full((len(columns), max([1, *map(len, columns)])), -1, dtype=torch.int32)
    for s, column in enumerate(columns):
        table[s, : len(column)] = column
    # no global token in this batch
    none = not any(map(len, columns))
    return Split(
        shape=shape,
        batch=batch,
        q_len=plan.q_len,
        kv_len=plan.kv_len,
        q_offset=plan.q_offset,
        whole=whole,
        sequences=sequences.int(),
        columns=table[:, :0] if none else table,
        rows=torch.cat([torch.zeros(0, dtype=torch.long), *rows]),
        row_counts=torch.tensor(counts, dtype=torch.long),
        padding_q=(~in_q).flatten().nonzero().flatten(),
        padding_k=(~in_k).flatten().nonzero().flatten(),
    )
