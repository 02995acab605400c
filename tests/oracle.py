"""What the tests compare with: pairs by brute force, attention in float64. Nothing here uses plans or backends."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf import Pattern
from sparse_hf.pattern.base import Marks


def positions(real: Tensor, documents: Tensor) -> Tensor:
    """Position of each token in its own document, token by token; -1 on padding."""
    found = []
    for row, document in zip(real.tolist(), documents.tolist(), strict=True):
        first: dict[int, int] = {}
        found.append([x - first.setdefault(document[x], x) if row[x] else -1 for x in range(len(row))])
    return torch.tensor(found)


def dense_mask(
    pattern: str, q_len: int, kv_len: int, real: Tensor | None = None, documents: Tensor | None = None, marks=None
) -> Tensor:
    """`[B, H or 1, Q, K]`: the pairs of the pattern, same document, no padding."""
    batch = next((t.shape[0] for t in (real, documents, marks) if t is not None), 1)
    real = torch.ones(batch, kv_len, dtype=torch.bool) if real is None else real.bool()
    documents = torch.zeros(batch, kv_len, dtype=torch.long) if documents is None else documents
    marks = torch.zeros(batch, kv_len, dtype=torch.bool) if marks is None else marks.bool()
    place = positions(real, documents)
    offset = kv_len - q_len
    q, k = place[:, offset:, None], place[:, None, :]
    together = (documents[:, offset:, None] == documents[:, None, :]) & real[:, offset:, None] & real[:, None, :]
    parsed = Pattern.parse(pattern)
    q, k = q.clamp(min=0), k.clamp(min=0)
    # how long the document of each query is
    length = 1 + torch.where(together, k, 0).amax(-1, keepdim=True)
    about = Marks(marks[:, offset:, None], marks[:, None, :], length)
    masks = [p.allows(q, k, about) & together for p in parsed.heads or (parsed,)]
    return torch.stack(masks, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dense masked attention in the dtype given, `factor` multiplying the weights (dropout); rows without keys give 0."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    low = max(-1e30, torch.finfo(q.dtype).min)
    weights = torch.where(
        mask, (scores - scores.masked_fill(~mask, low).amax(-1, keepdim=True).detach()).clamp(max=0).exp(), 0
    )
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)
    lse = torch.where(mask.any(-1), torch.logsumexp(scores.masked_fill(~mask, low), -1), -torch.inf)
    return (weights if factor is None else weights * factor) @ v, lse


def gradients(function, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Out, lse and the gradients of q, k, v under a fixed random loss of both."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    out, lse = function(q, k, v)
    generator = torch.Generator().manual_seed(out.numel())
    of_out = torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out)
    of_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float32).to(lse)
    loss = (out * of_out).sum() + (torch.where(lse > -torch.inf, lse, 0) * of_lse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))
