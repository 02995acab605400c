"""A few keys that all queries of a sequence see: sinks, global tokens. Merged into what a window gave, in place.

The window's result and each query's few scores merge by log-sum-exp in one pass over q and out; the backward pass adds to
the window's gradients. On a GPU that is one kernel each (`columns_kernels`), elsewhere the same arithmetic in plain PyTorch.

Legend: B batch, Q queries, K keys, H query heads, G key heads, R = H / G, D head dim, C columns; m queries of a sequence.
Tensors are `[B, Q, H, D]` and `[B, K, G, D]`, lse `[B, H, Q]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ....plan import Split
from ...backend import Given
from .column_reach import reach


def absorb(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, split: Split, scale: float) -> None:
    """Merge the columns into `out` and `lse`, in place."""
    if q.is_cuda:
        from .column_kernels import absorb_on_gpu

        absorb_on_gpu(q, k, v, out, lse, split, scale)
        return
    for own in _by_sequence(q, k, split):
        scores = own.scores(q, k, scale)  # [m, G, R, C]
        old_out, old_lse = own.queries(out), own.queries(lse.mT)
        new_lse = torch.cat((old_lse[..., None], scores), -1).logsumexp(-1)
        finite = new_lse.where(new_lse > -torch.inf, 0)
        weighted = torch.einsum("mgrc,cgd->mgrd", (scores - finite[..., None]).exp(), own.columns(v).to(scores))
        new_out = old_out * (old_lse - finite).exp()[..., None] + weighted
        own.put(out, new_out)
        own.put(lse.mT, new_lse)


def add_gradients(inputs: Sequence[Tensor], given: Given, grads: Sequence[Tensor], split: Split, scale: float) -> None:
    """Add to the gradients of q, k and v, in place; `given` is of the whole (infinite lse: a row that counts nothing)."""
    (q, k, v), (grad_q, grad_k, grad_v) = inputs, grads
    out, lse, grad_out, grad_lse = given.out, given.lse, given.some_grad_out, given.grad_lse
    if q.is_cuda:
        from .column_kernels import add_gradients_on_gpu

        add_gradients_on_gpu(inputs, given, grads, split, scale)
        return
    for own in _by_sequence(q, k, split):
        scores = own.scores(q, k, scale)
        weights = (scores - own.queries(lse.mT)[..., None]).exp()
        grad = own.queries(grad_out).to(scores)  # [m, G, R, D]
        delta = (grad * own.queries(out)).sum(-1)
        if grad_lse is not None:
            delta = delta - own.queries(grad_lse.mT)
        change = torch.einsum("mgrd,cgd->mgrc", grad, own.columns(v).to(scores)) - delta[..., None]
        change = weights * change * scale
        query, keys = own.queries(q).to(scores), own.columns(k).to(scores)
        own.put(grad_q, own.queries(grad_q) + torch.einsum("mgrc,cgd->mgrd", change, keys))
        grad_k[own.b].index_add_(0, own.keys, torch.einsum("mgrc,mgrd->cgd", change, query).to(grad_k.dtype))
        grad_v[own.b].index_add_(0, own.keys, torch.einsum("mgrc,mgrd->cgd", weights, grad).to(grad_v.dtype))


class _SequenceColumns:
    """The columns of one sequence."""

    def __init__(self, split: Split, row: list[int], keys: Tensor, groups: int):
        self.split, self.groups = split, groups
        self.b, self.first, self.last = row[:3]
        self.keys = keys[keys >= 0].long()

    def queries(self, t: Tensor) -> Tensor:
        """The sequence's share of `[B, Q, H, ...]` as `[m, G, R, ...]`."""
        return t[self.b, self.first : self.last].unflatten(1, (self.groups, -1))

    def columns(self, t: Tensor) -> Tensor:
        return t[self.b, self.keys]  # [C, G, D]

    def put(self, t: Tensor, value: Tensor) -> None:
        t[self.b, self.first : self.last] = value.flatten(1, 2).to(t.dtype)

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """`[m, G, R, C]`, -inf where the window holds the pair or it is out of reach."""
        work = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("mgrd,cgd->mgrc", self.queries(q).to(work), self.columns(k).to(work)) * scale
        x = torch.arange(self.first, self.last, device=q.device) + self.split.q_offset
        distance = self.keys - x[:, None]
        window, clip = reach(self.split)
        seen = (distance >= -clip[0]) & (distance <= clip[1]) & ~((distance >= -window[0]) & (distance <= window[1]))
        return scores.masked_fill(~seen[:, None, None], -torch.inf)


def _by_sequence(q: Tensor, k: Tensor, split: Split) -> Iterator[_SequenceColumns]:
    for row, keys in zip(split.sequences.tolist(), split.columns, strict=True):
        yield _SequenceColumns(split, row, keys, k.shape[2])
