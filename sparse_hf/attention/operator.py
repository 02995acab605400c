"""Sparse attention as one operator of torch, so that compiled models stay full-graph.

The plan depends on the content of the batch (padding, packing, marks), which a graph cannot look at; inside the operator
it can. Eager code does not come here: it calls the backend directly.

There are two of it. CUDA graphs record what runs once and replay it, so that only calls whose tables depend on nothing but
lengths may be recorded, or whose marks only kernels look at: those of `attention_of_lengths`. `attention` is run between graphs.
"""

from __future__ import annotations

from functools import partial

import torch

from ..pattern.forms import read_marked
from ..plan import AnyPlan, cached_plan, made_apart
from .autograd import recording
from .composite import global_tokens as marked
from .composite import lsh as content
from .composite.strided import may_regroup
from .scoring import Scoring
from .strides import heads_last, like

# arguments that are tensors come first
TENSORS = 8
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? segment_ids, Tensor? marks, Tensor? seed, "
    "Tensor? bias, str pattern, SymInt q_offset, float scale, float? softcap, float dropout, str backend"
)
# recorded graphs read the tables of these for as long as they live
_RECORDED: set[AnyPlan] = set()


def _forward(
    q, k, v, key_padding_mask, segment_ids, marks, seed, bias, pattern, q_offset, scale, softcap, dropout, backend, *, of_lengths
):  # fmt: skip
    """Out `[B, H, Q, Dv]` and lse `[B, H, Q]`."""
    batch, scoring = (key_padding_mask, segment_ids, marks), Scoring(scale, softcap, bias)
    if content.uses_content(pattern):
        out, lse = content.attend(q, k, v, pattern, q_offset, batch, scoring, dropout, backend, seed, _choose)
        return heads_last(out), lse.contiguous()
    with made_apart(q.is_cuda and of_lengths):
        plan, chosen = _planned(q, k, v, pattern, q_offset, batch, scoring, dropout, backend, of_lengths)
        out, lse = chosen.attend(q, k, v, plan, scoring, dropout, seed)
    return heads_last(out), lse.contiguous()


def _gradients(
    q, k, v, key_padding_mask, segment_ids, marks, seed, bias, pattern, q_offset, scale, softcap, dropout, backend,
    out, lse, grad_out, grad_lse, *, of_lengths,
):  # fmt: skip
    """Gradients of q, k, v and the bias (empty without one)."""
    batch, scoring = (key_padding_mask, segment_ids, marks), Scoring(scale, softcap, bias)
    if content.uses_content(pattern):
        grad_out, grad_lse = (torch.zeros_like(t) if g is None else g for t, g in ((out, grad_out), (lse, grad_lse)))
        grads = content.backward(
            q, k, v, out, lse, grad_out, grad_lse, pattern, q_offset, batch, scoring, dropout, backend, seed, _choose
        )
        return *map(heads_last, grads), q.new_empty(0)
    with made_apart(q.is_cuda and of_lengths):
        plan, chosen = _planned(q, k, v, pattern, q_offset, batch, scoring, dropout, backend, of_lengths)
        return _gradients_by(chosen, q, k, v, out, lse, grad_out, grad_lse, plan, scoring, dropout, seed)


def _gradients_by(chosen, q, k, v, out, lse, grad_out, grad_lse, plan, scoring: Scoring, dropout, seed):
    bias = scoring.bias
    if not getattr(chosen, "NONE_IS_ZERO", False):
        grad_out, grad_lse = (torch.zeros_like(t) if g is None else g for t, g in ((out, grad_out), (lse, grad_lse)))
    if hasattr(chosen, "backward"):
        grads = chosen.backward(q, k, v, out, lse, grad_out, grad_lse, plan, scoring, dropout, seed)
    else:
        # backends that lean on autograd run their forward again, of which an operator's inside records nothing unless told to
        with recording():
            leaves = [t.detach().requires_grad_() for t in (q, k, v, *(() if bias is None else (bias,)))]
            scoring = Scoring(scoring.scale, scoring.softcap, *leaves[3:])
            results = chosen.attend(*leaves[:3], plan, scoring, dropout, seed)
        grads = torch.autograd.grad(results, leaves, (grad_out, grad_lse))
    *grads, grad_bias = (*grads, None)[:4]
    return *map(heads_last, grads), q.new_empty(0) if grad_bias is None else grad_bias.contiguous()


def _planned(q, k, v, pattern: str, q_offset: int, batch: tuple, scoring, dropout, backend, of_lengths: bool):
    """The plan and what runs it."""
    marks = batch[2]
    if of_lengths and marks is not None:
        parts = read_marked(pattern)
        if parts.window is None:
            return marked.Marked(parts, None, marks), marked.Composition(None)
        plan, chosen = _planned(
            q, k, v, str(parts.window), q_offset, (None, None, None), scoring, dropout, backend, True
        )
        return marked.Marked(parts, plan, marks), marked.Composition(chosen)
    plan = cached_plan(
        pattern, q.shape[2], k.shape[2], q_offset, batch, q.device, may_regroup=may_regroup(backend, scoring, dropout)
    )
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        _RECORDED.add(plan)
    return plan, _choose(backend, q, v, plan, scoring, dropout, of_lengths and q.is_cuda)


def _choose(*arguments):
    from .api import choose

    return choose(*arguments)


def _fake_forward(q, k, v, *rest):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return like(q, v.shape[-1]), lse


def _fake_gradients(q, k, v, key_padding_mask, segment_ids, marks, seed, bias, *rest):
    grad_bias = q.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    return *map(like, (q, k, v)), grad_bias


def _operator(name: str, of_lengths: bool):
    """Register the operator `sparse_hf::{name}`, and its gradient as one of its own."""
    tags = () if of_lengths else (torch.Tag.cudagraph_unsafe,)
    forward = torch.library.custom_op(
        f"sparse_hf::{name}",
        partial(_forward, of_lengths=of_lengths),
        mutates_args=(),
        schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
        tags=tags,
    )
    given = f"{_ARGUMENTS}, Tensor out, Tensor lse, Tensor? grad_out, Tensor? grad_lse"
    gradients = torch.library.custom_op(
        f"sparse_hf::{name}_backward",
        partial(_gradients, of_lengths=of_lengths),
        mutates_args=(),
        schema=f"({given}) -> (Tensor, Tensor, Tensor, Tensor)",
        tags=tags,
    )
    forward.register_fake(_fake_forward)
    gradients.register_fake(_fake_gradients)

    def remember(ctx, inputs, output):
        # a gradient of lse that nobody asked for must not cost a pass
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.rest = inputs[TENSORS:]

    def backward(ctx, grad_out, grad_lse):
        saved = ctx.saved_tensors
        *grads, grad_bias = gradients(*saved[:TENSORS], *ctx.rest, *saved[TENSORS:], grad_out, grad_lse)
        grad_bias = None if saved[TENSORS - 1] is None else grad_bias
        return *grads, None, None, None, None, grad_bias, *(None,) * len(ctx.rest)

    forward.register_autograd(backward, setup_context=remember)
    return forward


attention = _operator("attention", False)
attention_of_lengths = _operator("attention_of_lengths", True)
