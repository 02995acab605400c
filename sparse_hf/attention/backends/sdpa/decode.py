"""Fewer than 128 queries, as in decoding: PyTorch's own attention over the keys that any of them sees.

A single query of a window with first tokens sees ranges of keys that are found from numbers alone, without a plan. Of other
calls the plan says what is seen, once for all layers of a model. Ranges of keys are slices, so that a window costs what it
holds, however long the text behind it; where every query sees all of them there is no mask either.

Legend: B batch, H query heads, G key heads, R = H / G, Q queries, K keys, D head dim; n keys that are seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ....pattern import Pattern, Window
from ....pattern.forms import read_window
from ....plan import BlockPlan, find_plan, remembered
from ...autograd import AutogradBackend
from ...backend import AttentionCall, Results
from ...merge import NO_LSE, merge
from ...strides import folded

# queries from which kernels that walk a plan are worth compiling
MAX_QUERIES = 128
# pairs of all batch rows and heads that a mask may have; global queries of a long text have more
MAX_MASK_PAIRS = 1 << 24
# ranges of keys that are joined as slices; of more, keys are gathered one by one
MAX_RANGES = 4
# dtypes of PyTorch's attention kernel for CPUs, which gives lse
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Seen:
    """`keys` are ranges (end exclusive) or `[n]` indices, `mask` is `[B or 1, H or 1, Q, n]` bool (None: all are seen).

    `blind` `[B or 1, H or 1, Q, 1]` are the queries that see nothing (None: there is none).
    """

    keys: Ranges | Tensor
    mask: Tensor | None
    blind: Tensor | None


class Decode(AutogradBackend):
    """PyTorch's `scaled_dot_product_attention` over slices of the keys."""

    name = "decode"

    def why_not(self, call: AttentionCall) -> str | None:
        if call.q.shape[2] >= MAX_QUERIES or not call.q.numel():
            return f"there are {call.q.shape[2]} queries; it is for 1 to {MAX_QUERIES - 1}"
        if call.wants_lse or call.dropout or not call.scoring.is_plain:
            return "PyTorch's attention gives no lse, and knows no soft cap, bias or dropout of ours"
        if isinstance(call.pattern, Pattern) and call.pattern.uses_content:
            return "pairs that are chosen from queries and keys are in no plan of positions"
        if _seen(call) is None:
            return "there is nothing to see, or too much for a mask"
        return None

    def is_fastest(self, call: AttentionCall) -> bool:
        """On a CPU `blockwise` walks several ranges sooner than they are copied side by side."""
        seen = _seen(call)
        return seen is not None and (call.q.is_cuda or _is_one_slice(seen) or _merges_ranges(call, seen))

    def forward(self, call: AttentionCall) -> Results:
        seen = _seen(call)
        assert seen is not None
        if not _is_one_slice(seen) and _merges_ranges(call, seen):
            return _merged_ranges(call, seen)
        q, groups, mask = call.q, call.k.shape[1], seen.mask
        k, v = (_taken(t, seen.keys) for t in (call.k, call.v))
        if mask is not None and groups != q.shape[1]:
            mask = folded(mask.expand(-1, q.shape[1], -1, -1), groups)
        mask = None if mask is None else mask.to(q.device)
        out = torch.nn.functional.scaled_dot_product_attention(
            folded(q, groups), k, v, mask, scale=call.scoring.scale
        )  # fmt: skip
        out = out.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
        return out if seen.blind is None else out.masked_fill(seen.blind.to(q.device), 0), NO_LSE


def _is_one_slice(seen: Seen) -> bool:
    return isinstance(seen.keys, tuple) and len(seen.keys) == 1


def _merges_ranges(call: AttentionCall, seen: Seen) -> bool:
    """Are ranges attended to where they lie, and merged by log-sum-exp? So nothing is copied; it has no gradient."""
    plain = isinstance(seen.keys, tuple) and seen.mask is None and not call.trains
    return plain and call.q.device.type == "cpu" and call.q.dtype in CPU_DTYPES and call.q.shape[-1] == call.v.shape[-1]


