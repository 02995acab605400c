"""`sparse_attention`: exact attention over the pairs of a pattern, on a chosen backend.

Legend: B batch, H query heads, G key heads (G divides H), Q queries, K keys, D head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..pattern.base import as_pattern
from ..pattern.forms import read_content
from ..pattern.like import PatternLike
from ..plan import NOTHING, BlockPlan, of_batch
from .autograd import attend
from .backend import AttentionCall, Backend, PlanLike
from .composite.global_tokens import takes_pattern, why_not_tensors
from .dispatch import BACKENDS, route
from .dropout import Dropout
from .operator import has_no_content, register
from .scoring import Scoring
from .written_out import in_onnx_export, written_out

BackendName = Literal["auto", "reference", "blockwise", "flex", "fa", "triton"]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PatternLike | BlockPlan,
    *,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    marks: Tensor | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: BackendName = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that `pattern` holds, and no others.

    Positions are counted per sequence: position 0 is the first real token of a left-padded row and of each packed
    document. A query that may see nothing gives 0 (and lse -inf), with zero gradient.

    Args:
        q: `[B, H, Q, D]`.
        k, v: `[B, G, K, D]`; G divides H, and query head h reads key head `h // (H / G)`. v may have another head dim.
        pattern: a `Pattern`, its text, or a `BlockPlan` (which brings the batch data of its own).
        key_padding_mask: `[B, K]`, true on real tokens.
        segment_ids: `[B, K]` integers that number the packed documents, each of which is contiguous.
        marks: `[B, K]`, true on the tokens that `marked()` speaks of.
        q_offset: key index of the first query; by default the queries are the last Q of the K positions (decoding).
        scale: what multiplies `q @ k`; by default `D ** -0.5`.
        softcap: a score x becomes `softcap * tanh(x / softcap)` (Gemma 2, arXiv:2408.00118, section 2.1).
        relative_bias: `[H, q_offset + Q - 1 + K]`, added to the scores by distance (T5, arXiv:1910.10683, section 2.1): entry
            `k - q + (q_offset + Q - 1)` to the pair of query q and key k, both in key coordinates. Differentiable.
        dropout: probability with which an attention weight is dropped. The caller decides whether it is training.
        backend: "reference", "blockwise", "flex", "fa", "triton" or "auto".
        return_lse: also return the log-sum-exp of the scores, `[B, H, Q]`, differentiable.

    Returns:
        out `[B, H, Q, D]` in the dtype of q, and lse in float32 (float64 for float64) if asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown backend, a bad pattern.
        NotImplementedError: a backend that was asked for by name cannot run here; the message says why.

    Examples:
        >>> q = k = v = torch.randn(1, 4, 300, 32)
        >>> sparse_attention(q, k, v, "window(20, 0) | first(2)").shape
        torch.Size([1, 4, 300, 32])
    """
    _check_tensors(q, k, v, dropout)
    _check_backend(backend)
    scoring = Scoring(q.shape[-1] ** -0.5 if scale is None else float(scale), softcap, relative_bias)
    batch = key_padding_mask, segment_ids, marks
    if isinstance(pattern, BlockPlan):
        plan = _checked_plan(pattern, q, k, (*batch, q_offset))
        scoring.check(q.shape[1], plan.q_offset + q.shape[2] - 1, k.shape[2])
        call = AttentionCall(
            q, k, v, None, plan.q_offset, scoring, Dropout.draw(dropout), NOTHING, return_lse, chosen_plan=plan
        )
        out, lse = attend(call, route(call, backend))
        return (out, lse) if return_lse else out
    q_offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    scoring.check(q.shape[1], q_offset + q.shape[2] - 1, k.shape[2])
    info = of_batch(*batch)
    if not info.is_empty:
        _check_batch({"key_padding_mask": key_padding_mask, "segment_ids": segment_ids, "marks": marks}, k)
    call = AttentionCall(q, k, v, pattern, q_offset, scoring, Dropout.draw(dropout), info, wants_lse=return_lse)
    out, lse = attention(call, backend)
    return (out, lse) if return_lse else out


