"""Marked keys that all queries see, merged into what a window gave, however many there are: only the kernels read their number.

The gradients of queries are one pass over them. Those of the marked keys, of which there may be one or as many as tokens, are sums
over all queries: a fixed number of programs is dealt out among tiles of marked keys, each to a span of queries, and what they find is
added up afterwards in a fixed order.

Legend: B batch, N tokens, H query heads, G key heads, R = H / G, D head dim; `BC` marked keys of a tile, `BM` queries of one; P programs
of a batch row and head, of which `BP` are added up at a time, for `BA` marked keys; S spans of queries at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan.cache import made
from ..backend import Given
from ..backends.flash.column_kernels import (
    LOG2_E,
    MOST_COLUMNS,
    absorb_columns,
    constants_of,
    options,
    seen_columns,
    tile_of,
)
from ..launch import launch, strides_of
from ..programs import second_program
from .marked_places import Places

# programs that keep a GPU busy, and marked keys that a program adds up
PROGRAMS, ADDED = 512, 8


def absorb(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, places: Places, limits: tuple[int, int, int, int], scale: float
) -> None:  # fmt: skip
    """Merge the marked keys into `out` `[B, H, N, D]` and `lse` `[B, H, N]`, in place."""
    q, k, v, out = (t.transpose(1, 2) for t in (q, k, v, out))
    batch, length = q.shape[:2]
    sequences = _whole_rows(batch, length, q.device)
    absorb_columns(q, k, v, out, lse, sequences, places.index, places.counts, scale, limits, 0, length)


# never dropped: recorded graphs go on to read these few numbers
@cache
def _whole_rows(batch: int, length: int, device: torch.device) -> Tensor:
    """What `Split.sequences` says of rows without padding."""
    return made(_make_whole_rows, batch, length, device)


def _make_whole_rows(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.tensor([(b, 0, length, 0, length) for b in range(batch)], dtype=torch.int32).to(device)


def add_gradients(
    inputs: Sequence[Tensor], given: Given, grads: Sequence[Tensor], places: Places, limits: tuple[int, int, int, int],
    scale: float,
) -> None:  # fmt: skip
    """Add to the gradients of q, k and v `[B, heads, N, D]`, in place; `given` is of the whole."""
    (q, k, v), (grad_q, grad_k, grad_v) = inputs, grads
    out, lse, grad_out, grad_lse = given.out, given.lse, given.some_grad_out, given.grad_lse
    batch, heads, length, dim = q.shape
    tile, groups = tile_of(q), k.shape[1]
    count = MOST_COLUMNS if dim <= 128 else MOST_COLUMNS // 2
    # spans of queries, if marked keys are few, and programs, of which each tile of marked keys has one at least
    spans = max(1, PROGRAMS // (batch * heads))
    programs = max(spans, -(-length // count))
    lse = lse.contiguous()
    given_lse, delta = lse if grad_lse is None else grad_lse.contiguous(), torch.empty_like(lse)
    sums = q.new_empty((2, batch * heads, programs, count, dim), dtype=torch.float32)
    tables, numbers = (places.index, places.counts), (scale, scale * LOG2_E, *limits[:2], length)
    constants = {"H": heads, **constants_of(heads // groups, dim, count, tile)}
    launch(
        _gradients_of_queries,
        (-(-length // tile), batch * heads),
        (grad_out, q, k, v, out, lse, given_lse, delta, grad_q, *tables),
        strides_of(grad_out, q, k, v, out, grad_q),
        numbers,
        {"HAS_GRAD_LSE": grad_lse is not None, **constants},
        **options(q),
    )
    launch(
        _gradients_of_keys,
        (programs, batch * heads),
        (grad_out, q, k, v, lse, delta, *sums, *tables),
        strides_of(grad_out, q, k, v),
        (*numbers, programs, spans),
        constants,
        **options(q),
    )
    launch(
        _add_up,
        (-(-length // count) * (count // ADDED), batch * groups),
        (*sums, grad_k, grad_v, *tables),
        strides_of(grad_k, grad_v),
        (length, programs, spans),
        {"BA": ADDED, "BP": 8 if dim <= 128 else 4, **constants},
        num_warps=4,
    )


@triton.jit
def _marked_keys(index, b, start, N, BC: tl.constexpr):
    """The next marked keys of a batch row, -1 beyond their number."""
    c = start + tl.arange(0, BC)
    return tl.load(index + b * N + c, mask=c < N, other=-1)


@triton.jit
def _rows_of(pointer, key, stride, D: tl.constexpr, BD: tl.constexpr):
    """`[BC, BD]`, zeros where there is no key."""
    d = tl.arange(0, BD)[None, :]
    place = tl.where(key >= 0, key, 0).to(tl.int64)[:, None]
    return tl.load(pointer + place * stride + d, mask=(key >= 0)[:, None] & (d < D), other=0.0)


@triton.jit(do_not_specialize=["left", "right", "N"])
def _gradients_of_queries(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, index, counts,
    do_b, do_h, do_m, q_b, q_h, q_m, k_b, k_g, k_n, v_b, v_g, v_n, o_b, o_h, o_m, dq_b, dq_h, dq_m,
    scale, scale_log2, left, right, N,
    HAS_GRAD_LSE: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    b, h = (second_program() // H).to(tl.int64), (second_program() % H).to(tl.int64)
    count = tl.load(counts + b)
    if count == 0:
        return
    d = tl.arange(0, BD)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    wide = rows.to(tl.int64)
    real = (rows < N)[:, None]
    box = real & (d[None, :] < D)
    q = tl.load(q_ptr + b * q_b + h * q_h + wide[:, None] * q_m + d[None, :], mask=box, other=0.0)
    do = tl.load(do_ptr + b * do_b + h * do_h + wide[:, None] * do_m + d[None, :], mask=box, other=0.0)
    out = tl.load(out_ptr + b * o_b + h * o_h + wide[:, None] * o_m + d[None, :], mask=box, other=0.0)
    at = (b * H + h) * N + wide
    lse = tl.load(lse_ptr + at, mask=rows < N, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(dlse_ptr + at, mask=rows < N, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < N)
    total = tl.zeros((BM, BD), tl.float32)
    for start in range(0, count, BC):
        key = _marked_keys(index, b, start, N, BC)
        k = _rows_of(k_ptr + b * k_b + h // R * k_g, key, k_n, D, BD)
        v = _rows_of(v_ptr + b * v_b + h // R * v_g, key, v_n, D, BD)
        seen = seen_columns(rows, key, real, 0, left, right, N, N)
        scores = tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None] * 1.4426950408889634
        weights = tl.exp2(tl.where(seen, scores, float("-inf")))
        change = weights * (tl.dot(do, tl.trans(v)) - delta[:, None])
        total += tl.dot(change.to(q.dtype), k)
    at_dq = dq_ptr + b * dq_b + h * dq_h + wide[:, None] * dq_m + d[None, :]
    dq = tl.load(at_dq, mask=box, other=0.0)
    tl.store(at_dq, (dq.to(tl.float32) + total * scale).to(dq.dtype), mask=box)


@triton.jit(do_not_specialize=["left", "right", "N", "P", "S"])
def _gradients_of_keys(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, index, counts,
    do_b, do_h, do_m, q_b, q_h, q_m, k_b, k_g, k_n, v_b, v_g, v_n,
    scale, scale_log2, left, right, N, P, S,
    H: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, h = (second_program() // H).to(tl.int64), (second_program() % H).to(tl.int64)
    tiles = tl.cdiv(tl.load(counts + b), BC)
    # P is no less than the tiles that there can be
    spans = tl.minimum(S, P // tl.maximum(tiles, 1))
    tile, part = tl.program_id(0) // spans, tl.program_id(0) % spans
    if tile >= tiles:
        return
    span = tl.cdiv(tl.cdiv(N, BM), spans) * BM
    d = tl.arange(0, BD)
    key = _marked_keys(index, b, tile * BC, N, BC)
    k = _rows_of(k_ptr + b * k_b + h // R * k_g, key, k_n, D, BD)
    v = _rows_of(v_ptr + b * v_b + h // R * v_g, key, v_n, D, BD)
    sum_k = tl.zeros((BC, BD), tl.float32)
    sum_v = tl.zeros((BC, BD), tl.float32)
    for start in range(part * span, tl.minimum(N, (part + 1) * span), BM):
        rows = start + tl.arange(0, BM)
        wide = rows.to(tl.int64)
        real = (rows < N)[:, None]
        box = real & (d[None, :] < D)
        q = tl.load(q_ptr + b * q_b + h * q_h + wide[:, None] * q_m + d[None, :], mask=box, other=0.0)
        do = tl.load(do_ptr + b * do_b + h * do_h + wide[:, None] * do_m + d[None, :], mask=box, other=0.0)
        at = (b * H + h) * N + wide
        lse = tl.load(lse_ptr + at, mask=rows < N, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=rows < N, other=0.0)
        seen = seen_columns(rows, key, real, 0, left, right, N, N)
        scores = tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None] * 1.4426950408889634
        weights = tl.exp2(tl.where(seen, scores, float("-inf")))
        change = weights * (tl.dot(do, tl.trans(v)) - delta[:, None])
        sum_k += tl.dot(tl.trans(change.to(q.dtype)), q)
        sum_v += tl.dot(tl.trans(weights.to(do.dtype)), do)
    # [B * H, P, BC, D]
    c = tl.arange(0, BC)
    sums = ((second_program().to(tl.int64) * P + tl.program_id(0)) * BC + c[:, None]) * D + d[None, :]
    tl.store(dk_ptr + sums, sum_k * scale, mask=(d < D)[None, :])
    tl.store(dv_ptr + sums, sum_v, mask=(d < D)[None, :])


@triton.jit(do_not_specialize=["N", "P", "S"])
def _add_up(
    sum_k_ptr, sum_v_ptr, dk_ptr, dv_ptr, index, counts, dk_b, dk_g, dk_n, dv_b, dv_g, dv_n, N, P, S,
    BA: tl.constexpr, BP: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    groups = H // R
    b, g = (second_program() // groups).to(tl.int64), (second_program() % groups).to(tl.int64)
    tile, first = tl.program_id(0) // (BC // BA), tl.program_id(0) % (BC // BA) * BA
    count = tl.load(counts + b)
    if tile * BC + first >= count:
        return
    spans = tl.minimum(S, P // tl.cdiv(count, BC))
    c, d, p = first + tl.arange(0, BA), tl.arange(0, BD), tl.arange(0, BP)
    at = (p * BC * D)[:, None, None] + (c * D)[None, :, None] + d[None, None, :]
    sum_k = tl.zeros((BA, BD), tl.float32)
    sum_v = tl.zeros((BA, BD), tl.float32)
    for r in range(R):
        of_head = ((b * H + g * R + r) * P + tile * spans) * BC * D
        for part in range(0, spans, BP):
            inside = (part + p < spans)[:, None, None] & (d < D)[None, None, :]
            sum_k += tl.sum(tl.load(sum_k_ptr + of_head + part * BC * D + at, mask=inside, other=0.0), 0)
            sum_v += tl.sum(tl.load(sum_v_ptr + of_head + part * BC * D + at, mask=inside, other=0.0), 0)
    key = _marked_keys(index, b, tile * BC + first, N, BA)
    there = (key >= 0)[:, None] & (d < D)[None, :]
    place = tl.where(key >= 0, key, 0).to(tl.int64)[:, None]
    at_dk = dk_ptr + b * dk_b + g * dk_g + place * dk_n + d[None, :]
    at_dv = dv_ptr + b * dv_b + g * dv_g + place * dv_n + d[None, :]
    dk = tl.load(at_dk, mask=there, other=0.0)
    dv = tl.load(at_dv, mask=there, other=0.0)
    tl.store(at_dk, (dk.to(tl.float32) + sum_k).to(dk.dtype), mask=there)
    tl.store(at_dv, (dv.to(tl.float32) + sum_v).to(dv.dtype), mask=there)
