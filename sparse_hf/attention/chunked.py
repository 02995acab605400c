"""Attention of Reformer's chunks: `lsh_chunks(...)` in hash order, `ring(...)` in the order of positions.

Legend: B batch, H heads, R rounds, N tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.hashed import Chunking, HashedPlan, plan_chunks
from . import hashed
from .dropout import draw_seed
from .memory import heads_last, like

BACKENDS = ("auto", "blockwise", "reference")
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? buckets, Tensor? real, Tensor? seed, SymInt size, SymInt left, SymInt right, "
    "SymInt multiple, SymInt least, bool is_causal, bool sees_itself, float scale, float dropout, bool is_reference"
)
# the plan depends on the content of the buckets, which a CUDA graph cannot hold
_OUTSIDE_GRAPHS = (torch.Tag.cudagraph_unsafe,)
# arguments that are tensors come first
TENSORS = 6


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
    seed = draw_seed() if dropout else None
    if torch.compiler.is_compiling():
        sizes = chunking.size, chunking.left, chunking.right, chunking.multiple, chunking.least
        rest = is_causal, sees_itself, scale, dropout, backend == "reference"
        return _operator(q, k, v, buckets, real, seed, *sizes, *rest)
    plan = _plan(q, buckets, real, chunking, is_causal, sees_itself)
    return _attend(q, k, v, plan, scale, dropout, seed, backend == "reference")


def chunked_weights(
    q: Tensor, k: Tensor, chunking: Chunking, *, buckets, real, is_causal, sees_itself, scale
) -> Tensor:
    """The weights `[B, H, N, N]` of `chunked_attention`, all rounds together. O(N^2)."""
    plan = _plan(q, buckets, real, chunking, is_causal, sees_itself)
    return hashed.look(q, k, k, plan, scale)[2]


def _plan(q: Tensor, buckets, real, chunking: Chunking, is_causal: bool, sees_itself: bool) -> HashedPlan:
    shape = tuple(q.shape[:3])
    return plan_chunks(buckets, real, shape, chunking, is_causal=is_causal, sees_itself=sees_itself, device=q.device)


def _attend(q, k, v, plan, scale, dropout, seed, is_reference):
    if not is_reference:
        return hashed.attend(q, k, v, plan, scale, dropout, seed)
    if dropout:
        raise NotImplementedError("backend 'reference' drops no weights in hash order; use 'sparse' for training")
    return hashed.look(q, k, v, plan, scale)[:2]


def _unpack(arguments: tuple):
    buckets, real, seed, *sizes, is_causal, sees_itself, scale, dropout, is_reference = arguments
    return buckets, real, seed, Chunking(*sizes), is_causal, sees_itself, scale, dropout, is_reference


@torch.library.custom_op(
    "sparse_hf::chunked_attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)", tags=_OUTSIDE_GRAPHS
)
def _operator(q, k, v, *rest):
    buckets, real, seed, chunking, is_causal, sees_itself, scale, dropout, is_reference = _unpack(rest)
    plan = _plan(q, buckets, real, chunking, is_causal, sees_itself)
    out, lse = _attend(q, k, v, plan, scale, dropout, seed, is_reference)
    return heads_last(out), lse.contiguous()


@torch.library.custom_op(
    "sparse_hf::chunked_attention_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse) -> (Tensor, Tensor, Tensor)",
    tags=_OUTSIDE_GRAPHS,
)
def _backward_operator(q, k, v, *rest):
    *rest, out, lse, grad_out, grad_lse = rest
    buckets, real, seed, chunking, is_causal, sees_itself, scale, dropout, _ = _unpack(tuple(rest))
    plan = _plan(q, buckets, real, chunking, is_causal, sees_itself)
    grads = hashed.backward(q, k, v, out, lse, grad_out, grad_lse, plan, scale, dropout, seed)
    return tuple(map(heads_last, grads))


@_operator.register_fake
def _(q, k, v, *rest):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return like(q, v.shape[-1]), lse


@_backward_operator.register_fake
def _(q, k, v, *rest):
    return tuple(map(like, (q, k, v)))


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.rest = inputs[TENSORS:]


def _backward(ctx, grad_out, grad_lse):
    saved = ctx.saved_tensors
    grads = _backward_operator(*saved[:TENSORS], *ctx.rest, *saved[TENSORS:], grad_out, grad_lse)
    return *grads, None, None, None, *(None,) * len(ctx.rest)


_operator.register_autograd(_backward, setup_context=_remember)