def attention(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """`sparse_attention` for models: arguments are known to fit, and layers of a forward pass share a `BatchInfo`.

    Returns:
        out `[B, H, Q, D]` and lse, which is nothing to read unless the call wants it.
    """
    q = call.q
    if has_no_content(q):
        if in_onnx_export():
            return written_out(call)
        text, scoring, dropout = str(call.pattern), call.scoring, call.dropout
        # a CUDA graph may hold what depends on lengths alone, and marks that only kernels look at
        operator = _recorded if _may_record(call, text, backend) else _between_graphs
        values = text, call.q_offset, scoring.scale, scoring.softcap, dropout.p, backend
        return operator(q, call.k, call.v, *call.batch.tensors, dropout.seed, scoring.bias, *values)
    assert call.pattern is not None
    call.pattern = as_pattern(call.pattern)
    chosen = route(call, backend)
    if call.chosen_plan is not None:
        check_plan(call.chosen_plan, q)
    return attend(call, chosen)


def _may_record(call: AttentionCall, pattern: str, backend: str) -> bool:
    """Depends what runs on nothing but lengths, or on marks that only kernels look at?"""
    if call.dropout or uses_content(pattern):
        return False
    if call.batch.is_empty:
        return True
    # whoever is asked for by name, or has other tensors, makes tables of what is marked
    return backend == "auto" and why_not_tensors(call) is None and takes_pattern(pattern, call.q.device)


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def uses_content(pattern: str) -> bool:
    """Does a pattern choose pairs from queries and keys?"""
    return bool(read_content(pattern).chosen)


def _prepare(recorded: bool, q, k, v, *rest) -> tuple[AttentionCall, Backend]:
    padding, segments, marks, seed, bias, pattern, q_offset, scale, softcap, dropout, backend = rest
    scoring, batch = Scoring(scale, softcap, bias), of_batch(padding, segments, marks)
    call = AttentionCall(q, k, v, as_pattern(pattern), q_offset, scoring, Dropout(dropout, seed), batch)
    call.recorded = recorded
    return call, route(call, backend)


_between_graphs, _recorded = register(
    "attention",
    _prepare,
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? segment_ids, Tensor? marks, Tensor? seed, Tensor? bias",
    "str pattern, SymInt q_offset, float scale, float? softcap, float dropout, str backend",
)


def _check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; the known ones are 'auto', {', '.join(map(repr, BACKENDS))}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> None:
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if not len(of_q) == len(of_k) == len(of_v) == 4:
        raise ValueError(f"{_shapes(q, k, v)}: each must be [batch, heads, length, head dim]")
    if of_k[:3] != of_v[:3] or of_q[0] != of_k[0] or of_q[3] != of_k[3]:
        raise ValueError(f"{_shapes(q, k, v)}: batch, key heads, key length and head dim must agree")
    if of_k[1] == 0 or of_q[1] % of_k[1]:
        raise ValueError(f"{_shapes(q, k, v)}: {of_k[1]} key heads do not divide {of_q[1]} query heads")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device} must agree")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v are {q.dtype}; they must be floating point")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")


def _check_batch(given: dict[str, Tensor | None], k: Tensor) -> None:
    """Batch data that no plan is made of, such as a mask of ones, must fit too."""
    for name, t in given.items():
        if t is None:
            continue
        if t.ndim != 2 or t.shape[1] != k.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; it is in key coordinates and must be [batch, {k.shape[2]}]"
            )
        if t.shape[0] not in (1, k.shape[0]):
            raise ValueError(f"the batch data has {t.shape[0]} rows; q has {k.shape[0]}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _checked_plan(plan: BlockPlan, q: Tensor, k: Tensor, batch: tuple) -> BlockPlan:
    if torch.compiler.is_compiling():
        raise ValueError("a BlockPlan cannot enter a compiled graph; pass the pattern and the batch data instead")
    if any(value is not None for value in batch):
        raise ValueError("key_padding_mask, segment_ids, marks and q_offset belong to build_plan when a plan is given")
    if (plan.q_len, plan.kv_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the plan is for {plan.q_len} queries and {plan.kv_len} keys; q has {q.shape[2]} and k {k.shape[2]}"
        )
    check_plan(plan, q)
    return plan.to(q.device)


def check_plan(plan: PlanLike, q: Tensor) -> None:
    if plan.heads and len(plan.heads) != q.shape[1]:
        raise ValueError(f"per_head names {len(plan.heads)} patterns; q has {q.shape[1]} heads")
    if plan.batch_rows not in (1, q.shape[0]):
        raise ValueError(f"the batch data has {plan.batch_rows} rows; q has {q.shape[0]}")
