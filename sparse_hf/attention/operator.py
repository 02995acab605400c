"""Sparse attention as one operator of torch, so that compiled models stay full-graph.

The plan depends on the content of the batch (padding, packing, marks), which a graph cannot look at; inside the operator
it can. Eager code does not come here: it calls the backend directly.
"""

from __future__ import annotations

import torch

from ..plan import cached_plan

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? segment_ids, Tensor? marks, Tensor? seed, "
    "str pattern, SymInt q_offset, float scale, float dropout, str backend"
)


@torch.library.custom_op("sparse_hf::attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def attention(q, k, v, key_padding_mask, segment_ids, marks, seed, pattern, q_offset, scale, dropout, backend):
    """Out `[B, H, Q, Dv]` and lse `[B, H, Q]`."""
    out, lse = _attend(
        q, k, v, (key_padding_mask, segment_ids, marks), seed, pattern, q_offset, scale, dropout, backend
    )
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op(
    "sparse_hf::attention_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(
    q, k, v, key_padding_mask, segment_ids, marks, seed, pattern, q_offset, scale, dropout, backend,
    out, lse, grad_out, grad_lse,
):  # fmt: skip
    """Gradients of q, k and v."""
    from . import choose

    plan = cached_plan(pattern, q.shape[2], k.shape[2], q_offset, (key_padding_mask, segment_ids, marks), q.device)
    chosen = choose(backend, q, plan, dropout)
    if hasattr(chosen, "backward"):
        grads = chosen.backward(q, k, v, out, lse, grad_out, grad_lse, plan, scale, dropout, seed)
    else:
        # backends that lean on autograd run their forward again
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            results = chosen.attend(*leaves, plan, scale, dropout, seed)
        grads = torch.autograd.grad(results, leaves, (grad_out, grad_lse))
    return tuple(g.contiguous() for g in grads)


def _attend(q, k, v, batch, seed, pattern, q_offset, scale, dropout, backend):
    from . import choose

    plan = cached_plan(pattern, q.shape[2], k.shape[2], q_offset, batch, q.device)
    return choose(backend, q, plan, dropout).attend(q, k, v, plan, scale, dropout, seed)


@attention.register_fake
def _(q, k, v, key_padding_mask, segment_ids, marks, seed, pattern, q_offset, scale, dropout, backend):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


@attention_backward.register_fake
def _(q, k, v, *rest):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.rest = inputs[7:]


def _backward(ctx, grad_out, grad_lse):
    saved = ctx.saved_tensors
    grads = attention_backward(*saved[:7], *ctx.rest, *saved[7:], grad_out, grad_lse)
    return *grads, *(None,) * 9


attention.register_autograd(_backward, setup_context=_remember)
