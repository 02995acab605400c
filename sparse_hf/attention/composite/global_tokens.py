"""Marked tokens whose number only the kernels read, so that a CUDA graph may hold the call: what tables weigh depends on lengths alone.

A window is any backend's; marked keys are merged into it in one pass (`marked_kernels.py`); rows of marked queries are FlashAttention's,
side by side and packed. Other batches mark other tokens in the same graph, and the host never waits to hear how many.

Legend: B batch, N tokens, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ...pattern.forms import MarkedForm, read_marked
from ...plan import AnyPlan
from ..autograd import part_gradients
from ..backends.flash import window_kernels as flash
from ..backends.triton.backend import IS_INSTALLED
from ..scoring import Scoring
from ..strides import readable

# numbers in q up to which the host is what a call waits for; beyond, parts that know how many marks there are are faster
UP_TO = 1 << 24


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def _can(text: str, device: torch.device) -> bool:
    return read_marked(text) is not None and IS_INSTALLED and flash.generation(device) >= 8


def suits(
    backend: str, q: Tensor, k: Tensor, v: Tensor, text: str, q_offset: int, batch: tuple[Tensor | None, ...], scoring: Scoring,
    dropout: float,
) -> bool:  # fmt: skip
    """May such a call be computed here? Only "auto" may choose."""
    padding, documents, marks = batch
    if backend != "auto" or marks is None or padding is not None or documents is not None:
        return False
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] != v.shape[-1]:
        return False
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and scoring.is_plain and not dropout
    is_whole = q_offset == 0 and q.shape[2] == k.shape[2] and marks.shape == (q.shape[0], q.shape[2])
    return fits and is_whole and q.numel() <= UP_TO and _can(text, q.device)


@dataclass(frozen=True)
class Places:
    """Where the marked tokens of each row stand."""

    marks: Tensor  # [B, N] bool
    rank: Tensor  # [B, N] int64: of a marked token, how many stand before it
    index: Tensor  # [B, N] int32: the marked tokens in order, then -1
    counts: Tensor  # [B] int32

    def take(self, t: Tensor) -> Tensor:
        """Of `[B, heads, N, ...]` the marked tokens and then anything, packed: `[B * N, heads, ...]`."""
        return t.transpose(1, 2).flatten(0, 1)[self._flat(self.index.clamp(min=0))]

    def put(self, t: Tensor, like: Tensor) -> Tensor:
        """The way back: `[B, heads, N, ...]`, anything where nothing is marked."""
        return t[self._flat(self.rank)].unflatten(0, self.marks.shape).transpose(1, 2).to(like.dtype)

    def _flat(self, index: Tensor) -> Tensor:
        batch, length = index.shape
        return (index + torch.arange(batch, device=index.device)[:, None] * length).flatten()

    def packed(self) -> flash.Packed:
        """Marked tokens of a row against all its keys; what follows them sees none."""
        batch, length = self.marks.shape
        queries = torch.stack((self.counts, length - self.counts), 1).flatten()
        keys = torch.where(torch.arange(2 * batch, device=queries.device) % 2 == 0, length, 0)
        cu_q, cu_k = (torch.nn.functional.pad(t.cumsum(0, dtype=torch.int32), (1, 0)) for t in (queries, keys))
        return flash.Packed(cu_q, cu_k, length, length)


def find(marks: Tensor) -> Places:
    """Look up the marked tokens without waiting for them."""
    marks = marks.bool()
    batch, length = marks.shape
    upto = marks.cumsum(1)
    rank = (upto - 1).clamp(min=0)
    index = torch.full((batch, length + 1), -1, dtype=torch.int32, device=marks.device)
    # what is not marked is written to a column that is cut off
    tokens = torch.arange(length, device=marks.device, dtype=torch.int32).expand(batch, -1)
    index.scatter_(1, torch.where(marks, rank, length), tokens)
    return Places(marks, rank, index[:, :length].contiguous(), upto[:, -1].int())


@dataclass(frozen=True)
class Marked:
    """Stands where a plan stands: the parts of a pattern, and the plan of its window."""

    parts: MarkedForm
    window: AnyPlan | None
    marks: Tensor


@dataclass(frozen=True)
class Composition:
    """Stands where a backend stands; `backend` is the window's."""

    backend: ModuleType | None
    # `backward` takes None for a gradient of zero
    NONE_IS_ZERO = True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Marked, scoring: Scoring, dropout: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Out `[B, H, N, D]` in the dtype of q and lse `[B, H, N]`; autograd, which an operator takes care of, does not come here."""
        q, k, v = map(readable, (q, k, v))
        places = find(plan.marks)
        if plan.window is None:
            out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        else:
            out, lse = self.backend.attend(q, k, v, plan.window, scoring, 0.0, None)
            out = readable(out)
        if plan.parts.keys:
            from .global_tokens_kernels import absorb

            absorb(q, k, v, out, lse, places, _limits(plan), scoring.scale)
        if plan.parts.rows:
            k, v = (flash.heads_last(t).flatten(0, 1) for t in (k, v))
            rows, row_lse = flash.FA2.forward(places.take(q), k, v, places.packed(), flash.EVERYTHING, scoring.scale)
            out = torch.where(places.marks[:, None, :, None], places.put(rows, out), out)
            lse = torch.where(places.marks[:, None], places.put(row_lse.mT, lse), lse)
        return out, lse

    def backward(
        self, q, k, v, out, lse, grad_out, grad_lse, plan: Marked, scoring: Scoring, dropout: float, seed
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k, v and no bias, given those of out and lse (None: zero)."""
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        q, k, v, out, grad_out = map(readable, (q, k, v, out, grad_out))
        places, scale = find(plan.marks), scoring.scale
        # a row with infinite lse has weight exp(score - lse) = 0: those of marked queries are done below, empty ones never
        here = lse if plan.window is not None else lse.where(lse > -torch.inf, torch.inf)
        here = here.masked_fill(places.marks[:, None], torch.inf) if plan.parts.rows else here
        if plan.window is None:
            grads = [torch.zeros_like(t) for t in (q, k, v)]
        else:
            results = out, here, grad_out, grad_lse
            found = part_gradients(self.backend, [q, k, v], *results, plan.window, scoring)
            grads = [readable(grad) for grad in found]
        if plan.parts.keys:
            from .global_tokens_kernels import add_gradients

            results = out, here, grad_lse, *grads
            add_gradients(grad_out, q, k, v, *results, places, _limits(plan), scale)
        if plan.parts.rows:
            for total, grad in zip(
                grads, self._row_gradients(q, k, v, out, lse, grad_out, grad_lse, places, scale), strict=True
            ):
                total += grad
        return *grads, None

    @staticmethod
    def _row_gradients(q, k, v, out, lse, grad_out, grad_lse, places: Places, scale: float) -> tuple[Tensor, ...]:
        of_rows = [places.take(t) for t in (grad_out, q, out)]
        row_lse, row_grad_lse = (None if t is None else places.take(t).mT.contiguous() for t in (lse, grad_lse))
        keys = [flash.heads_last(t).flatten(0, 1) for t in (k, v)]
        rest = row_lse, row_grad_lse, places.packed(), flash.EVERYTHING, scale
        grad_q, *of_keys = flash.FA2.backward(*of_rows[:2], *keys, of_rows[2], *rest)
        grad_q = torch.where(places.marks[:, None, :, None], places.put(grad_q, q), 0)
        return grad_q, *(g.unflatten(0, (q.shape[0], -1)).transpose(1, 2) for g in of_keys)


def _limits(plan: Marked) -> tuple[int, int, int, int]:
    """How far the window reaches, left and right (no pair: not even to itself), and the columns."""
    far = plan.marks.shape[1]
    if plan.window is None:
        return -1, -1, far, far
    window = plan.parts.window
    return *(far if side is None else min(side, far) for side in (window.left, window.right)), far, far
