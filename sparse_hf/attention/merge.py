"""Exact merge of attention over disjoint sets of keys, by log-sum-exp.

Global rows, sinks, LSH rounds and remote shards are all this merge (Rabe and Staats, arXiv:2112.05682).
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

# what stands for the lse of a call that does not want it
NO_LSE = torch.empty(0)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge `(out [..., Q, D], lse [..., Q])` pairs; a part that saw nothing has lse -inf. Differentiable."""
    top = torch.stack([lse for _, lse in parts]).amax(0).detach()
    # a row that no part saw: subtracting -inf would give NaN
    finite = top.where(top > -torch.inf, 0)
    weights = [(lse - finite).exp() for _, lse in parts]
    total = torch.stack(weights).sum(0)
    seen = total > 0
    total = total.where(seen, 1)
    shares = [part * (weight / total)[..., None] for (part, _), weight in zip(parts, weights, strict=True)]
    out = reduce(torch.add, shares)
    return out.to(parts[0][0].dtype), (finite + total.log()).where(seen, -torch.inf)


def with_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Out `[B, H, Q, D]` as if each head had one more key, with the logit `sinks` `[H]` for every query and no value.

    Only the denominator grows: weights shrink by exp(lse) / (exp(lse) + exp(sink)). Differentiable in all three. A row that saw
    nothing stays 0.
    """
    share = (lse - sinks.to(lse.dtype)[:, None]).sigmoid()  # [B, H, Q]
    return (out * share[..., None]).to(out.dtype)
