"""Attention of Reformer's chunks: `lsh_chunks(...)` in hash order, `ring(...)` in the order of positions.

Legend: B batch, H heads, R rounds, N tokens, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from ...plan import NOTHING
from ...plan.hash_order import Chunking, plan_chunks
from ..autograd import AutogradBackend, attend
from ..backend import AttentionCall, Backend, Results
from ..dropout import NO_DROPOUT, Dropout
from ..operator import has_no_content, register
from ..scoring import Scoring
from . import hash_order, kernels

BACKENDS = ("auto", "blockwise", "reference")
# what a query may see of its neighbours in the ring: its past only, and itself
Sees = tuple[bool, bool]


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunking: Chunking,
    *,
    buckets: Tensor | None = None,
    real: Tensor | None = None,
    is_causal: bool = False,
    sees_itself: bool = True,
    scale: float = 1.0,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention within chunks and to their neighbours in the ring (Reformer, arXiv:2001.04451, section 2).

    Rounds are merged by log-sum-exp: a key that a query meets several times counts several times.

    Args:
        q, k, v: `[B, H, N, D]`.
        chunking: sizes and neighbours.
        buckets: `[B, H, R, N]`, tokens are sorted by it; None leaves them in the order of their positions.
        real: `[B, N]`, true on real tokens.
        is_causal, sees_itself: may a query see its past only; may it see itself?
        scale: what multiplies `q @ k`.
        dropout: probability with which an attention weight is dropped.
        backend: "auto", "blockwise" or "reference".

    Returns:
        out `[B, H, N, D]`, and lse `[B, H, N]` in float32 (float64 for float64), -inf where nothing is seen.

    Raises:
        NotImplementedError: a backend that cannot compute in hash order.
    """
    if backend not in BACKENDS:
        raise NotImplementedError(
            f"backend {backend!r} cannot run chunks of hashed or ring order; 'sparse' and 'sparse_blockwise' can"
        )
    drop = Dropout.draw(dropout)
    is_reference = backend == "reference"
    if has_no_content(q):
        sizes = chunking.size, chunking.left, chunking.right, chunking.multiple, chunking.least
        # kernels alone look at the buckets; padding and dropout are looked at by the host
        is_plain = real is None and not dropout and not is_reference
        by_kernels = is_plain and kernels.take_tensors(q, v, chunking.side(q.shape[2]))
        operator = _recorded if by_kernels else _between_graphs
        return operator(q, k, v, buckets, real, drop.seed, *sizes, is_causal, sees_itself, scale, dropout, is_reference)
    call = _call(q, k, v, buckets, real, chunking, (is_causal, sees_itself))
    call.scoring, call.dropout = Scoring(scale), drop
    return attend(call, _backend(call, is_reference))


def chunked_weights(
    q: Tensor, k: Tensor, chunking: Chunking, *, buckets, real, is_causal, sees_itself, scale
) -> Tensor:
    """The weights `[B, H, N, N]` of `chunked_attention`, all rounds together. O(N^2)."""
    call = _call(q, k, k, buckets, real, chunking, (is_causal, sees_itself))
    call.scoring = Scoring(scale)
    return hash_order.with_weights(call)[2]


class Reference(AutogradBackend):
    """The specification: counts of how often a query meets a key. O(N^2)."""

    name = "reference"

    def why_not(self, call: AttentionCall) -> str | None:
        return "it drops no weights in hash order; use 'sparse' for training" if call.dropout else None

    def forward(self, call: AttentionCall) -> Results:
        out, lse, _ = hash_order.with_weights(call)
        return out, lse


def _call(q: Tensor, k: Tensor, v: Tensor, buckets, real, chunking: Chunking, sees: Sees) -> AttentionCall:
    """A call over the plan of these chunks."""
    shape = q.shape[0], q.shape[1], q.shape[2]
    plan = plan_chunks(
        buckets, real, shape, chunking, is_causal=sees[0], sees_itself=sees[1], device=q.device
    )  # fmt: skip
    return AttentionCall(q, k, v, None, 0, Scoring(1.0), NO_DROPOUT, NOTHING, chosen_plan=plan)


def _backend(call: AttentionCall, is_reference: bool) -> Backend:
    backend = Reference() if is_reference else hash_order.HashOrder()
    reason = backend.why_not(call)
    if reason:
        raise NotImplementedError(f"backend {backend.name!r} cannot run this call: {reason}")
    return backend


def _prepare(recorded: bool, q, k, v, buckets, real, seed, *values) -> tuple[AttentionCall, Backend]:
    *sizes, is_causal, sees_itself, scale, dropout, is_reference = values
    call = _call(q, k, v, buckets, real, Chunking(*sizes), (is_causal, sees_itself))
    call.scoring, call.dropout, call.recorded = Scoring(scale), Dropout(dropout, seed), recorded
    return call, _backend(call, is_reference)


_between_graphs, _recorded = register(
    "chunked_attention",
    _prepare,
    "Tensor q, Tensor k, Tensor v, Tensor? buckets, Tensor? real, Tensor? seed",
    "SymInt size, SymInt left, SymInt right, SymInt multiple, SymInt least, bool is_causal, bool sees_itself, float scale, "
    "float dropout, bool is_reference",
)