def _merged_ranges(call: AttentionCall, seen: Seen) -> Results:
    q = folded(call.q, call.k.shape[1])
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, call.k[:, :, begin:end], call.v[:, :, begin:end], scale=call.scoring.scale
        )
        for begin, end in seen.keys
    ]  # fmt: skip
    out, _ = merge([(part, lse) for part, lse in found])
    return out.unflatten(2, (-1, call.q.shape[2])).flatten(1, 2), NO_LSE


def _seen(call: AttentionCall) -> Seen | None:
    """What the queries of a call see; None if it is nothing, or too much for a mask."""
    pattern = call.lone_pattern if call.q.shape[2] == 1 else None
    if pattern is not None and not (pattern.uses_marks and _has_marks(call)):
        ranges = ranges_of_one(pattern, call.k.shape[2], call.q_offset)
        if ranges is not None:
            return Seen(ranges, None, None) if ranges else None
    return look_up(_plan(call), call.q.shape[0] * call.q.shape[1])


def _has_marks(call: AttentionCall) -> bool:
    plan = call.chosen_plan
    return plan.sequences.marks is not None if isinstance(plan, BlockPlan) else call.batch.marks is not None


def _plan(call: AttentionCall) -> BlockPlan:
    """The plan of a call, on the CPU where it is of lengths alone: ranges are numbers that the host works with."""
    if call.chosen_plan is None and call.q.is_cuda and (call.batch.is_empty or call.batch.without_ones().is_empty):
        return find_plan(replace(call.plan_key, device=torch.device("cpu")), call.batch)
    return call.blocks


@lru_cache(maxsize=256)
def ranges_of_one(pattern: Pattern, kv_len: int, x: int) -> Ranges | None:
    """The keys that a single query at `x` sees by a window and first tokens, from numbers alone; None: the pattern is neither."""
    form = read_window(pattern, kv_len)
    if isinstance(form, str) or (form.has_rows and x < form.first):
        return None
    found = [_reach(form.clip, x, form.first)]
    if form.window is not None:
        found.append(_reach(form.window, x, kv_len))
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted(one for one in found if one[0] < one[1]):
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((begin, end))
    return tuple(ranges)


def _reach(window: Window, x: int, keys: int) -> tuple[int, int]:
    """Of the first `keys` keys those that a window holds of the query at `x` (end exclusive)."""
    begin = 0 if window.left is None else max(0, x - window.left)
    return begin, keys if window.right is None else min(keys, x + window.right + 1)


@remembered
def look_up(plan: BlockPlan, rows: int) -> Seen | None:
    """What the queries of a plan see; None if it is nothing, or more than `MAX_MASK_PAIRS` for `rows` batch rows and heads."""
    blocks = plan.columns.long().unique()
    keys = (blocks[:, None] * plan.block_size + torch.arange(plan.block_size, device=plan.device)).flatten()
    keys = keys[keys < plan.kv_len]
    if rows * plan.q_len * len(keys) > MAX_MASK_PAIRS:
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
    return Seen(_as_ranges(keys), None if mask.all() else mask, blind)


def _as_ranges(keys: Tensor) -> Ranges | Tensor:
    jumps = (keys.diff() != 1).nonzero().flatten().tolist()
    if len(jumps) >= MAX_RANGES:
        return keys
    begins, ends = keys[[0, *(j + 1 for j in jumps)]].tolist(), keys[[*jumps, -1]].tolist()
    return tuple((begin, end + 1) for begin, end in zip(begins, ends, strict=True))


def _taken(t: Tensor, keys: Ranges | Tensor) -> Tensor:
    """`[B, G, n, D]` of `[B, G, K, D]`."""
    if isinstance(keys, Tensor):
        return t.index_select(2, keys.to(t.device))
    slices = [t[:, :, begin:end] for begin, end in keys]
    return slices[0] if len(slices) == 1 else torch.cat(slices, 2)
