"""Attention over chunks in hash order by the kernels of `tile_kernels.py`, which read and write tokens where they are.

Legend: B batch, H heads, X = B * H rows, N tokens, W places of all R rounds, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan.hash_order import HashedPlan
from ...plan.tile_lists import chunk_lists
from ..backends.triton import backend as triton
from ..scoring import Scoring
from ..strides import like, readable

# sides of a chunk that the matrix units take
SIZES = (16, 32, 64, 128)


def suit(q: Tensor, v: Tensor, plan: HashedPlan) -> bool:
    """May the kernels compute this?"""
    return plan.chunks is not None and fit(q, v, plan.size)


def fit(q: Tensor, v: Tensor, size: int) -> bool:
    """Do the kernels take such tensors, in chunks of `size` tokens?"""
    return size in SIZES and triton.unfit(q, v) is None


def forward(q, k, v, plan: HashedPlan, scale: float, dropout: float, seed) -> tuple[Tensor, Tensor]:
    """Out `[B, H, N, D]` and lse `[B, H, N]`."""
    q, k, v = map(readable, (q, k, v))
    call = _call(plan, scale, dropout, seed)
    by_place = call.rounds > 1
    # tokens that stand nowhere (padding) are written by nobody
    out = q.new_empty(*q.shape[:2], plan.q_index.shape[1], q.shape[3]) if by_place else like(q).zero_()
    lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    call.forward(q, k, v, out, lse)
    if not by_place:
        return out, lse
    # the rounds of each token, merged by log-sum-exp
    places = _places(plan, q.shape[2])  # [X, R, N], -1 for none
    found, part = _take(out, places), _take(lse[..., None], places)[..., 0]
    part = part.masked_fill((places < 0).view_as(part), -torch.inf)
    total = part.logsumexp(2)
    share = (part - total.where(total > -torch.inf, 0)[:, :, None]).exp()
    return (found * share[..., None]).sum(2).to(q.dtype), total


def backward(
    q, k, v, out, lse, grad_out, grad_lse, plan: HashedPlan, scale: float, dropout: float, seed
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given those of out and lse."""
    q, k, v, out, grad_out = map(readable, (q, k, v, out, grad_out))
    call = _call(plan, scale, dropout, seed)
    if call.rounds > 1:
        # float32, since rounds are added
        grads = [torch.empty(*t.shape[:2], plan.q_index.shape[1], t.shape[3], device=t.device) for t in (q, k, v)]
    else:
        grads = [like(t).zero_() for t in (q, k, v)]
    call.backward(q, k, v, out, lse, grad_out, grad_lse, grads)
    if call.rounds == 1:
        return tuple(grads)
    places = _places(plan, q.shape[2])
    there = (places >= 0).view(*q.shape[:2], *places.shape[1:])[..., None]
    return tuple(_take(g, places).where(there, 0).sum(2).to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))


def _call(plan: HashedPlan, scale: float, dropout: float, seed) -> triton.Call:
    from ..backends.triton.tile_kernels import ALL, OTHERS, PAST, PAST_AND_SELF

    chunks = plan.chunks
    relation = ((OTHERS, ALL), (PAST, PAST_AND_SELF))[chunks.is_causal][chunks.sees_itself].value
    return triton.Call(
        chunk_lists(plan), Scoring(scale), dropout, seed, index=plan.q_index, rounds=chunks.rounds, relation=relation
    )


def _places(plan: HashedPlan, length: int) -> Tensor:
    """Where each token stands in each round, `[X, R, N]`, -1 for none."""
    tokens = plan.q_index.unflatten(1, (plan.chunks.rounds, -1))
    numbers = torch.arange(plan.q_index.shape[1], device=tokens.device).view(1, *tokens.shape[1:])
    found = torch.full((*tokens.shape[:2], length + 1), -1, device=tokens.device)
    found.scatter_(2, tokens.where(tokens >= 0, length), numbers.expand_as(tokens))
    return found[..., :length]


def _take(t: Tensor, places: Tensor) -> Tensor:
    """`[B, H, R, N, D]` of `[B, H, W, D]`."""
    index = places.clamp(min=0).flatten(1).view(*t.shape[:2], -1, 1).expand(-1, -1, -1, t.shape[3])
    return t.gather(2, index).unflatten(2, places.shape[1:])
