"""A few queries behind many keys, as in decoding: the keys that any of them sees, side by side, for PyTorch's own attention.

What is seen is found once a plan, which the layers of a model share. Ranges of keys are slices, so that a window costs what it holds,
however long the text behind it; where every query sees all of them there is no mask either.

Legend: B batch, H query heads, G key heads, R = H / G, Q queries, K keys, D head dim; n keys that are seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....pattern.forms import read_window
from ....plan import BlockPlan, remembered
from ...scoring import Scoring

# queries that are few: compiling a kernel for every length of the keys would not be worth it
QUERIES = 128
# pairs that are looked at, of all batch rows and heads; global queries of a long text have more
PAIRS = 1 << 24
# ranges of keys that are joined as slices; of more each key is gathered
RANGES = 4
# where other backends walk several ranges sooner than they are copied side by side
WALKERS = {"cpu"}


@dataclass(frozen=True, eq=False)
class Seen:
    """`keys` are ranges (end exclusive) or `[n]` indices, `mask` `[B or 1, H or 1, Q, n]` bool, `blind` those who see nothing."""

    keys: tuple[tuple[int, int], ...] | Tensor
    mask: Tensor | None
    blind: Tensor | None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> Tensor | None:
    """Out `[B, H, Q, D]`, differentiable; None where there is too much or nothing to see, or others are faster."""
    seen = look(plan, q.shape[0] * q.shape[1])
    if seen is None or (q.device.type in WALKERS and len(seen.keys) != 1):
        return None
    k, v = (_taken(t, seen.keys) for t in (k, v))
    groups = k.shape[1]
    mask = seen.mask
    if mask is not None and groups != q.shape[1]:
        mask = _folded(mask.expand(-1, q.shape[1], -1, -1), groups)
    out = torch.nn.functional.scaled_dot_product_attention(_folded(q, groups), k, v, _on(mask, q), scale=scale)
    out = out.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return out if seen.blind is None else out.masked_fill(_on(seen.blind, q), 0)


def suits(backend: str, q: Tensor, scoring: Scoring, dropout: float, wants_lse: bool) -> bool:
    """May such a call be computed here? Only "auto" may choose."""
    is_plain = scoring.is_plain and not dropout and not wants_lse
    return backend == "auto" and q.shape[2] < QUERIES and is_plain


def place(q: Tensor, batch: tuple[Tensor | None, ...]) -> torch.device:
    """Where the plan of such a call is made: on the CPU, unless there is batch data elsewhere."""
    return torch.device("cpu") if all(t is None for t in batch) else q.device


@remembered
def look(plan: BlockPlan, rows: int) -> Seen | None:
    """What the queries of a plan see; None if it is nothing, or more than `PAIRS` for `rows` batch rows and heads."""
    ranges = _ranges_of_one(plan)
    if ranges:
        return Seen(ranges, None, None)
    blocks = plan.columns.long().unique()
    keys = (blocks[:, None] * plan.block_size + torch.arange(plan.block_size, device=plan.device)).flatten()
    keys = keys[keys < plan.kv_len]
    if rows * plan.q_len * len(keys) > PAIRS:
        return None
    b = torch.arange(plan.batch_rows, device=plan.device)[:, None, None]
    q = torch.arange(plan.q_len, device=plan.device)[:, None]
    shape = plan.batch_rows, plan.q_len, len(keys)
    masks = [plan.allows(b, p, q, keys).expand(shape) for p in range(len(plan.patterns))]
    mask = torch.stack([masks[p] for p in plan.heads or (0,)], 1)
    is_seen = mask.flatten(0, 2).any(0)
    if not is_seen.any():
        return None
    keys, mask = keys[is_seen], mask[..., is_seen]
    sees = mask.any(-1, keepdim=True)
    blind = None if sees.all() else ~sees
    # who sees nothing would give NaN; what it sees instead is thrown away
    mask = mask if blind is None else mask | blind
    return Seen(_ranges(keys), None if mask.all() else mask, blind)


def _ranges_of_one(plan: BlockPlan) -> tuple[tuple[int, int], ...] | None:
    """What a single query sees by a window and first tokens, from numbers alone: every token that is decoded has a plan of its own."""
    shape = read_window(plan.patterns[0], plan.kv_len) if plan.is_bare and plan.q_len == 1 else ""
    if isinstance(shape, str) or (shape.has_rows and plan.q_offset < shape.first):
        return None
    if shape.marked and plan.layout.marks is not None:
        return None
    parts = [_reach(shape.clip.left, shape.clip.right, plan, shape.first)]
    if shape.window is not None:
        parts.append(_reach(shape.window.left, shape.window.right, plan, plan.kv_len))
    found = []
    for begin, end in sorted(part for part in parts if part[0] < part[1]):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return tuple(found)


def _reach(left: int | None, right: int | None, plan: BlockPlan, keys: int) -> tuple[int, int]:
    """Of the first `keys` keys those that a window holds of the plan's first query (end exclusive)."""
    x = plan.q_offset
    return 0 if left is None else max(0, x - left), keys if right is None else min(keys, x + right + 1)


def _ranges(keys: Tensor) -> tuple[tuple[int, int], ...] | Tensor:
    jumps = (keys.diff() != 1).nonzero().flatten().tolist()
    if len(jumps) >= RANGES:
        return keys
    begins, ends = keys[[0, *(j + 1 for j in jumps)]].tolist(), keys[[*jumps, -1]].tolist()
    return tuple((begin, end + 1) for begin, end in zip(begins, ends, strict=True))


def _taken(t: Tensor, keys: tuple[tuple[int, int], ...] | Tensor) -> Tensor:
    """`[B, G, n, D]` of `[B, G, K, D]`."""
    if isinstance(keys, Tensor):
        return t.index_select(2, keys.to(t.device))
    parts = [t[:, :, begin:end] for begin, end in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _folded(t: Tensor, groups: int) -> Tensor:
    """`[B, G, R * Q, ...]` of `[B, H, Q, ...]`: the query heads of a key head as queries of it, whose keys are not repeated."""
    return t.unflatten(1, (groups, -1)).flatten(2, 3)


def _on(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(like.device)
