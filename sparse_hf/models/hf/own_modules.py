"""Attention modules that compute by themselves, without Transformers' attention interface: how they call ours.

Legend: B batch, H heads, Q queries, K keys, D and E head dims of keys and of values.
"""

from __future__ import annotations

from torch import Tensor

from ...attention import attention, with_weights
from ...attention.backend import AttentionCall
from ...attention.dropout import Dropout
from ...attention.scoring import Scoring
from ...pattern import Pattern
from ...plan import BatchInfo
from .config import IMPLEMENTATIONS, SparseConfigMixin


def backend_of(config: SparseConfigMixin) -> str:
    """The backend that a configuration's attention implementation stands for."""
    name = config._attn_implementation
    assert name is not None
    return IMPLEMENTATIONS[name]


def attend_by_pattern(
    config: SparseConfigMixin,
    qkv: tuple[Tensor, Tensor, Tensor],
    pattern: str,
    batch: BatchInfo,
    *,
    q_offset: int | None = None,
    dropout: float = 0.0,
    wants_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention `[B, H, Q, E]`, and the weights `[B, H, Q, K]` if asked for.

    Args:
        qkv: `[B, H, Q, D]`, `[B, H, K, D]`, `[B, H, K, E]`.
        batch: what layers of a forward pass share.
        q_offset: key index of the first query; by default queries are the last of the tokens.
    """
    q, k, v = qkv
    scoring, q_offset = Scoring(q.shape[-1] ** -0.5), k.shape[2] - q.shape[2] if q_offset is None else q_offset
    call = AttentionCall(q, k, v, pattern, q_offset, scoring, Dropout.draw(dropout), batch, wants_lse=False)
    if not wants_weights:
        return attention(call, backend_of(config))[0], None
    call.pattern = Pattern.parse(pattern)
    out, _, weights = with_weights(call)
    return out, weights
