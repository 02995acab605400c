"""Attention over a `HashedPlan`, in plain PyTorch: any device and dtype, forward and backward, O(tiles).

Tiles are computed some at a time, in hash order, and merged into the rows of their tokens by log-sum-exp; the backward
pass recomputes the weights from lse, as FlashAttention does (Dao et al., arXiv:2205.14135).

Legend: B batch, H query heads, G key heads, X = B * H rows, N tokens, D head dim; T tiles of m queries and n keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan.hash_order import HashedPlan, TileSet
from ...plan.tile_lists import TileLists, chunk_lists
from ..backend import AttentionCall, Backend, Given, Gradients, Results
from ..dropout import Dropout, kept_at
from . import kernels

# scores that exist at once
MAX_SCORES = 1 << 20


class HashOrder(Backend):
    """Tiles of a `HashedPlan`. Plans of chunks have kernels on a GPU.

    A key that a query meets several times counts several times. A query that meets none has out 0 and lse -inf.
    """

    name = "hash_order"

    def why_not(self, call: AttentionCall) -> str | None:
        return None if call.scoring.is_plain else "tokens in hash order have no soft cap and no relative bias"

    def tables(self, call: AttentionCall) -> TileLists:
        return chunk_lists(call.plan)

    def forward(self, call: AttentionCall) -> Results:
        if kernels.can_run(call.q, call.v, call.plan):
            return kernels.forward(call)
        return _forward(call)

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        if kernels.can_run(call.q, call.v, call.plan):
            return kernels.backward(call, given)
        return _backward(call, given)


def with_weights(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: out, lse, and the weights `[B, H, Q, K]`. O(N^2)."""
    q, k, v, plan = call.q, call.k, call.v, call.plan
    work = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.to(work).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    counts = plan.counts(q.shape[2], k.shape[2]).view(*q.shape[:3], k.shape[2])
    scores = q.to(work) @ k.mT * call.scoring.scale + counts.to(work).log()
    sees = (counts > 0).any(-1, keepdim=True)
    lse = torch.where(sees, scores, 0).logsumexp(-1)
    weights = torch.where(sees, (scores - lse[..., None]).exp(), 0)
    return (weights @ v).to(q.dtype), lse.masked_fill(~sees.squeeze(-1), -torch.inf), weights


