"""FlashAttention windows, with the rest of the pattern merged exactly: FA4 if it is installed, else torch's own FA2.

The plan is a window and global tokens (`plan/split.py`); any other goes to FA4's block lists (`fa_blocks.py`). The window is
one call of a window kernel; global keys are columns merged into it in one pass; global queries are a second call on a few
rows. Padding and packed documents are sequences of the kernels. No part is n x n, and none is computed twice.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; inside, heads stand after tokens: `[B, Q, H, D]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....plan import BlockPlan, Split, remembered, split
from ...scoring import Scoring
from . import block_lists as fa_blocks
from . import columns
from . import window_kernels as flash

# columns take a pass over q and out for every so many; beyond some passes a block-sparse kernel is the better one
MAX_COLUMNS = 256
# `backward` takes None for a gradient of zero
NONE_IS_ZERO = True
# numbers in q from which FA4 overtakes `triton`, whose few launches take the host less time than those of parts to be merged
FROM = 1 << 24


def refuses(q: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float) -> str | None:
    if dropout:
        return "FlashAttention's dropout is not the same mask as that of the other backends; use backend='blockwise'"
    if not scoring.is_plain:
        return "FlashAttention windows are merged without soft cap or relative bias; use backend='flex'"
    if q.device.type != "cuda":
        return f"it needs a GPU and q is on {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention computes in bfloat16 or float16 and q is {q.dtype}; use backend='flex'"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dims of q and v are {q.shape[-1]} and {v.shape[-1]}; they must be one multiple of 8 up to 256"
    reason = _no_window(plan, q.shape[0])
    if reason is None:
        return flash.FA2.refuses(q)
    lists = fa_blocks.refuses(q, plan)
    return lists and f"{reason}; otherwise, {lists}; use backend='flex'"


def _no_window(plan: BlockPlan, batch: int) -> str | None:
    """Why the plan is not computed as a window and global tokens."""
    found = split(plan, batch)
    if isinstance(found, str):
        return f"the pattern must be a window and global tokens: {found}"
    if found.columns.shape[1] > MAX_COLUMNS:
        return f"a sequence has {found.columns.shape[1]} global tokens; up to {MAX_COLUMNS} are merged"
    return None


def is_fastest(q: Tensor, plan: BlockPlan) -> bool:
    """Is this the fastest backend for a call, unless it refuses it? Measured on an H200 beside `triton`.

    Not with torch's FA2, nor on short texts; heads wider than 128 are not measured: who wants them asks by name.
    """
    if not q.is_cuda or q.shape[-1] > 128 or q.numel() <= FROM or flash.kernels(q) is flash.FA2:
        return False
    return _no_window(plan, q.shape[0]) is None or fa_blocks.are_fastest(q, plan)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]` in the dtype of q and lse `[B, H, Q]` in float32, differentiable."""
    return _Merged.apply(q, k, v, plan, scoring)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scoring):
        # the backward pass may run on another thread, where `flash.only` does not hold
        ctx.kind = flash.kernels(q)
        out, lse = forward(q, k, v, plan, scoring, ctx.kind)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = plan, scoring
        # a gradient of lse that nobody asked for must not cost a pass
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        return *backward(*ctx.saved_tensors, grad_out, grad_lse, *ctx.rest, 0.0, None, ctx.kind)[:3], None, None


def forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, kind) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]` and lse `[B, H, Q]`; `kind` computes windows."""
    if _no_window(plan, q.shape[0]):
        return fa_blocks.forward(q, k, v, plan, scoring)
    parts = _parts(plan, q.shape[0])
    q, k, v = (flash.heads_last(t) for t in (q, k, v))
    if parts.window is None:
        out = torch.zeros_like(q)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_work(q), device=q.device)
    else:
        out, lse = parts.window.forward(kind, q, k, v, scoring.scale)
    parts.padding_q.put(out, 0)
    parts.padding_q.put(lse.transpose(1, 2), -torch.inf)
    if parts.split.columns.shape[1]:
        columns.absorb(q, k, v, out, lse, parts.split, scoring.scale)
    if parts.rows is not None:
        row_q = parts.row_places.take(q, parts.rows.packed is not None)
        row_out, row_lse = parts.rows.forward(_for_rows(kind), row_q, k, v, scoring.scale)
        parts.row_places.put(out, row_out)
        parts.row_places.put(lse.transpose(1, 2), row_lse.transpose(-1, -2))
    return out.transpose(1, 2), lse


def backward(
    q, k, v, out, lse, grad_out, grad_lse, plan: BlockPlan, scoring: Scoring, dropout: float, seed, kind=None
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of q, k, v and no bias, given those of out and lse (None: zero)."""
    if _no_window(plan, q.shape[0]):
        return fa_blocks.backward(q, k, v, out, lse, grad_out, grad_lse, plan, scoring)
    parts, scale = _parts(plan, q.shape[0]), scoring.scale
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    q, k, v, out, grad_out = (flash.heads_last(t) for t in (q, k, v, out, grad_out))
    kind = kind or flash.kernels(q)
    # a row with infinite lse has weight exp(score - lse) = 0: global queries are done below, rows that see nothing never
    all_see = parts.split.whole and parts.window is not None
    here = lse if all_see and parts.rows is None else lse.where(lse > -torch.inf, torch.inf)
    if parts.rows is not None:
        parts.row_places.put(here.transpose(1, 2), torch.inf)
    if grad_lse is not None:
        grad_lse = grad_lse.where(lse > -torch.inf, 0).contiguous()
    if parts.window is None:
        grads = [torch.zeros_like(t) for t in (q, k, v)]
    else:
        grads = parts.window.backward(kind, grad_out, q, k, v, out, here, grad_lse, scale)
    if parts.split.columns.shape[1]:
        columns.add_gradients(grad_out, q, k, v, out, here, grad_lse, *grads, parts.split, scale)
    if parts.rows is not None:
        _add_rows(parts, _for_rows(kind), grad_out, q, k, v, out, lse, grad_lse, grads, scale)
    for grad, padding in zip(grads, (parts.padding_q, parts.padding_k, parts.padding_k), strict=True):
        padding.put(grad, 0)
    return *(g.transpose(1, 2) for g in grads), None


def _add_rows(parts: _Parts, kind, grad_out, q, k, v, out, lse, grad_lse, grads: list[Tensor], scale: float) -> None:
    """Add what the global queries give to `grads`, in place."""
    if q.is_cuda:
        from .rows_kernels import add_rows_on_gpu

        grad_q = add_rows_on_gpu(grad_out, q, k, v, out, lse, grad_lse, *grads[1:], parts.split, scale)
        parts.row_places.put(grads[0], grad_q)
        return
    packed = parts.rows.packed is not None
    row_grad, row_q, row_out = (parts.row_places.take(t, packed) for t in (grad_out, q, out))
    row_lse, row_grad_lse = (
        None if t is None else parts.row_places.take(t.transpose(1, 2), packed).transpose(-1, -2).contiguous()
        for t in (lse, grad_lse)
    )
    grad_q, grad_k, grad_v = parts.rows.backward(kind, row_grad, row_q, k, v, row_out, row_lse, row_grad_lse, scale)
    parts.row_places.put(grads[0], grad_q)
    grads[1].add_(grad_k)
    grads[2].add_(grad_v)


def _for_rows(kind):
    # a few rows against all keys: FA2 splits the keys among multiprocessors, FA4 does not on Hopper
    return flash.FA2 if kind is flash.FA4 else kind


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a window kernel: on whole batch rows, cut to `keys` keys, or on `packed` sequences."""

    window: flash.Window
    packed: flash.Packed | None
    keys: int

    def _inputs(self, tensors: list[Tensor], of_keys: list[bool]) -> list[Tensor]:
        if self.packed is not None:
            return [t if t.ndim == 3 else t.flatten(0, 1) for t in tensors]
        # a slice of all would take the host a view
        return [
            t[:, : self.keys] if cut and t.shape[1] != self.keys else t for t, cut in zip(tensors, of_keys, strict=True)
        ]

    def forward(self, kind, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Out shaped like q; lse `[B, H, Q]`, or `[H, T]` for a q `[T, H, D]`."""
        inputs = self._inputs([q, k, v], [False, True, True])
        out, lse = kind.forward(*inputs, self.packed, self.window, scale)
        if self.packed is not None and q.ndim == 4:
            return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
        return out, lse

    def backward(self, kind, grad_out, q, k, v, out, lse, grad_lse, scale) -> list[Tensor]:
        inputs = self._inputs([grad_out, q, k, v, out], [False, False, True, True, False])
        if self.packed is not None and q.ndim == 4:
            lse, grad_lse = (None if t is None else t.transpose(0, 1).flatten(1) for t in (lse, grad_lse))
        grads = kind.backward(*inputs, lse, grad_lse, self.packed, self.window, scale)
        if self.packed is not None:
            return [g.unflatten(0, t.shape[:2]) if t.ndim == 4 else g for g, t in zip(grads, (q, k, v), strict=True)]
        missing = k.shape[1] - self.keys
        padded = (torch.nn.functional.pad(g, (0, 0, 0, 0, 0, missing)) if missing else g for g in grads[1:])
        return [grads[0], *padded]


@dataclass(frozen=True, eq=False)
class _Parts:
    split: Split
    window: _Call | None
    rows: _Call | None
    row_places: _Places
    padding_q: _Places
    padding_k: _Places


@remembered
def _parts(plan: BlockPlan, batch: int) -> _Parts:
    """The calls that a plan is made of."""
    found = split(plan, batch)
    assert isinstance(found, Split), found
    b, q0, q1, k0, k1 = found.sequences.long().unbind(1)
    k_ranges = torch.stack((k0, k1), 1) + b[:, None] * plan.kv_len
    keys = int(k1.max()) if len(k1) else 0
    totals, device = (batch * plan.q_len, batch * plan.kv_len), plan.device
    window = rows = None
    shape = found.shape
    if shape.window is not None:
        q_ranges = torch.stack((q0, q1), 1) + b[:, None] * plan.q_len
        packed = None if found.whole else flash.pack(q_ranges, k_ranges, *totals, device)
        window = _Call((shape.window.left, shape.window.right), packed, keys)
    counts = found.row_counts
    if len(found.rows):
        ends = counts.cumsum(0)
        # rows that are equally many in every whole batch row need no packing
        alike = found.whole and bool((counts == counts[0]).all())
        q_ranges = torch.stack((ends - counts, ends), 1)
        packed = None if alike else flash.pack(q_ranges, k_ranges, len(found.rows), totals[1], device)
        rows = _Call(flash.EVERYTHING, packed, keys)
    leading = found.columns.shape[1] if found.leading and rows is not None else None
    places = _places(found.rows, plan.q_len, leading)
    padding = _places(found.padding_q, plan.q_len), _places(found.padding_k, plan.kv_len)
    return _Parts(found, window, rows, places, *padding)


def _work(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class _Places:
    """Some tokens of `[B, L, ...]`: the first `count` of every row as a slice, or those at `index` (batch rows, tokens)."""

    count: int | None
    index: tuple[Tensor, Tensor]
    any: bool

    def take(self, t: Tensor, packed: bool) -> Tensor:
        """`[T, ...]` if packed, else `[B, tokens, ...]`."""
        if self.count is not None and not packed:
            return t[:, : self.count]
        taken = t[self.index]
        return taken if packed else taken.unflatten(0, (t.shape[0], -1))

    def put(self, t: Tensor, value: Tensor | float) -> None:
        """Write a number, or what `take` gives, to `t`."""
        if self.count is not None:
            value = value.unflatten(0, (t.shape[0], -1)) if isinstance(value, Tensor) and value.ndim < t.ndim else value
            t[:, : self.count] = value
        elif self.any:
            # written by index, unlike by slice, dtypes must agree
            t[self.index] = value.flatten(0, -t.ndim + 1).to(t.dtype) if isinstance(value, Tensor) else value


def _places(index: Tensor, length: int, count: int | None = None) -> _Places:
    """Of indices into the flattened `[B * length]`."""
    return _Places(count, (torch.div(index, length, rounding_mode="floor"), index % length), len(index) > 0)
