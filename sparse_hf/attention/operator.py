"""Sparse attention as one operator of torch, so that compiled models stay full-graph.

The plan depends on the content of the batch (padding, packing, marks), which a graph cannot look at; inside the operator
it can. Eager code does not come here: it calls the backend directly.
"""

from __future__ import annotations

import torch

from ..plan import cached_plan
from .scoring import Scoring

# arguments that are tensors come first
TENSORS = 8
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? segment_ids, Tensor? marks, Tensor? seed, "
    "Tensor? bias, str pattern, SymInt q_offset, float scale, float? softcap, float dropout, str backend"
)
# plans are made on the CPU and outlive the call, neither of which a CUDA graph may hold
_OUTSIDE_GRAPHS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(
    "sparse_hf::attention",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    tags=_OUTSIDE_GRAPHS,
)
def attention(
    q, k, v, key_padding_mask, segment_ids, marks, seed, bias, pattern, q_offset, scale, softcap, dropout, backend
):
    """Out `[B, H, Q, Dv]` and lse `[B, H, Q]`."""
    plan = cached_plan(pattern, q.shape[2], k.shape[2], q_offset, (key_padding_mask, segment_ids, marks), q.device)
    scoring = Scoring(scale, softcap, bias)
    out, lse = _chosen(backend, q, v, plan, scoring, dropout).attend(q, k, v, plan, scoring, dropout, seed)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op(
    "sparse_hf::attention_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor? grad_out, Tensor? grad_lse) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_OUTSIDE_GRAPHS,
)
def attention_backward(
    q, k, v, key_padding_mask, segment_ids, marks, seed, bias, pattern, q_offset, scale, softcap, dropout, backend,
    out, lse, grad_out, grad_lse,
):  # fmt: skip
    """Gradients of q, k, v and the bias (empty without one)."""
    plan = cached_plan(pattern, q.shape[2], k.shape[2], q_offset, (key_padding_mask, segment_ids, marks), q.device)
    scoring = Scoring(scale, softcap, bias)
    chosen = _chosen(backend, q, v, plan, scoring, dropout)
    if not getattr(chosen, "NONE_IS_ZERO", False):
        grad_out, grad_lse = (torch.zeros_like(t) if g is None else g for t, g in ((out, grad_out), (lse, grad_lse)))
    if hasattr(chosen, "backward"):
        grads = chosen.backward(q, k, v, out, lse, grad_out, grad_lse, plan, scoring, dropout, seed)
    else:
        # backends that lean on autograd run their forward again
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v, *(() if bias is None else (bias,)))]
            scoring = Scoring(scale, softcap, *leaves[3:])
            results = chosen.attend(*leaves[:3], plan, scoring, dropout, seed)
        grads = torch.autograd.grad(results, leaves, (grad_out, grad_lse))
    *grads, grad_bias = (*grads, None)[:4]
    return *(g.contiguous() for g in grads), q.new_empty(0) if grad_bias is None else grad_bias.contiguous()


def _chosen(backend, q, v, plan, scoring, dropout):
    from . import choose

    return choose(backend, q, v, plan, scoring, dropout)


@attention.register_fake
def _(q, k, v, *rest):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


@attention_backward.register_fake
def _(q, k, v, key_padding_mask, segment_ids, marks, seed, bias, *rest):
    like = (q, k, v, q.new_empty(0) if bias is None else bias)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


def _remember(ctx, inputs, output):
    # a gradient of lse that nobody asked for must not cost a pass
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.rest = inputs[TENSORS:]


def _backward(ctx, grad_out, grad_lse):
    saved = ctx.saved_tensors
    *grads, grad_bias = attention_backward(*saved[:TENSORS], *ctx.rest, *saved[TENSORS:], grad_out, grad_lse)
    grad_bias = None if saved[TENSORS - 1] is None else grad_bias
    return *grads, None, None, None, None, grad_bias, *(None,) * len(ctx.rest)


attention.register_autograd(_backward, setup_context=_remember)