@dataclass(frozen=True)
class _Slab:
    """Some tiles, and where their rows are in tensors `[X * N, ...]` with one row more, which padding reads and writes."""

    group: TileSet
    number: int
    plan: HashedPlan

    def rows(self, tokens: Tensor, length: int, total: int, repeats: int = 1) -> Tensor:
        x = (self.group.x // repeats)[:, None]
        return torch.where(tokens >= 0, x * length + tokens, total)

    def hidden(self, q: Tensor, k: Tensor) -> Tensor:
        """The pairs `[T, m, n]` that are none."""
        q, k = q[:, :, None], k[:, None, :]
        allowed = self.group.allows(self.group.x[:, None, None], q.clamp(min=0), k.clamp(min=0))
        return ~(allowed & (q >= 0) & (k >= 0))

    def drop(self, q: Tensor, k: Tensor, dropout: Dropout) -> Tensor:
        """What dropout multiplies weights by, `[T, m, n]`."""
        assert dropout.seed is not None
        x = self.group.x[:, None, None]
        if self.plan.heads is not None:
            pair = x // self.plan.heads, x % self.plan.heads, q[:, :, None], k[:, None, :]
        else:
            # by places: each time a key is met is drawn anew
            size, place = self.plan.size, torch.arange(self.plan.size, device=x.device)
            q = self.group.i[:, None] * size + place
            k = (self.group.columns[:, :, None] * size + place).flatten(1)
            pair = x, torch.tensor(self.number, device=x.device), q[:, :, None], k[:, None, :]
        return kept_at(dropout.seed.to(x.device), *pair, dropout.p).float() / (1 - dropout.p)


def _slabs(plan: HashedPlan) -> Iterator[tuple[_Slab, Tensor, Tensor]]:
    """Slabs with their queries `[T, m]` and keys `[T, n]`: tokens, -1 for none."""
    for number, group in enumerate(plan.tile_sets):
        step = max(1, MAX_SCORES // (plan.size * plan.size * max(1, group.columns.shape[1])))
        for part in group.split(step):
            yield _Slab(part, number, plan), plan.queries(part), plan.keys(part)


def _with_spare(t: Tensor) -> Tensor:
    """`[B, H, N, ...]` as `[B * H * N + 1, ...]`: the last row is 0."""
    return torch.cat([t.flatten(0, 2), t.new_zeros(1, *t.shape[3:])])


def _forward(call: AttentionCall) -> Results:
    q, k, v, plan, scale, dropout = call.q, call.k, call.v, call.plan, call.scoring.scale, call.dropout
    work = torch.promote_types(q.dtype, torch.float32)
    rows, keys = q.shape[:3].numel(), k.shape[:3].numel()
    out = torch.zeros(rows + 1, v.shape[-1], dtype=work, device=q.device)
    lse = torch.full((rows + 1,), -torch.inf, dtype=work, device=q.device)
    flat_q, flat_k, flat_v = map(_with_spare, (q, k, v))
    for slab, tokens, seen in _slabs(plan):
        q_rows = slab.rows(tokens, q.shape[2], rows)
        k_rows = slab.rows(seen, k.shape[2], keys, plan.repeats)
        scores = (flat_q[q_rows].to(work) * scale) @ flat_k[k_rows].to(work).mT  # [T, m, n]
        scores.masked_fill_(slab.hidden(tokens, seen), -torch.inf)
        part = scores.logsumexp(-1)
        before = lse[q_rows]
        after = torch.logaddexp(before, part)
        # a row that has seen nothing yet has -inf, and -inf - -inf is NaN
        finite = after.where(after > -torch.inf, 0)
        weights = scores.sub_(finite[..., None]).exp_()
        if dropout:
            weights = weights * slab.drop(tokens, seen, dropout)
        merged = torch.baddbmm(out[q_rows] * (before - finite).exp()[..., None], weights, flat_v[k_rows].to(work))
        out[q_rows], lse[q_rows] = merged, after
    return out[:-1].to(q.dtype).view(*q.shape[:3], -1), lse[:-1].view(q.shape[:3])


def _backward(call: AttentionCall, given: Given) -> Gradients:
    q, k, v, plan, scale, dropout = call.q, call.k, call.v, call.plan, call.scoring.scale, call.dropout
    out, lse, grad_out, grad_lse = given.out, given.lse, given.some_grad_out, given.grad_lse
    work = lse.dtype
    rows, keys = q.shape[:3].numel(), k.shape[:3].numel()
    # d loss / d score = weight * (d loss / d weight - delta)
    delta = (grad_out.to(work) * out.to(work)).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse.to(work)
    sees = lse > -torch.inf
    delta, finite = _with_spare(delta.where(sees, 0)), _with_spare(lse.where(sees, 0))
    flat_q, flat_k, flat_v, flat_grad = map(_with_spare, (q, k, v, grad_out))
    grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=work) for t in (flat_q, flat_k, flat_v))
    for slab, tokens, seen in _slabs(plan):
        q_rows = slab.rows(tokens, q.shape[2], rows)
        k_rows = slab.rows(seen, k.shape[2], keys, plan.repeats)
        query, key, grad = flat_q[q_rows].to(work) * scale, flat_k[k_rows].to(work), flat_grad[q_rows].to(work)
        weights = (query @ key.mT).sub_(finite[q_rows][..., None])
        weights = weights.masked_fill_(slab.hidden(tokens, seen), -torch.inf).exp_()
        slope = grad @ flat_v[k_rows].to(work).mT  # d loss / d weight
        kept = weights
        if dropout:
            factor = slab.drop(tokens, seen, dropout)
            kept, slope = weights * factor, slope * factor
        grad_v.index_add_(0, k_rows.flatten(), (kept.mT @ grad).flatten(0, 1))
        slope = slope.sub_(delta[q_rows][..., None]).mul_(weights)
        grad_k.index_add_(0, k_rows.flatten(), (slope.mT @ query).flatten(0, 1))
        grad_q.index_add_(0, q_rows.flatten(), (slope @ key).flatten(0, 1), alpha=scale)
    grad_q, grad_k, grad_v = (g[:-1].view(t.shape).to(t.dtype) for g, t in ((grad_q, q), (grad_k, k), (grad_v, v)))
    return grad_q, grad_k, grad_v, None
