"""Dense attention from one sequence to another, which is linear in either, and never a tensor of both lengths.

Legend: B batch, H heads, Q queries, K keys, D and E head dims of keys and of values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ...attention import sparse_attention
from ...pattern import MarkedKeys

KEPT = str(MarkedKeys())


def attend_across(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, dropout: float = 0.0) -> Tensor:
    """`[B, H, Q, E]`: every query reads every real key.

    Args:
        q, k, v: `[B, H, Q, D]`, `[B, H, K, D]`, `[B, H, K, E]`.
        real: `[B, K]` bool, or None if all keys are. A row without any gives 0.
        dropout: probability with which a weight is dropped.
    """
    if dropout and q.device.type == "cpu":
        return _dropping(q, k, v, real, dropout)
    scale, width = q.shape[-1] ** -0.5, max(q.shape[-1], v.shape[-1])
    # the kernels without a tensor of both lengths want one head dim; zeros change neither scores nor values
    values = v.shape[-1]
    q, k, v = (pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    mask = None if real is None else real[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)[..., :values]


def _dropping(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, dropout: float) -> Tensor:
    """The same by our plans, because PyTorch's CPU kernel drops no weights and would fall back to one that makes them all.

    Plans are for queries that are tokens among the keys, so that keys are marked instead of padded, and there are at least
    as many as queries.
    """
    short = max(0, q.shape[2] - k.shape[2])
    if real is None:
        real = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
    k, v = (pad(t, (0, 0, 0, short)) for t in (k, v))
    marks = pad(real, (0, short)).expand(q.shape[0], -1)
    out = sparse_attention(q, k, v, KEPT, marks=marks, q_offset=0, dropout=dropout)
    assert isinstance(out, Tensor)
    return out


def attend_across_with_weights(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The definition: the output, and the weights `[B, H, Q, K]` on the way to it."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, Q, K]
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
    weights = scores.softmax(-1)
    if real is not None:
        weights = weights.where(real.any(1)[:, None, None, None], 0)
    weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ v, weights
