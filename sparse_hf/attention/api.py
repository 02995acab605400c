"""`sparse_attention`: exact attention over the pairs of a pattern, on a chosen backend.

Legend: B batch, H query heads, G key heads (G divides H), Q queries, K keys, D head dim.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ..plan import AnyPlan, BlockPlan, cached_plan
from .backends import flex, reference
from .backends.blockwise import backend as blockwise
from .backends.flash import backend as fa
from .backends.sdpa import decode as few
from .backends.sdpa import dense
from .backends.triton import backend as triton
from .composite import global_tokens as marked
from .composite import lsh as content
from .composite import strided as regroup
from .dropout import draw_seed
from .merge import merge
from .operator import attention as attention_operator
from .operator import attention_of_lengths
from .scoring import Scoring

__all__ = ["BACKENDS", "choose", "merge", "sparse_attention"]

logger = logging.getLogger(__name__)

# each has `refuses(q, v, plan, scoring, dropout)`, a reason or None, and the differentiable `attend`
BACKENDS: dict[str, ModuleType] = {
    "reference": reference, "blockwise": blockwise, "flex": flex, "fa": fa, "triton": triton
}  # fmt: skip
# what "auto" tries, in this order
PREFERENCE = ("fa", "triton", "flex", "blockwise")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern,
    *,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    marks: Tensor | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
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
    """
    _check_tensors(q, k, v, dropout)
    _check_backend(backend)
    scoring = Scoring(q.shape[-1] ** -0.5 if scale is None else float(scale), softcap, relative_bias)
    seed = draw_seed() if dropout else None
    if isinstance(pattern, BlockPlan):
        plan = _checked_plan(pattern, q, k, (key_padding_mask, segment_ids, marks, q_offset))
        scoring.check(q.shape[1], plan.q_offset + q.shape[2] - 1, k.shape[2])
        return _attend(q, k, v, plan, scoring, dropout, backend, seed, return_lse)
    q_offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    scoring.check(q.shape[1], q_offset + q.shape[2] - 1, k.shape[2])
    batch = key_padding_mask, segment_ids, marks
    if torch.compiler.is_compiling():
        rest = str(pattern), q_offset, scoring.scale, softcap, dropout, backend
        # a CUDA graph may hold what depends on lengths alone, and marks that only kernels look at
        asks_batch = any(t is not None for t in (*batch, seed)) or content.uses_content(str(pattern))
        may_record = not asks_batch or marked.suits(backend, q, k, v, str(pattern), q_offset, batch, scoring, dropout)
        operator = attention_of_lengths if may_record else attention_operator
        out, lse = operator(q, k, v, *batch, seed, relative_bias, *rest)
    elif content.uses_content(str(pattern)):
        rest = str(pattern), q_offset, batch, scoring, dropout, backend, seed
        out, lse = content.attend(q, k, v, *rest, choose)
    else:
        lengths = str(pattern), q.shape[2], k.shape[2], q_offset
        if few.suits(backend, q, scoring, dropout, return_lse):
            # ranges of keys are numbers that the host works with
            plan = cached_plan(*lengths, batch, few.place(q, batch), by_identity=True)
            _check_plan(plan, q)
            out = few.attend(q, k, v, plan, scoring.scale)
            if out is not None:
                _say_torch(
                    f"of fewer than {few.QUERIES} queries", " over the keys that they see", q.device.type, q.dtype
                )
                return out
        may = regroup.may_regroup(backend, scoring, dropout)
        plan = cached_plan(*lengths, batch, q.device, by_identity=True, may_regroup=may)
        _check_plan(plan, q)
        return _attend(q, k, v, plan, scoring, dropout, backend, seed, return_lse)
    return (out, lse) if return_lse else out


def _attend(q, k, v, plan: AnyPlan, scoring: Scoring, dropout: float, backend: str, seed, return_lse: bool):
    if dense.suits(backend, q, k, v, scoring, dropout, return_lse):
        out = dense.attend(q, k, v, plan, scoring.scale)
        if out is not None:
            _say_torch("by a pattern that leaves out no pair of a text this short", "", q.device.type, q.dtype)
            return out
    out, lse = choose(backend, q, v, plan, scoring, dropout).attend(q, k, v, plan, scoring, dropout, seed)
    return (out, lse) if return_lse else out


def choose(
    backend: str, q: Tensor, v: Tensor, plan: AnyPlan, scoring: Scoring, dropout: float, recorded: bool = False
) -> ModuleType | regroup.Composition:
    """What runs this call. Only "auto" may choose a backend, and it says what it chose, once.

    A CUDA graph that may have `recorded` it holds kernels, and none of the steps by which `blockwise` walks a few queries.
    """
    queries = max(q.shape[2], few.QUERIES if recorded else 0)
    if isinstance(plan, BlockPlan):
        return _backend(backend, q, v, plan, scoring, dropout, queries)
    # parts may be short, but there are many of them
    return regroup.Composition(
        lambda part_q, part_v, part: _backend(backend, part_q, part_v, part, scoring, dropout, queries, True)
    )


def _backend(backend, q, v, plan: BlockPlan, scoring, dropout, queries: int, regrouped: bool = False) -> ModuleType:
    if backend != "auto":
        reason = BACKENDS[backend].refuses(q, v, plan, scoring, dropout)
        if reason:
            raise NotImplementedError(f"backend {backend!r} cannot run this call: {reason}")
        return BACKENDS[backend]
    names = PREFERENCE if queries >= few.QUERIES else ("blockwise",)
    # whether `fa` is worth it is asked first, since it would make tables to say whether it can
    worth = (name for name in names if name != "fa" or fa.is_fastest(q, plan))
    name = next(name for name in worth if BACKENDS[name].refuses(q, v, plan, scoring, dropout) is None)
    _say(name, q.device.type, str(q.dtype), bool(dropout), regrouped)
    return BACKENDS[name]


@lru_cache
def _say(name: str, device: str, dtype: str, dropout: bool, regrouped: bool) -> None:
    how = " with dropout" * dropout + ", tokens of a stride side by side," * regrouped
    logger.info("attention on %s in %s%s runs on backend %r", device, dtype, how, name)


@lru_cache
def _say_torch(which: str, over: str, device: str, dtype: torch.dtype) -> None:
    what = "PyTorch's scaled_dot_product_attention"
    logger.info("attention %s on %s in %s runs on %s%s", which, device, dtype, what, over)


def _check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; the known ones are 'auto', {', '.join(map(repr, BACKENDS))}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{_shapes(q, k, v)}: each must be [batch, heads, length, head dim]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{_shapes(q, k, v)}: batch, key heads, key length and head dim must agree")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{_shapes(q, k, v)}: {k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device} must agree")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v are {q.dtype}; they must be floating point")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")


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
    _check_plan(plan, q)
    return plan.to(q.device)


def _check_plan(plan: AnyPlan, q: Tensor) -> None:
    if plan.heads and len(plan.heads) != q.shape[1]:
        raise ValueError(f"per_head names {len(plan.heads)} patterns; q has {q.shape[1]} heads")
    if plan.batch_rows not in (1, q.shape[0]):
        raise ValueError(f"the batch data has {plan.batch_rows} rows; q has {q.shape[0]}")
