"""A plan as a window and global tokens, where it is one: what backends with window kernels compute.

The pairs of the pattern are `window | clip & globals`, where `globals` are the pairs whose query or key is a global token.
Each pair is counted exactly once, in one of three pieces:

- global rows: a global query sees all keys of its sequence (only where `clip` is everything; otherwise there are no such
  rows, nor where the pattern says `marked_keys()`, which makes no query global);
- global columns: any other query sees the global keys within `clip` that its window does not hold;
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
from .sequences import Sequences


@dataclass(frozen=True, eq=False)
class Split:
    """A plan as a window and global tokens, with the tables that say where.

    `sequences` `[S, 5]` int32 holds, per sequence with a query, its batch row, its queries (first, last + 1) and its keys (first,
    last + 1); `columns` `[S, C]` int32 its global keys, -1 beyond their number. `rows` are the global queries as indices into
    the flattened `[B * Q]`, sequence by sequence, `row_counts` `[S]` their numbers. `padding_q` and `padding_k` are the tokens of no
    sequence, flattened alike; `whole` says that every batch row is one sequence without padding.
    """

    form: WindowForm
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

    def to(self, device: torch.device | str) -> Split:
        """The same, with all tables on `device` but `sequences` and `row_counts`, which the host works with."""
        return replace(
            self,
            columns=self.columns.to(device),
            rows=self.rows.to(device),
            padding_q=self.padding_q.to(device),
            padding_k=self.padding_k.to(device),
        )

    @kept
    def leading(self) -> bool:
        """Are the global tokens the first of every batch row, the same number in each, and the queries all the tokens?"""
        alike = self.whole and self.q_len == self.kv_len and not self.form.marked
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
    form = read_window(plan.patterns[0], plan.kv_len)
    if isinstance(form, str):
        return form
    sequences = plan.sequences.to("cpu")
    if sequences.marks is None and form.marked:
        form = replace(form, marked=False)
        if not form.has_globals and form.window is None:
            return "no token is marked, so that it holds no pair"
    keys = _keys_of(sequences, batch, plan.kv_len)
    if isinstance(keys, str):
        return keys
    table = _with_queries(keys, plan, form)
    if isinstance(table, str):
        return table
    flags = _global_tokens(form, sequences, keys, (batch, plan.kv_len))
    return _tables(plan, form, table, flags, sequences.start is None).to(plan.device)


def _keys_of(sequences: Sequences, batch: int, kv_len: int) -> Tensor | str:
    """Batch row, first key, last key + 1 of every sequence, in order: `[S, 3]`."""
    if sequences.start is None or sequences.end is None:
        b = torch.arange(batch, device="cpu")
        return torch.stack((b, torch.zeros_like(b), torch.full_like(b, kv_len)), 1)
    start, end = (t.long().expand(batch, -1) for t in (sequences.start, sequences.end))
    index = torch.arange(kv_len, device="cpu").expand(batch, -1)
    b, first = ((start == index) & (end >= index)).nonzero(as_tuple=True)
    found = torch.stack((b, first, end[b, first] + 1), 1)
    real = batch * kv_len if sequences.real is None else int(sequences.real.expand(batch, -1).sum())
    if real != int((found[:, 2] - found[:, 1]).sum()):
        return "padding inside a sequence"
    return found


def _with_queries(keys: Tensor, plan: BlockPlan, form: WindowForm) -> Tensor | str:
    """Adds the queries of each sequence: `[S, 5]`. Window kernels take the last query to stand at the last key."""
    b, k0, k1 = keys.unbind(1)
    q0, q1 = ((k - plan.q_offset).clamp(0, plan.q_len) for k in (k0, k1))
    ahead = (q1 > q0) & (k1 > q1 + plan.q_offset)
    if ahead.any():
        if form.has_rows or (form.window is not None and form.window.right != 0):
            return "queries that are not the last of the keys, with keys after them in reach"
        # no query sees the keys after the last one
        k1 = torch.where(ahead, q1 + plan.q_offset, k1)
    return torch.stack((b, q0, q1, k0, k1), 1)[q1 > q0]


def _global_tokens(form: WindowForm, sequences: Sequences, keys: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which tokens are global, `[B, K]` bool."""
    flags = torch.zeros(shape, dtype=torch.bool, device="cpu")
    if form.marked and sequences.marks is not None:
        flags |= sequences.marks
    for b, k0, k1 in keys.tolist() if form.first else ():
        flags[b, k0 : min(k0 + form.first, k1)] = True
    return flags


def _tables(plan: BlockPlan, form: WindowForm, sequences: Tensor, flags: Tensor, whole: bool) -> Split:
    batch = flags.shape[0]
    columns, rows, counts = [], [], []
    in_q, in_k = (torch.zeros(batch, n, dtype=torch.bool, device="cpu") for n in (plan.q_len, plan.kv_len))
    for b, q0, q1, k0, k1 in sequences.tolist():
        in_q[b, q0:q1], in_k[b, k0:k1] = True, True
        columns.append(flags[b, k0:k1].nonzero().flatten() + k0)
        asked = columns[-1][:0]
        if form.has_rows:
            asked = flags[b, q0 + plan.q_offset : q1 + plan.q_offset].nonzero().flatten()
        rows.append(asked + b * plan.q_len + q0)
        counts.append(len(asked))
    most = max([1, *map(len, columns)])
    table = torch.full((len(columns), most), -1, dtype=torch.int32, device="cpu")
    for s, column in enumerate(columns):
        table[s, : len(column)] = column
    # no global token in this batch
    none = not any(map(len, columns))
    return Split(
        form=form,
        batch=batch,
        q_len=plan.q_len,
        kv_len=plan.kv_len,
        q_offset=plan.q_offset,
        whole=whole,
        sequences=sequences.int(),
        columns=table[:, :0] if none else table,
        rows=torch.cat([torch.zeros(0, dtype=torch.long, device="cpu"), *rows]),
        row_counts=torch.tensor(counts, dtype=torch.long, device="cpu"),
        padding_q=(~in_q).flatten().nonzero().flatten(),
        padding_k=(~in_k).flatten().nonzero().flatten(),
    )
