"""Attention over chunks in hash order by the kernels of `tile_kernels.py`, which read and write tokens where they are.

Legend: B batch, H heads, X = B * H rows, N tokens, W places of all R rounds, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.hashed import HashedPlan
from ..plan.lists import LIMIT, Lists, chunk_lists
from . import triton

# sides of a chunk that the matrix units take
SIZES = (16, 32, 64, 128)


def suit(q: Tensor, v: Tensor, plan: HashedPlan) -> bool:
    """May the kernels compute this?"""
    if (
        plan.chunks is None
        or plan.size not in SIZES
        or q.device.type not in triton.DEVICES
        or not triton.is_installed()
    ):
        return False
    widest = triton.WIDEST_EXACT if q.dtype == torch.float32 else triton.WIDEST
    return q.dtype in triton.DTYPES and q.shape[-1] == v.shape[-1] <= widest


def forward(q, k, v, plan: HashedPlan, scale: float, dropout: float, seed) -> tuple[Tensor, Tensor]:
    """Out `[B, H, N, D]` and lse `[B, H, N]`."""
    from . import tile_kernels as kernels

    q, k, v = map(triton.readable, (q, k, v))
    group_of, lists, _ = chunk_lists(plan)
    rows, width = plan.q_index.shape
    by_place = plan.chunks.rounds > 1
    # tokens that stand nowhere (padding) are written by nobody
    out = q.new_empty(*q.shape[:2], width, q.shape[3]) if by_place else triton.like(q).zero_()
    lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], out.shape[2]
    kernels.forward[(lists.lines, rows)](
        q, k, v, out, lse, *_tables(group_of, lists, plan), *strides, *_numbers(lists, plan, q, scale, dropout, seed),
        **_constants(plan, q, dropout), BY_PLACE=by_place, **triton.launches(q)[0],
    )  # fmt: skip
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
    from . import tile_kernels as kernels

    q, k, v, out, grad_out = map(triton.readable, (q, k, v, out, grad_out))
    group_of, by_query, by_key = chunk_lists(plan)
    rows, width = plan.q_index.shape
    by_place, length = plan.chunks.rounds > 1, q.shape[2]
    if by_place:
        # float32, since rounds are added
        grads = [torch.empty(*t.shape[:2], width, t.shape[3], device=t.device) for t in (q, k, v)]
    else:
        grads = [triton.like(t).zero_() for t in (q, k, v)]
    lse, has_grad_lse = lse.contiguous(), grad_lse is not None
    grad_lse = grad_lse.contiguous() if has_grad_lse else lse
    delta = torch.empty(rows, width, dtype=torch.float32, device=q.device)
    of_all = *grad_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    rest = {**_constants(plan, q, dropout), "BY_PLACE": by_place, **triton.launches(q)[1]}
    strides = *of_all, *out.stride()[:3], *grads[0].stride()[:3], length, width
    kernels.gradients_of_queries[(by_query.lines, rows)](
        grad_out, q, k, v, out, lse, grad_lse, delta, grads[0], *_tables(group_of, by_query, plan), *strides,
        *_numbers(by_query, plan, q, scale, dropout, seed), HAS_GRAD_LSE=has_grad_lse, **rest,
    )  # fmt: skip
    strides = *of_all, *grads[1].stride()[:3], *grads[2].stride()[:3], length, width
    kernels.gradients_of_keys[(by_key.lines, rows)](
        grad_out, q, k, v, lse, delta, *grads[1:], *_tables(group_of, by_key, plan), *strides,
        *_numbers(by_key, plan, q, scale, dropout, seed), **rest,
    )  # fmt: skip
    if not by_place:
        return tuple(grads)
    places = _places(plan, length)
    there = (places >= 0).view(*q.shape[:2], *places.shape[1:])[..., None]
    return tuple(_take(g, places).where(there, 0).sum(2).to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))


def _tables(group_of: Tensor, lists: Lists, plan: HashedPlan) -> tuple[Tensor, ...]:
    # every pair of tokens is compared, so that no masks are read
    return (
        group_of,
        lists.offsets,
        lists.masked,
        lists.others,
        lists.masks,
        group_of,
        lists.segments,
        plan.q_index,
        plan.k_index,
    )


def _numbers(lists: Lists, plan: HashedPlan, q: Tensor, scale: float, dropout: float, seed) -> tuple[float | int, ...]:
    drop = 0 if seed is None else int(seed), int(dropout * (1 << 32)), 1 / (1 - dropout)
    width = plan.q_index.shape[1]
    tiles = lists.lines // plan.chunks.rounds
    return scale, 1.0, *drop, q.shape[2], q.shape[2], lists.lines, LIMIT, width, width, tiles


def _constants(plan: HashedPlan, q: Tensor, dropout: float) -> dict:
    from .tile_kernels import ALL, OTHERS, PAST, PAST_AND_SELF

    chunks = plan.chunks
    relation = ((OTHERS, ALL), (PAST, PAST_AND_SELF))[chunks.is_causal][chunks.sees_itself]
    return {
        "H": q.shape[1], "R": 1, "SEGMENT": False, "INDEXED": True, "RELATION": relation.value, "HAS_CAP": False,
        "DROPOUT": dropout > 0, "PRECISION": "ieee", **triton.shape_of(q, plan.size),
    }  # fmt: skip


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
