"""The specification: a masked softmax over the dense mask. O(n^2), for tests and for reading.

Legend: B batch, H query heads, G key heads, R = H / G, Q queries, K keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import BlockPlan
from ..dropout import kept
from ..scoring import Scoring


def refuses(q: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float) -> str | None:
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]` and lse `[B, H, Q]`, differentiable, in the dtype of q (float32 inside for half types)."""
    return look(q, k, v, plan, scoring, dropout, seed)[:2]


def look(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Out and lse as of `attend`, and the weights `[B, H, Q, K]` before dropout, from which the output is made."""
    repeats = q.shape[1] // k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.to(work).repeat_interleave(repeats, dim=1) for t in (k, v))
    mask = plan.to_dense()[:, list(plan.heads) or [0]]  # [B or 1, H or 1, Q, K]
    sees = mask.any(-1, keepdim=True)
    scores = q.to(work) @ k.transpose(-1, -2) * scoring.scale  # [B, H, Q, K]
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    if scoring.bias is not None:
        positions = torch.arange(plan.q_len, device=q.device) + plan.q_offset
        keys = torch.arange(plan.kv_len, device=q.device)
        scores = scores + scoring.bias[:, keys - positions[:, None] + positions[-1]].to(work)
    # a row that sees nothing gets harmless scores here and is emptied below, so that no NaN enters the backward
    scores = scores.masked_fill(~mask & sees, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp() * sees
    used = weights * kept(seed, *weights.shape, dropout, weights.device) / (1 - dropout) if dropout else weights
    out = (used @ v).to(q.dtype)
    return out, lse.masked_fill(~sees.squeeze(-1), -torch.inf), weights
