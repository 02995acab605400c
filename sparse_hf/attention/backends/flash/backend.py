"""FlashAttention windows, with the rest of the pattern merged exactly: FA4 if it is installed, else torch's own FA2.

The plan is a window and global tokens (`plan/window_tables.py`); any other goes to FA4's block lists (`block_lists.py`). The window is
one call of a window kernel; global keys are columns merged into it in one pass; global queries are a second call on a few
rows. Padding and packed documents are sequences of the kernels. No part is n x n, and none is computed twice.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; inside, heads stand after tokens: `[B, Q, H, D]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....plan import BlockPlan, Split, remembered, split
from ...backend import AttentionCall, Backend, Given, Gradients, Results
from ...devices import HALF_TYPES
from ...strides import as_tokens_first
from . import block_lists, columns, window_kernels
from .window_kernels import WindowKernels

# global tokens of a sequence: columns take a pass over q and out for every so many; beyond some passes a block-sparse
# kernel is the better one
MAX_COLUMNS = 256
# numbers in q from which FA4 overtakes `triton`, whose few launches take the host less time than calls to be merged
FA4_MIN_ELEMENTS = 1 << 24


class Flash(Backend):
    """FlashAttention windows merged with global tokens, and its block lists for other patterns."""

    name = "fa"

    def why_not(self, call: AttentionCall) -> str | None:
        q, v = call.q, call.v
        if call.dropout:
            return (
                "FlashAttention's dropout is not the same mask as that of the other backends; use backend='blockwise'"
            )
        if not call.scoring.is_plain:
            return "FlashAttention windows are merged without soft cap or relative bias; use backend='flex'"
        if q.device.type != "cuda":
            return f"it needs a GPU and q is on {q.device}"
        if q.dtype not in HALF_TYPES:
            return f"FlashAttention computes in bfloat16 or float16 and q is {q.dtype}; use backend='flex'"
        if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 256:
            return f"head dims of q and v are {q.shape[-1]} and {v.shape[-1]}; they must be one multiple of 8 up to 256"
        reason = why_no_window(call.blocks, q.shape[0])
        if reason is None:
            return window_kernels.FA2.refuses(q)
        lists = block_lists.why_not(q, call.blocks)
        return lists and f"{reason}; otherwise, {lists}; use backend='flex'"

    def is_fastest(self, call: AttentionCall) -> bool:
        """Measured on an H200 beside `triton`.

        Not with torch's FA2, nor on short texts; heads wider than 128 are not measured: who wants them asks by name.
        """
        q = call.q
        if not q.is_cuda or q.shape[-1] > 128 or q.numel() <= FA4_MIN_ELEMENTS:
            return False
        if window_kernels.kernels(q) is window_kernels.FA2:
            return False
        return why_no_window(call.blocks, q.shape[0]) is None or block_lists.are_fastest(q, call.blocks)

    def forward(self, call: AttentionCall) -> Results:
        if why_no_window(call.blocks, call.q.shape[0]):
            return block_lists.forward(call)
        return merged_forward(call, window_kernels.kernels(call.q))

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        if why_no_window(call.blocks, call.q.shape[0]):
            return block_lists.backward(call, given)
        return merged_backward(call, window_kernels.kernels(call.q), given)


def why_no_window(plan: BlockPlan, batch: int) -> str | None:
    """Why the plan is not computed as a window and global tokens."""
    found = split(plan, batch)
    if isinstance(found, str):
        return f"the pattern must be a window and global tokens: {found}"
    if found.columns.shape[1] > MAX_COLUMNS:
        return f"a sequence has {found.columns.shape[1]} global tokens; up to {MAX_COLUMNS} are merged"
    return None


def merged_forward(call: AttentionCall, kernels: WindowKernels) -> Results:
    """Out and lse of a plan that is a window and global tokens; `kernels` compute the window."""
    steps, scale = _steps(call.blocks, call.q.shape[0]), call.scoring.scale
    q, k, v = (as_tokens_first(t) for t in (call.q, call.k, call.v))
    if steps.window is None:
        out = torch.zeros_like(q)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_work(q), device=q.device)
    else:
        out, lse = steps.window.forward(kernels, q, k, v, scale)
    steps.padding_q.put(out, 0)
    steps.padding_q.put(lse.transpose(1, 2), -torch.inf)
    if steps.split.columns.shape[1]:
        columns.absorb(q, k, v, out, lse, steps.split, scale)
    if steps.rows is not None:
        row_q = steps.row_places.take(q, steps.rows.packed is not None)
        row_out, row_lse = steps.rows.forward(_for_rows(kernels), row_q, k, v, scale)
        steps.row_places.put(out, row_out)
        steps.row_places.put(lse.transpose(1, 2), row_lse.transpose(-1, -2))
    return out.transpose(1, 2), lse


def merged_backward(call: AttentionCall, kernels: WindowKernels, given: Given) -> Gradients:
    """Gradients of a plan that is a window and global tokens."""
    steps, scale = _steps(call.blocks, call.q.shape[0]), call.scoring.scale
    q, k, v, out, grad_out = (as_tokens_first(t) for t in (call.q, call.k, call.v, given.out, given.some_grad_out))
    lse, grad_lse = given.lse, given.grad_lse
    # a row with infinite lse has weight exp(score - lse) = 0: global queries are done below, rows that see nothing never
    all_see = steps.split.whole and steps.window is not None
    here = lse if all_see and steps.rows is None else lse.where(lse > -torch.inf, torch.inf)
    if steps.rows is not None:
        steps.row_places.put(here.transpose(1, 2), torch.inf)
    if grad_lse is not None:
        grad_lse = grad_lse.where(lse > -torch.inf, 0).contiguous()
    given = Given(out, here, grad_out, grad_lse)
    window = steps.window
    grads = window.backward(kernels, q, k, v, given, scale) if window else [torch.zeros_like(t) for t in (q, k, v)]
    if steps.split.columns.shape[1]:
        columns.add_gradients((q, k, v), given, grads, steps.split, scale)
    if steps.rows is not None:
        _add_rows(steps, _for_rows(kernels), (q, k, v), replace(given, lse=lse), grads, scale)
    for grad, padding in zip(grads, (steps.padding_q, steps.padding_k, steps.padding_k), strict=True):
        padding.put(grad, 0)
    grad_q, grad_k, grad_v = (g.transpose(1, 2) for g in grads)
    return grad_q, grad_k, grad_v, None


def _add_rows(
    steps: _Steps, kernels: WindowKernels, inputs: tuple[Tensor, Tensor, Tensor], given: Given, grads: list[Tensor],
    scale: float,
) -> None:  # fmt: skip
    """Add what the global queries give to `grads`, in place."""
    q, k, v = inputs
    if q.is_cuda:
        from .row_kernels import add_rows_on_gpu

        steps.row_places.put(grads[0], add_rows_on_gpu(inputs, given, grads[1], grads[2], steps.split, scale))
        return
    assert steps.rows is not None
    packed = steps.rows.packed is not None
    row_q, row_grad, row_out = (steps.row_places.take(t, packed) for t in (q, given.some_grad_out, given.out))
    row_lse, row_grad_lse = (
        None if t is None else steps.row_places.take(t.transpose(1, 2), packed).transpose(-1, -2).contiguous()
        for t in (given.lse, given.grad_lse)
    )
    assert row_lse is not None
    of_rows = Given(row_out, row_lse, row_grad, row_grad_lse)
    grad_q, grad_k, grad_v = steps.rows.backward(kernels, row_q, k, v, of_rows, scale)
    steps.row_places.put(grads[0], grad_q)
    grads[1].add_(grad_k)
    grads[2].add_(grad_v)


def _for_rows(kernels: WindowKernels) -> WindowKernels:
    # a few rows against all keys: FA2 splits the keys among multiprocessors, FA4 does not on Hopper
    return window_kernels.FA2 if kernels is window_kernels.FA4 else kernels


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a window kernel: on whole batch rows, cut to `keys` keys, or on `packed` sequences."""

    window: window_kernels.Window
    packed: window_kernels.Packed | None
    keys: int

    def _inputs(self, tensors: list[Tensor], of_keys: list[bool]) -> list[Tensor]:
        if self.packed is not None:
            return [t if t.ndim == 3 else t.flatten(0, 1) for t in tensors]
        # a slice of all would take the host a view
        return [
            t[:, : self.keys] if cut and t.shape[1] != self.keys else t for t, cut in zip(tensors, of_keys, strict=True)
        ]

    def forward(self, kernels: WindowKernels, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Out shaped like q; lse `[B, H, Q]`, or `[H, T]` for a q `[T, H, D]`."""
        own_q, own_k, own_v = self._inputs([q, k, v], [False, True, True])
        out, lse = kernels.forward(own_q, own_k, own_v, self.packed, self.window, scale)
        if self.packed is not None and q.ndim == 4:
            return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
        return out, lse

    def backward(
        self, kernels: WindowKernels, q: Tensor, k: Tensor, v: Tensor, given: Given, scale: float
    ) -> list[Tensor]:
        inputs = self._inputs([q, k, v, given.out, given.some_grad_out], [False, True, True, False, False])
        lse, grad_lse = given.lse, given.grad_lse
        if self.packed is not None and q.ndim == 4:
            lse, grad_lse = (None if t is None else t.transpose(0, 1).flatten(1) for t in (lse, grad_lse))
            assert lse is not None
        own = Given(inputs[3], lse, inputs[4], grad_lse)
        grads = kernels.backward(inputs[0], inputs[1], inputs[2], own, self.packed, self.window, scale)
        if self.packed is not None:
            return [g.unflatten(0, t.shape[:2]) if t.ndim == 4 else g for g, t in zip(grads, (q, k, v), strict=True)]
        missing = k.shape[1] - self.keys
        padded = (torch.nn.functional.pad(g, (0, 0, 0, 0, 0, missing)) if missing else g for g in grads[1:])
        return [grads[0], *padded]


@dataclass(frozen=True, eq=False)
class _Steps:
    split: Split
    window: _Call | None
    rows: _Call | None
    row_places: _Places
    padding_q: _Places
    padding_k: _Places


@remembered
def _steps(plan: BlockPlan, batch: int) -> _Steps:
    """The calls that a plan is made of."""
    found = split(plan, batch)
    assert isinstance(found, Split), found
    b, q0, q1, k0, k1 = found.sequences.long().unbind(1)
    k_ranges = torch.stack((k0, k1), 1) + b[:, None] * plan.kv_len
    keys = int(k1.max()) if len(k1) else 0
    totals, device = (batch * plan.q_len, batch * plan.kv_len), plan.device
    window = rows = None
    form = found.form
    if form.window is not None:
        q_ranges = torch.stack((q0, q1), 1) + b[:, None] * plan.q_len
        packed = None if found.whole else window_kernels.pack(q_ranges, k_ranges, *totals, device)
        window = _Call((form.window.left, form.window.right), packed, keys)
    counts = found.row_counts
    if len(found.rows):
        ends = counts.cumsum(0)
        # rows that are equally many in every whole batch row need no packing
        alike = found.whole and bool((counts == counts[0]).all())
        q_ranges = torch.stack((ends - counts, ends), 1)
        packed = None if alike else window_kernels.pack(q_ranges, k_ranges, len(found.rows), totals[1], device)
        rows = _Call(window_kernels.EVERYTHING, packed, keys)
    leading = found.columns.shape[1] if found.leading and rows is not None else None
    places = _places(found.rows, plan.q_len, leading)
    padding = _places(found.padding_q, plan.q_len), _places(found.padding_k, plan.kv_len)
    return _Steps(found, window, rows, places, *padding)


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
