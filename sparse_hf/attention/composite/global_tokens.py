"""Marked tokens whose number only the kernels read, so that a CUDA graph may hold the call: what tables weigh depends on lengths alone.

A window is any backend's; marked keys are merged into it in one pass (`global_token_kernels.py`); rows of marked queries are
FlashAttention's,
side by side and packed. Other batches mark other tokens in the same graph, and the host never waits to hear how many.

Legend: B batch, N tokens, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...pattern.forms import MarkedForm, read_marked
from ...plan import NOTHING, AnyPlan, find_plan
from ..backend import AttentionCall, Backend, Given, Gradients, Results
from ..backends.flash.window_kernels import EVERYTHING, FA2
from ..backends.triton.walk import IS_INSTALLED
from ..devices import HALF_TYPES, generation
from ..strides import as_tokens_first, readable
from .marked_places import Places, find

# numbers in q up to which the host is what a call waits for; beyond, calls that know how many marks there are are faster
MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class MarkedPlan:
    """The form of a pattern, and the plan of its window (None: it has none)."""

    form: MarkedForm
    window: AnyPlan | None

    @property
    def heads(self) -> tuple[int, ...]:
        return ()

    @property
    def batch_rows(self) -> int:
        return 1


def why_not_tensors(call: AttentionCall) -> str | None:
    """Why the call cannot be run, whatever its pattern is. Graphs trace it."""
    q, batch = call.q, call.batch
    if batch.marks is None or batch.padding is not None or batch.segments is not None:
        return "it is for calls with marks and nothing else of the batch"
    if not q.is_cuda or q.dtype not in HALF_TYPES or q.shape[-1] != call.v.shape[-1]:
        return "it is for 16 bits on a GPU, with equal head dims"
    if q.shape[-1] % 8 or q.shape[-1] > 256 or not call.scoring.is_plain or call.dropout:
        return "FlashAttention has other head dims, and neither soft cap, bias nor dropout of ours"
    is_whole = call.q_offset == 0 and q.shape[2] == call.k.shape[2] and batch.marks.shape == (q.shape[0], q.shape[2])
    if not is_whole or q.numel() > MAX_ELEMENTS:
        return f"it is for whole texts of up to {MAX_ELEMENTS} numbers in q"
    return None


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def takes_pattern(pattern: str, device: torch.device) -> bool:
    """Is a pattern a window and marked tokens, on a GPU that has the kernels?"""
    return IS_INSTALLED and generation(device) >= 8 and read_marked(pattern) is not None


@dataclass(frozen=True)
class GlobalTokens(Backend):
    """A window on the backend that `pick` chooses, and marked tokens whose number only kernels read."""

    pick: Callable[[AttentionCall], Backend]
    name = "global tokens"

    def why_not(self, call: AttentionCall) -> str | None:
        if not call.recorded:
            return "it is for calls that a CUDA graph may record"
        reason = why_not_tensors(call)
        if reason:
            return reason
        if not takes_pattern(str(call.pattern), call.q.device):
            return "it needs triton, compute capability 8.0, and a pattern that is a window and marked tokens"
        return None

    def tables(self, call: AttentionCall) -> AnyPlan | None:
        return _planned(call).window

    def forward(self, call: AttentionCall) -> Results:
        plan, scale = _planned(call), call.scoring.scale
        q, k, v = readable(call.q), readable(call.k), readable(call.v)
        places = find(_marks(call))
        if plan.window is None:
            out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        else:
            window = call.part(q, k, v, plan.window)
            out, lse = self.pick(window).forward(window)
            out = readable(out)
        if plan.form.keys:
            from .global_token_kernels import absorb

            absorb(q, k, v, out, lse, places, _limits(plan, q), scale)
        if plan.form.rows:
            k, v = (as_tokens_first(t).flatten(0, 1) for t in (k, v))
            rows, row_lse = FA2.forward(places.take(q), k, v, places.packed(), EVERYTHING, scale)
            out = torch.where(places.marks[:, None, :, None], places.put(rows, out), out)
            lse = torch.where(places.marks[:, None], places.put(row_lse.mT, lse), lse)
        return out, lse

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        plan, scale, lse = _planned(call), call.scoring.scale, given.lse
        q, k, v = readable(call.q), readable(call.k), readable(call.v)
        out, grad_out = readable(given.out), readable(given.some_grad_out)
        places = find(_marks(call))
        # a row with infinite lse has weight exp(score - lse) = 0: those of marked queries are done below, empty ones never
        here = lse if plan.window is not None else lse.where(lse > -torch.inf, torch.inf)
        here = here.masked_fill(places.marks[:, None], torch.inf) if plan.form.rows else here
        own = Given(out, here, grad_out, given.grad_lse)
        if plan.window is None:
            grads = [torch.zeros_like(t) for t in (q, k, v)]
        else:
            window = call.part(q, k, v, plan.window)
            grads = [readable(grad) for grad in self.pick(window).backward(window, own)[:3]]
        if plan.form.keys:
            from .global_token_kernels import add_gradients

            add_gradients((q, k, v), own, grads, places, _limits(plan, q), scale)
        if plan.form.rows:
            of_rows = _row_gradients((q, k, v), Given(out, lse, grad_out, given.grad_lse), places, scale)
            for total, grad in zip(grads, of_rows, strict=True):
                total += grad
        return grads[0], grads[1], grads[2], None


def _row_gradients(inputs: Sequence[Tensor], given: Given, places: Places, scale: float) -> tuple[Tensor, ...]:
    """What the rows of marked queries add to the gradients of q, k and v."""
    q, k, v = inputs
    row_grad, row_q, row_out = (places.take(t) for t in (given.some_grad_out, q, given.out))
    row_lse, row_grad_lse = (None if t is None else places.take(t).mT.contiguous() for t in (given.lse, given.grad_lse))
    assert row_lse is not None
    keys, values = (as_tokens_first(t).flatten(0, 1) for t in (k, v))
    of_rows = Given(row_out, row_lse, row_grad, row_grad_lse)
    grad_q, *of_keys = FA2.backward(row_q, keys, values, of_rows, places.packed(), EVERYTHING, scale)
    grad_q = torch.where(places.marks[:, None, :, None], places.put(grad_q, q), 0)
    return grad_q, *(g.unflatten(0, (q.shape[0], -1)).transpose(1, 2) for g in of_keys)


def _planned(call: AttentionCall) -> MarkedPlan:
    if call.chosen_plan is None:
        form = read_marked(str(call.pattern))
        assert form is not None
        window = None
        if form.window is not None:
            key = replace(call.plan_key, pattern=form.window)
            window = find_plan(key, NOTHING)
        call.chosen_plan = MarkedPlan(form, window)
    return call.chosen_plan


def _marks(call: AttentionCall) -> Tensor:
    assert call.batch.marks is not None
    return call.batch.marks


def _limits(plan: MarkedPlan, q: Tensor) -> tuple[int, int, int, int]:
    """How far the window reaches, left and right (no pair: not even to itself), and the columns."""
    far, window = q.shape[2], plan.form.window
    if window is None:
        return -1, -1, far, far
    left, right = (far if side is None else min(side, far) for side in (window.left, window.right))
    return left, right, far, far
