"""The specification: a masked softmax over the dense mask. O(n^2), for tests and for reading.

Legend: B batch, H query heads, G key heads, R = H / G, Q queries, K keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import AutogradBackend
from ..backend import AttentionCall, Results
from ..dropout import kept


class Reference(AutogradBackend):
    """Dense attention under a mask, differentiated by autograd."""

    name = "reference"

    def why_not(self, call: AttentionCall) -> str | None:
        return None

    def forward(self, call: AttentionCall) -> Results:
        """Out and lse in the dtype of q, computed in float32 for half types."""
        out, lse, _ = with_weights(call)
        return out, lse


def with_weights(call: AttentionCall, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse, and the weights `[B, H, Q, K]` before dropout, from which the output is made.

    Args:
        call: what to compute.
        mask: `[B or 1, H or 1, Q, K]` bool, instead of that of the call's plan.
    """
    q, k, v, scoring, dropout = call.q, call.k, call.v, call.scoring, call.dropout
    if mask is None:
        mask = call.blocks.to_dense()[:, list(call.blocks.heads) or [0]]
    repeats = q.shape[1] // k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.to(work).repeat_interleave(repeats, dim=1) for t in (k, v))
    sees = mask.any(-1, keepdim=True)
    scores = q.to(work) @ k.transpose(-1, -2) * scoring.scale  # [B, H, Q, K]
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    if scoring.bias is not None:
        positions = torch.arange(q.shape[2], device=q.device) + call.q_offset
        keys = torch.arange(k.shape[2], device=q.device)
        scores = scores + scoring.bias[:, keys - positions[:, None] + positions[-1]].to(work)
    # a row that sees nothing gets harmless scores here and is emptied below, so that no NaN enters the backward
    scores = scores.masked_fill(~mask & sees, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp() * sees
    used = weights
    if dropout:
        assert dropout.seed is not None
        used = weights * kept(dropout.seed, weights, dropout.p) / (1 - dropout.p)
    out = (used @ v).to(q.dtype)
    return out, lse.masked_fill(~sees.squeeze(-1), -torch.inf), weights
