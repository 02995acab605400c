"""A few keys that all queries of a sequence see: sinks, global tokens. Merged into what a window gave, in place.

The window's result and each query's few scores merge by log-sum-exp in one pass over q and out; the backward pass adds to
the window's gradients. On a GPU that is one kernel each (`columns_kernels`), elsewhere the same arithmetic in plain PyTorch.

Legend: B batch, Q queries, K keys, H query heads, G key heads, R = H / G, D head dim, C columns; m queries of a sequence.
Tensors are `[B, Q, H, D]` and `[B, K, G, D]`, lse `[B, H, Q]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ....plan import Split


def absorb(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, split: Split, scale: float) -> None:
    """Merge the columns into `out` and `lse`, in place."""
    if q.is_cuda:
        from .columns_kernels import absorb_on_gpu

        absorb_on_gpu(q, k, v, out, lse, split, scale)
        return
    for part in _parts(q, k, split):
        scores = part.scores(q, k, scale)  # [m, G, R, C]
        old_out, old_lse = part.queries(out), part.queries(lse.mT)
        new_lse = torch.cat((old_lse[..., None], scores), -1).logsumexp(-1)
        finite = new_lse.where(new_lse > -torch.inf, 0)
        weighted = torch.einsum("mgrc,cgd->mgrd", (scores - finite[..., None]).exp(), part.columns(v).to(scores))
        new_out = old_out * (old_lse - finite).exp()[..., None] + weighted
        part.put(out, new_out)
        part.put(lse.mT, new_lse)


def add_gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, split: Split, scale: float,
) -> None:  # fmt: skip
    """Add to the gradients of q, k and v, in place, given the merged `out` and `lse` (infinite: a row that counts nothing)."""
    if q.is_cuda:
        from .columns_kernels import add_gradients_on_gpu

        add_gradients_on_gpu(grad_out, q, k, v, out, lse, grad_lse, grad_q, grad_k, grad_v, split, scale)
        return
    for part in _parts(q, k, split):
        scores = part.scores(q, k, scale)
        weights = (scores - part.queries(lse.mT)[..., None]).exp()
        grad = part.queries(grad_out).to(scores)  # [m, G, R, D]
        delta = (grad * part.queries(out)).sum(-1)
        if grad_lse is not None:
            delta = delta - part.queries(grad_lse.mT)
        change = torch.einsum("mgrd,cgd->mgrc", grad, part.columns(v).to(scores)) - delta[..., None]
        change = weights * change * scale
        query, keys = part.queries(q).to(scores), part.columns(k).to(scores)
        part.put(grad_q, part.queries(grad_q) + torch.einsum("mgrc,cgd->mgrd", change, keys))
        grad_k[part.b].index_add_(0, part.keys, torch.einsum("mgrc,mgrd->cgd", change, query).to(grad_k.dtype))
        grad_v[part.b].index_add_(0, part.keys, torch.einsum("mgrc,mgrd->cgd", weights, grad).to(grad_v.dtype))


class _Part:
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


def reach(split: Split) -> tuple[tuple[int, int], tuple[int, int]]:
    """(left, right) of the window, which holds nothing if there is none, and of what limits the columns."""
    window, clip = split.shape.window, split.shape.clip
    far = split.kv_len

    def sides(w):
        return tuple(far if side is None else min(side, far) for side in (w.left, w.right))

    return (-1, -1) if window is None else sides(window), sides(clip)


def _parts(q: Tensor, k: Tensor, split: Split) -> Iterator[_Part]:
    for row, keys in zip(split.sequences.tolist(), split.columns, strict=True):
        yield _Part(split, row, keys, k.shape[2])
