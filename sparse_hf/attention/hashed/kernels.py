"""Attention over chunks in hash order by the kernels of `triton`, which read and write tokens where they are.

Legend: B batch, H heads, X = B * H rows, N tokens, W places of all R rounds, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan.hash_order import HashedPlan
from ...plan.tile_lists import chunk_lists
from ..backend import AttentionCall, Given, Gradients, Results
from ..backends.triton.walk import Walk, why_unfit
from ..strides import like, readable

# sides of a chunk that the matrix units take
CHUNK_SIZES = (16, 32, 64, 128)


def can_run(q: Tensor, v: Tensor, plan: HashedPlan) -> bool:
    """May the kernels compute this?"""
    return plan.chunks is not None and take_tensors(q, v, plan.size)


def take_tensors(q: Tensor, v: Tensor, size: int) -> bool:
    """Do the kernels take such tensors, in chunks of `size` tokens?"""
    return size in CHUNK_SIZES and why_unfit(q, v) is None


def forward(call: AttentionCall) -> Results:
    """Out `[B, H, N, D]` and lse `[B, H, N]`."""
    q, k, v, plan = readable(call.q), readable(call.k), readable(call.v), call.plan
    walk = _walk(call)
    by_place = walk.rounds > 1
    # tokens that stand nowhere (padding) are written by nobody
    out = q.new_empty(*q.shape[:2], plan.q_index.shape[1], q.shape[3]) if by_place else like(q).zero_()
    lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    walk.forward(q, k, v, out, lse, call.dropout)
    if not by_place:
        return out, lse
    # the rounds of each token, merged by log-sum-exp
    places = _places(plan, q.shape[2])  # [X, R, N], -1 for none
    found, part = _take(out, places), _take(lse[..., None], places)[..., 0]
    part = part.masked_fill((places < 0).view_as(part), -torch.inf)
    total = part.logsumexp(2)
    share = (part - total.where(total > -torch.inf, 0)[:, :, None]).exp()
    return (found * share[..., None]).sum(2).to(q.dtype), total


def backward(call: AttentionCall, given: Given) -> Gradients:
    """Gradients of q, k and v."""
    q, k, v, plan = readable(call.q), readable(call.k), readable(call.v), call.plan
    walk = _walk(call)
    if walk.rounds > 1:
        # float32, since rounds are added
        shapes = [(*t.shape[:2], plan.q_index.shape[1], t.shape[3]) for t in (q, k, v)]
        grads = [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes]
    else:
        grads = [like(t).zero_() for t in (q, k, v)]
    results, grad_out = (readable(given.out), given.lse), readable(given.some_grad_out)
    walk.backward((q, k, v), results, (grad_out, given.grad_lse), grads, call.dropout)
    if walk.rounds == 1:
        return grads[0], grads[1], grads[2], None
    places = _places(plan, q.shape[2])
    there = (places >= 0).view(*q.shape[:2], *places.shape[1:])[..., None]
    grad_q, grad_k, grad_v = (
        _take(g, places).where(there, 0).sum(2).to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True)
    )
    return grad_q, grad_k, grad_v, None


def _walk(call: AttentionCall) -> Walk:
    from ..backends.triton.kernels import ALL, OTHERS, PAST, PAST_AND_SELF

    plan, chunks = call.plan, call.plan.chunks
    relation = ((OTHERS, ALL), (PAST, PAST_AND_SELF))[chunks.is_causal][chunks.sees_itself].value
    return Walk(chunk_lists(plan), call.scoring, plan.q_index, chunks.rounds, relation)


def _places(plan: HashedPlan, length: int) -> Tensor:
    """Where each token stands in each round, `[X, R, N]`, -1 for none."""
    assert plan.chunks is not None
    tokens = plan.q_index.unflatten(1, (plan.chunks.rounds, -1))
    numbers = torch.arange(plan.q_index.shape[1], device=tokens.device).view(1, *tokens.shape[1:])
    found = torch.full((*tokens.shape[:2], length + 1), -1, device=tokens.device)
    found.scatter_(2, tokens.where(tokens >= 0, length), numbers.expand_as(tokens))
    return found[..., :length]


def _take(t: Tensor, places: Tensor) -> Tensor:
    """`[B, H, R, N, D]` of `[B, H, W, D]`."""
    index = places.clamp(min=0).flatten(1).view(*t.shape[:2], -1, 1).expand(-1, -1, -1, t.shape[3])
    return t.gather(2, index).unflatten(2, places.shape[1:])
