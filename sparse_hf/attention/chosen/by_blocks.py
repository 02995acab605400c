"""Attention over blocks of keys that are chosen for each query, block by block: the queries that chose a block share its products.

A tile of the kernels that go query by query has the heads of a query that share a choice, which may be few. Here it has the queries
that chose a block (as in MoBA, arXiv:2502.13189). What a query gets from each of its blocks is written out and joined by lse, in the
order of its blocks.

Legend: B batch, H query heads, G key heads, P rows of heads that read other keys than their neighbours, R = H / P; Q queries, K keys,
N chosen keys of a query in blocks of S, D and E head dims of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..backend import AttentionCall, Given, Gradients, Results
from ..launch import launch, power_of_two, strides_of
from ..strides import like, readable
from .gathers import LEAST_HEADS, MAX_PART_BYTES, Shape, add_up, block_size, lists_of

# blocks of a query that are joined at a time, and numbers that are copied to float32 at once
JOINED, MAX_COPIED = 16, 1 << 25


def is_better(call: AttentionCall) -> bool:
    """Are there too few heads that share a choice to fill tiles of one query, and enough queries to fill those of a block?"""
    if block_size(call) == 1:
        return False
    heads = Shape(call).heads["R"]
    # so many rows of queries chose a block in the mean, times its keys
    rows = heads * call.q.shape[2] * call.plan.shape[3]
    return heads < LEAST_HEADS and rows >= LEAST_HEADS * call.k.shape[2]


def _some_queries(call: AttentionCall, dim: int) -> Iterator[tuple[slice, AttentionCall]]:
    """The queries in turn, so many that what each of a row of heads has `dim` numbers of for a block is no more than exists at once."""
    blocks = call.plan.shape[3] // block_size(call) * Shape(call).heads["R"]
    step = max(1, MAX_PART_BYTES // max(1, blocks * dim * call.q.element_size()))
    for first in range(0, call.q.shape[2], step):
        some = slice(first, first + step)
        yield some, replace(call, q=call.q[:, :, some], chosen_plan=call.plan.of_queries(some))


def _rows(shape: Shape, bytes_: int) -> Iterator[tuple[int, int]]:
    """So many rows of heads at a time that what each has `bytes_` of is no more than exists at once: the first, and how many."""
    rows = shape.call.q.shape[0] * shape.rows
    some = max(1, MAX_PART_BYTES // max(1, bytes_))
    for first in range(0, rows, some):
        yield first, min(some, rows - first)


def _places(shape: Shape, size: int) -> int:
    """Blocks that the queries of a row of heads chose, each once a head."""
    return shape.call.q.shape[2] * (shape.call.plan.shape[3] // size) * shape.heads["R"]


def forward(call: AttentionCall) -> Results:
    """Out `[B, H, Q, E]` and lse `[B, H, Q]`."""
    out = like(call.q, call.v.shape[3])
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    for some, part in _some_queries(call, call.v.shape[3]) if out.numel() else ():
        lse[:, :, some] = _forward(part, out[:, :, some])
    return out, lse


def _forward(call: AttentionCall, out: Tensor) -> Tensor:
    """Lse; out is written."""
    from . import block_kernels

    shape, size = Shape(call), block_size(call)
    q, k, v = (readable(t) for t in (call.q, call.k, call.v))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lists, places, heads = lists_of(shape, size), _places(shape, size), shape.heads
    blocks, tile = shape.call.plan.shape[3] // size, shape.tile_of_block(size, backward=False)
    for first, count in _rows(shape, places * v.shape[3] * q.element_size()):
        parts = q.new_empty(count, places, v.shape[3])
        of_parts = torch.full((count, places), -torch.inf, dtype=torch.float32, device=q.device)
        launch(
            block_kernels.forward, (lists.key.shape[2], count), (q, k, v, shape.table, parts, of_parts, *lists.tensors),
            strides_of(q, k, v), (*shape.numbers, first, lists.key.shape[2], lists.limit, shape.batch_step, *shape.limits),
            {**shape.of_blocks(size, tile.side), "PRECISION": "ieee"}, **tile.options,
        )  # fmt: skip
        launch(
            block_kernels.join, (q.shape[2], count), (parts, of_parts, out, lse), strides_of(out),
            (q.shape[2], blocks, first),
            {"H": heads["H"], "P": heads["P"], "R": heads["R"], "BN": JOINED, "E": v.shape[3], "BE": shape.dims["BE"]}, num_warps=2,
        )  # fmt: skip
    return lse


def backward(call: AttentionCall, given: Given) -> Gradients:
    """Gradients of q, k and v."""
    q, k, v, grad_out = call.q, call.k, call.v, readable(given.some_grad_out)
    grad_q = like(q)
    if not q.numel() or not k.numel():
        return grad_q.zero_(), like(k).zero_(), like(v).zero_(), None
    step = max(1, MAX_COPIED // grad_out[:, :, :1].numel())
    pairs = zip(grad_out.split(step, 2), given.out.split(step, 2), strict=True)
    delta = torch.cat([(grad.float() * out.float()).sum(-1) for grad, out in pairs], 2)
    if given.grad_lse is not None:
        delta -= given.grad_lse
    pieces, sums = list(_some_queries(call, q.shape[3])), []
    for some, part in pieces:
        found = _backward(part, *(t[:, :, some] for t in (grad_out, given.lse, delta, grad_q)), adds=len(pieces) > 1)
        sums = [sum_.add_(of_some) for sum_, of_some in zip(sums, found, strict=True)] if sums else found
    return grad_q, *Shape(call).of_key_heads(sums), None


def _backward(
    call: AttentionCall, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor, adds: bool
) -> list[Tensor]:
    """Gradients of the keys and values of rows of heads, `adds` of which are added up; that of q is written."""
    from . import block_kernels

    shape, size = Shape(call), block_size(call)
    q, k, v = (readable(t) for t in (call.q, call.k, call.v))
    lse, delta = lse.contiguous(), delta.contiguous()
    lists, places, heads = lists_of(shape, size), _places(shape, size), shape.heads
    segments, widths = lists.key.shape[2], k.shape[3] + v.shape[3]
    grads, tile = shape.empty_gradients(k, v, adds=adds), shape.tile_of_block(size, backward=True)
    for first, count in _rows(shape, places * q.shape[3] * q.element_size() + 4 * segments * size * widths):
        of_queries = q.new_zeros(count, places, q.shape[3])
        parts = [torch.empty(count, segments, size, t.shape[3], dtype=torch.float32, device=k.device) for t in (k, v)]
        launch(
            block_kernels.gradients, (segments, count),
            (grad_out, q, k, v, shape.table, lse, delta, of_queries, *parts, *lists.tensors), strides_of(grad_out, q, k, v),
            (*shape.numbers, first, segments, lists.limit, shape.batch_step, *shape.limits),
            {**shape.of_blocks(size, tile.side), "OF_QUERIES": True, "PRECISION": "ieee"}, **tile.options,
        )  # fmt: skip
        launch(
            block_kernels.add, (q.shape[2], count), (of_queries, grad_q), strides_of(grad_q),
            (q.shape[2], shape.call.plan.shape[3] // size, first),
            {"P": heads["P"], "R": heads["R"], "BN": JOINED, "D": q.shape[3], "BD": power_of_two(q.shape[3])}, num_warps=2,
        )  # fmt: skip
        add_up(shape, size, lists, parts, grads, first)
    return grads
