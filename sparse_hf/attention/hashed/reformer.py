"""Attention of Reformer's chunks: `lsh_chunks(...)` in hash order, `ring(...)` in the order of positions.

Legend: B batch, H heads, R rounds, N tokens, D head dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...plan import made_apart
from ...plan.hash_order import Chunking, HashedPlan, plan_chunks
from ...plan.tile_lists import TileLists, chunk_lists
from ..dropout import draw_seed
from ..strides import heads_last, like
from . import chunks_on_triton as chunk_kernels
from . import hash_order as hashed

BACKENDS = ("auto", "blockwise", "reference")
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? buckets, Tensor? real, Tensor? seed, SymInt size, SymInt left, SymInt right, "
    "SymInt multiple, SymInt least, bool is_causal, bool sees_itself, float scale, float dropout, bool is_reference"
)
# arguments that are tensors come first
TENSORS = 6
# recorded graphs read these tables for as long as they live
_RECORDED: set[TileLists] = set()


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
        is_reference = backend == "reference"
        # kernels alone look at the buckets; padding and dropout are looked at by the host
        is_plain = real is None and not dropout and not is_reference
        by_kernels = is_plain and chunk_kernels.fit(q, v, chunking.side(q.shape[2]))
        operator = _recorded if by_kernels else _unrecorded
        return operator(q, k, v, buckets, real, seed, *sizes, is_causal, sees_itself, scale, dropout, is_reference)
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


def _forward(q, k, v, *rest, recorded: bool):
    buckets, real, seed, chunking, is_causal, sees_itself, scale, dropout, is_reference = _unpack(rest)
    with made_apart(recorded):
        plan = _plan(q, buckets, real, chunking, is_causal, sees_itself)
        out, lse = _attend(q, k, v, plan, scale, dropout, seed, is_reference)
    _keep(q, plan)
    return heads_last(out), lse.contiguous()


def _gradients(q, k, v, *rest, recorded: bool):
    *rest, out, lse, grad_out, grad_lse = rest
    buckets, real, seed, chunking, is_causal, sees_itself, scale, dropout, _ = _unpack(tuple(rest))
    with made_apart(recorded):
        plan = _plan(q, buckets, real, chunking, is_causal, sees_itself)
        grads = hashed.backward(q, k, v, out, lse, grad_out, grad_lse, plan, scale, dropout, seed)
    _keep(q, plan)
    return tuple(map(heads_last, grads))


def _keep(q: Tensor, plan: HashedPlan) -> None:
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        _RECORDED.add(chunk_lists(plan))


def _fake_forward(q, k, v, *rest):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return like(q, v.shape[-1]), lse


def _fake_gradients(q, k, v, *rest):
    return tuple(map(like, (q, k, v)))


def _operator(name: str, recorded: bool):
    """Register the operator `sparse_hf::{name}`, and its gradient as one of its own.

    The host looks at buckets and padding of one that is not `recorded`, which a CUDA graph cannot hold.
    """
    tags = () if recorded else (torch.Tag.cudagraph_unsafe,)
    forward = torch.library.custom_op(
        f"sparse_hf::{name}",
        partial(_forward, recorded=recorded),
        mutates_args=(),
        schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
        tags=tags,
    )
    gradients = torch.library.custom_op(
        f"sparse_hf::{name}_backward",
        partial(_gradients, recorded=recorded),
        mutates_args=(),
        schema=f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse) -> (Tensor, Tensor, Tensor)",
        tags=tags,
    )
    forward.register_fake(_fake_forward)
    gradients.register_fake(_fake_gradients)

    def remember(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.rest = inputs[TENSORS:]

    def backward(ctx, grad_out, grad_lse):
        saved = ctx.saved_tensors
        grads = gradients(*saved[:TENSORS], *ctx.rest, *saved[TENSORS:], grad_out, grad_lse)
        return *grads, None, None, None, *(None,) * len(ctx.rest)

    forward.register_autograd(backward, setup_context=remember)
    return forward


_unrecorded = _operator("chunked_attention", False)
_recorded = _operator("chunked_attention_recorded", True)
