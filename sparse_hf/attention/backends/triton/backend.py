"""Triton kernels over the plan's lists of tiles: any pattern, one pass forward and two backward, on a GPU.

Where a window has a FlashAttention kernel that one is faster on long texts; this one takes every pattern, heads with patterns of
their own, soft caps and dropout, compiles once, and is a few launches where merging calls is dozens.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....plan import BlockPlan, remembered
from ....plan.tile_lists import tile_lists
from ...backend import AttentionCall, Backend, Given, Gradients, Results
from ...scoring import Scoring
from ...strides import like, readable
from .walk import Walk, why_unfit

# places of a tile: windows are cut to it with little waste, and registers hold what a tile sums up
TILE, SMALLER_TILES = 64, (16, 32)


class Triton(Backend):
    """The kernels of `kernels.py` over lists of tiles."""

    name = "triton"
    writes_into = True

    def why_not(self, call: AttentionCall) -> str | None:
        if call.scoring.bias is not None:
            return "its kernels have no relative bias; use backend='flex'"
        return why_unfit(call.q, call.v, padded=True)

    def is_fastest(self, call: AttentionCall) -> bool:
        # of values of another width it computes more than there is, and `flex` does not
        return call.q.shape[-1] == call.v.shape[-1]

    def forward(self, call: AttentionCall) -> Results:
        q, k, v = _readable(call, call.q, call.k, call.v)
        out, lse = like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if q.numel():
            _walk(call).forward(q, k, v, out, lse, call.dropout)
        return _cut(out, call.v), lse

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        q, k, v, out, grad_out = _readable(call, call.q, call.k, call.v, given.out, given.some_grad_out)
        is_one_width = call.q.shape[3] == call.v.shape[3]
        grads = given.into if given.into is not None and is_one_width else (like(q), like(k), like(v))
        if q.numel():
            _walk(call).backward((q, k, v), (out, given.lse), (grad_out, given.grad_lse), grads, call.dropout)
        else:
            for grad in grads:
                grad.zero_()
        return _cut(grads[0], call.q), _cut(grads[1], call.k), _cut(grads[2], call.v), None


def _readable(call: AttentionCall, *tensors: Tensor) -> Sequence[Tensor]:
    """Tensors of a call as kernels read them; where values are wider or narrower than keys, with zeros up to one head dim."""
    of_keys, of_values = call.q.shape[3], call.v.shape[3]
    if of_keys != of_values:
        widest = max(of_keys, of_values)
        tensors = tuple([t if t.shape[3] == widest else pad(t, (0, widest - t.shape[3])) for t in tensors])
    return [readable(t) for t in tensors]


def _cut(t: Tensor, to: Tensor) -> Tensor:
    """`t` with as many numbers a head as `to` has."""
    # a slice of all of them would be one more view, in every call
    return t if t.shape[3] == to.shape[3] else t[..., : to.shape[3]]


def _walk(call: AttentionCall) -> Walk:
    scoring = call.scoring
    return _found_walk(call.blocks, call.q.shape[0], call.q.shape[1], scoring.scale, scoring.softcap)


@remembered
def _found_walk(plan: BlockPlan, batch: int, num_heads: int, scale: float, softcap: float | None) -> Walk:
    return Walk(tile_lists(plan, tile_size(plan), batch, num_heads), Scoring(scale, softcap))


def tile_size(plan: BlockPlan) -> int:
    """Places of a tile: fewer where the plan's blocks are smaller and need no masks in them."""
    return plan.block_size if plan.block_size in SMALLER_TILES else TILE
