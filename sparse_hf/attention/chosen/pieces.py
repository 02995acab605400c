"""Attention over chosen keys in plain PyTorch: any device and dtype, forward and backward, some queries at a time.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D and E head dims of keys and values; C heads of the choice, N
chosen keys of a query; P rows of heads that read other keys than their neighbours, R = H / P query heads of each; a piece has p of
these rows and m queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import AttentionCall, Given, Gradients, Results
from ..dropout import kept_at
from ..strides import like

# numbers of keys and values that are gathered at once
MAX_GATHERED = 1 << 21


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some queries of some heads of a batch row."""

    call: AttentionCall
    b: int
    heads: slice  # of P
    queries: slice

    @property
    def split(self) -> tuple[int, int]:
        """P and R."""
        rows = rows_of(self.call)
        return rows, self.call.q.shape[1] // rows

    def take(self, t: Tensor) -> Tensor:
        """`[p, m, R, ...]` of a tensor `[B, H, Q, ...]`; to write to where its memory allows a view."""
        return t[self.b].unflatten(0, self.split)[self.heads, :, self.queries].transpose(1, 2)

    def index(self) -> Tensor:
        """`[p, m, N]`: the keys, -1 for none."""
        plan = self.call.plan
        b = self.b if plan.shape[0] > 1 else 0
        found = plan.keys(b, self._of_rows(plan.shape[1]), self.queries).long()
        return found.where((found >= 0) & (found < self.call.k.shape[2]), -1)

    def _of_rows(self, heads: int) -> Tensor:
        """`[p]`: which of `heads` each row reads."""
        rows = self.split[0]
        return torch.arange(rows, device=self.call.q.device)[self.heads] * heads // rows

    def places(self, index: Tensor) -> Tensor:
        """`[p * m * N]`: where the keys are in `[G * K, ...]`."""
        groups, keys = self.call.k.shape[1:3]
        return (index.clamp(min=0) + self._of_rows(groups)[:, None, None] * keys).flatten()

    def drop(self, index: Tensor) -> Tensor:
        """What dropout multiplies weights by, `[p, m, R, N]`."""
        dropout, (rows, repeats) = self.call.dropout, self.split
        assert dropout.seed is not None
        device = index.device
        head = torch.arange(rows * repeats, device=device).view(rows, repeats)[self.heads][:, None, :, None]
        query = torch.arange(self.call.q.shape[2], device=device)[self.queries][:, None, None]
        b = torch.tensor(self.b, device=device)
        kept = kept_at(dropout.seed.to(device), b, head, query, index.clamp(min=0)[:, :, None], dropout.p)
        return kept.float() / (1 - dropout.p)


def rows_of(call: AttentionCall) -> int:
    """P: as many rows as key heads or as the choice has heads, whatever is more."""
    return max(call.k.shape[1], call.plan.shape[1])


def _pieces(call: AttentionCall) -> Iterator[_Piece]:
    batch, _, queries, dim = call.q.shape
    rows, chosen = rows_of(call), call.plan.shape[3]
    most = max(1, MAX_GATHERED // max(1, chosen * (dim + call.v.shape[3])))
    some_rows, some_queries = max(1, most // max(1, queries)), min(most, queries)
    for b in range(batch):
        for row in range(0, rows, some_rows):
            for first in range(0, queries, max(1, some_queries)):
                yield _Piece(call, b, slice(row, row + some_rows), slice(first, first + some_queries))


def _work(call: AttentionCall) -> torch.dtype:
    return torch.promote_types(call.q.dtype, torch.float32)


def _scores(piece: _Piece, index: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores `[p, m, R, N]`, -inf where there is no key, and their slope by the product, if that is not 1."""
    scores, cap, slope = query @ key.mT, piece.call.scoring.softcap, None
    if cap is not None:
        scores = scores.div_(cap).tanh_()
        slope = 1 - scores.square()
        scores = scores.mul_(cap)
    return scores.masked_fill_(index[:, :, None] < 0, -torch.inf), slope


def forward(call: AttentionCall) -> Results:
    """Out `[B, H, Q, E]` and lse `[B, H, Q]`."""
    q, k, v = call.q, call.k, call.v
    work = _work(call)
    out = like(q, v.shape[3]).zero_()
    lse = torch.full(q.shape[:3], -torch.inf, dtype=work, device=q.device)
    if not k.shape[2]:
        return out, lse
    keys, values = (t.flatten(1, 2) for t in (k, v))
    for piece in _pieces(call):
        index = piece.index()
        places, shape = piece.places(index), (*index.shape, -1)
        key, value = (t[piece.b].index_select(0, places).to(work).view(shape) for t in (keys, values))
        scores, _ = _scores(piece, index, piece.take(q).to(work) * call.scoring.scale, key)
        found = scores.logsumexp(-1)
        # a row that sees nothing has -inf, and -inf - -inf is NaN
        weights = scores.sub_(found.where(found > -torch.inf, 0)[..., None]).exp_()
        if call.dropout:
            weights = weights * piece.drop(index)
        piece.take(out).copy_(weights @ value)
        piece.take(lse).copy_(found)
    return out, lse


def backward(call: AttentionCall, given: Given) -> Gradients:
    """Gradients of q, k and v."""
    q, k, v, scale = call.q, call.k, call.v, call.scoring.scale
    out, lse, grad_out, grad_lse = given.out, given.lse, given.some_grad_out, given.grad_lse
    work = lse.dtype
    grad_q = like(q).zero_()
    grad_k, grad_v = (torch.zeros_like(t.flatten(1, 2), dtype=work) for t in (k, v))
    keys, values = (t.flatten(1, 2) for t in (k, v))
    for piece in _pieces(call) if k.shape[2] else ():
        index = piece.index()
        places, shape = piece.places(index), (*index.shape, -1)
        key, value = (t[piece.b].index_select(0, places).to(work).view(shape) for t in (keys, values))
        query, grad = piece.take(q).to(work) * scale, piece.take(grad_out).to(work)
        scores, slope = _scores(piece, index, query, key)
        of_row = piece.take(lse)
        weights = scores.sub_(of_row.where(of_row > -torch.inf, torch.inf)[..., None]).exp_()
        # d loss / d score = weight * (d loss / d weight - delta)
        delta = (grad * piece.take(out).to(work)).sum(-1)
        if grad_lse is not None:
            delta = delta - piece.take(grad_lse).to(work)
        change, kept = grad @ value.mT, weights
        if call.dropout:
            factor = piece.drop(index)
            change, kept = change * factor, weights * factor
        grad_v[piece.b].index_add_(0, places, (kept.mT @ grad).flatten(0, 2))
        change = change.sub_(delta[..., None]).mul_(weights)
        if slope is not None:
            change = change.mul_(slope)
        grad_k[piece.b].index_add_(0, places, (change.mT @ query).flatten(0, 2))
        piece.take(grad_q).copy_((change @ key) * scale)
    return grad_q, grad_k.view_as(k).to(k.dtype), grad_v.view_as(v).to(v.dtype), None
