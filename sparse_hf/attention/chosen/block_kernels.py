"""Triton kernels that go over chosen keys block by block: a tile has queries that chose a block, and no sum is made by atomics.

Lists of the queries that chose each block (`gathers.Choosers`) are cut to segments, one for a program. A list has places in the choice
by blocks, `query * (N / S) + which of its blocks`.

Legend: B batch, H query heads, G key heads, C heads of the choice, P rows of heads that read other keys than their neighbours, R =
H / P; Q queries, K keys, N chosen keys of a query, S keys of a block, D and E head dims of keys and values; `BR` heads and `BP`
queries of a tile. Scores are powers of two.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ..programs import second_program
from .kernels import LOG2_E, OF_SEGMENTS, capped, gather, in_band, row_of, slope


@triton.jit
def _segment(offsets, firsts, block_ptr, first_row, segments, limit, l_b, K, P: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
             S: tl.constexpr):  # fmt: skip
    """The row of heads of a program, its list, its block, or one behind all, and where its part of the list begins and ends."""
    segment = tl.program_id(0).to(tl.int64)
    row, blocks = first_row + second_program().to(tl.int64), tl.cdiv(K, S)
    b, c = row_of(P, H, C, row)
    of_list = b * l_b + c
    block = tl.load(block_ptr + of_list * segments + segment).to(tl.int64)
    at = of_list * (blocks + 1) + tl.minimum(block, blocks - 1)
    begin = tl.load(offsets + at) + (segment - tl.load(firsts + at)) * limit
    return row, of_list, block, begin, tl.minimum(tl.load(offsets + at + 1), begin + limit)


@triton.jit
def _block(
    k_ptr, v_ptr, b, g, block, k_b, k_g, k_n, v_b, v_g, v_n, K,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The keys and values of a block, zeros behind the last."""
    key = block * S + tl.arange(0, S)
    k = gather(k_ptr + b * k_b + g * k_g, key, key < K, k_n, D, BD)
    return k, gather(v_ptr + b * v_b + g * v_g, key, key < K, v_n, E, BE)


@triton.jit
def _queries(
    place_ptr, table_ptr, of_list, block, start, end, Q, K, N, offset, near, far, low,
    BP: tl.constexpr, BR: tl.constexpr, S: tl.constexpr, HAS_KEYS: tl.constexpr,
):  # fmt: skip
    """The pairs of a tile with a query, their places in the choice of blocks, their queries, and which keys those chose."""
    pair = start + tl.arange(0, BP * BR) // BR
    real = pair < end
    place = tl.load(place_ptr + of_list * Q * (N // S) + pair, mask=real, other=0).to(tl.int64)
    query = place // (N // S)
    if HAS_KEYS:
        chosen = table_ptr + of_list * Q * N + place[:, None] * S + tl.arange(0, S)[None, :]
        there = tl.load(chosen, mask=real[:, None], other=-1) >= 0
    else:
        key = (block * S).to(tl.int32) + tl.arange(0, S)[None, :]
        there = in_band(key, (query + offset).to(tl.int32)[:, None] - key, K, near, far, low)
    return real, place, query, there


@triton.jit(do_not_specialize=OF_SEGMENTS)
def forward(
    q_ptr, k_ptr, v_ptr, table_ptr, part_out, part_lse, place_ptr, offsets, firsts, block_ptr,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n,
    scale, cap, Q, K, N, first_row, segments, limit, l_b, offset, near, far, low,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    S: tl.constexpr, HAS_KEYS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of the queries of one segment to the keys of its block alone, and its lse in powers of two, by place and head."""
    row, of_list, block, begin, end = _segment(
        offsets, firsts, block_ptr, first_row, segments, limit, l_b, K, P, H, C, S
    )
    if block >= tl.cdiv(K, S):
        return
    own = second_program().to(tl.int64)
    b, g = row_of(P, H, G, row)
    k, v = _block(k_ptr, v_ptr, b, g, block, k_b, k_g, k_n, v_b, v_g, v_n, K, S, D, BD, E, BE)
    # one loop, whose loads are on their way before they are needed
    turns: tl.constexpr = (R + BR - 1) // BR
    for turn in range(tl.cdiv(end - begin, BP) * turns):
        start = begin + turn // turns * BP
        is_pair, place, query, there = _queries(
            place_ptr, table_ptr, of_list, block, start, end, Q, K, N, offset, near, far, low, BP, BR, S, HAS_KEYS
        )
        r = turn % turns * BR + tl.arange(0, BP * BR) % BR
        real = is_pair & (r < R)
        q = gather(q_ptr + b * q_b, (row % P * R + r) * q_h + query * q_n, real, 1, D, BD)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, HAS_CAP)
        scores = tl.where(there, scores, float("-inf"))
        top = tl.max(scores, 1)
        weights = tl.exp2(scores - tl.where(top > float("-inf"), top, 0.0)[:, None])
        total = tl.sum(weights, 1)
        safe = tl.where(total > 0, total, 1.0)
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) / safe[:, None]
        at = (own * Q * (N // S) + place) * R + r
        e = tl.arange(0, BE)[None, :]
        tl.store(part_out + at[:, None] * E + e, out.to(part_out.dtype.element_ty), mask=real[:, None] & (e < E))
        tl.store(part_lse + at, top + tl.log2(safe), mask=real)


@triton.jit(do_not_specialize=["Q", "N", "first_row"])
def join(
    part_out, part_lse, out_ptr, lse_ptr, o_b, o_h, o_n, Q, N, first_row,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Out and lse of one query of the heads of a row, of its `N` blocks."""
    query, own = tl.program_id(0).to(tl.int64), second_program().to(tl.int64)
    row = first_row + own
    e, n = tl.arange(0, BE), tl.arange(0, BN)
    for r in range(R):
        out = tl.zeros((BE,), tl.float32)
        top = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, N, BN):
            at = ((own * Q + query) * N + start + n) * R + r
            lse = tl.load(part_lse + at, mask=start + n < N, other=float("-inf"))
            new_top = tl.maximum(top, tl.max(lse))
            finite = tl.where(new_top > float("-inf"), new_top, 0.0)
            weights, shrink = tl.exp2(lse - finite), tl.exp2(top - finite)
            there = lse > float("-inf")
            part = tl.load(part_out + at[:, None] * E + e, mask=there[:, None] & (e < E)[None, :], other=0.0)
            out = out * shrink + tl.sum(part.to(tl.float32) * weights[:, None], 0)
            total = total * shrink + tl.sum(weights)
            top = new_top
        safe = tl.where(total > 0, total, 1.0)
        h = row % P * R + r
        to = out_ptr + row // P * o_b + h * o_h + query * o_n + e
        tl.store(to, (out / safe).to(out_ptr.dtype.element_ty), mask=e < E)
        lse = tl.where(total > 0, (top + tl.log2(safe)) / LOG2_E, float("-inf"))
        tl.store(lse_ptr + (row // P * H + h) * Q + query, lse)


@triton.jit(do_not_specialize=["Q", "N", "first_row"])
def add(
    part, out_ptr, o_b, o_h, o_n, Q, N, first_row,
    P: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of one query of the heads of a row, of what its `N` blocks gave."""
    query, own = tl.program_id(0).to(tl.int64), second_program().to(tl.int64)
    row = first_row + own
    d, n = tl.arange(0, BD), tl.arange(0, BN)
    for r in range(R):
        total = tl.zeros((BD,), tl.float32)
        for start in range(0, N, BN):
            at = ((own * Q + query) * N + start + n) * R + r
            box = (start + n < N)[:, None] & (d < D)[None, :]
            total += tl.sum(tl.load(part + at[:, None] * D + d, mask=box, other=0.0).to(tl.float32), 0)
        to = out_ptr + row // P * o_b + (row % P * R + r) * o_h + query * o_n + d
        tl.store(to, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=OF_SEGMENTS)
def gradients(
    do_ptr, q_ptr, k_ptr, v_ptr, table_ptr, lse_ptr, delta_ptr, part_q, part_k, part_v, place_ptr, offsets, firsts, block_ptr,
    do_b, do_h, do_n, q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n,
    scale, cap, Q, K, N, first_row, segments, limit, l_b, offset, near, far, low,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    S: tl.constexpr, HAS_KEYS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    HAS_CAP: tl.constexpr, OF_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of one segment add to the gradients of the keys and values of its block, in float32.

    If asked for, what the block adds to the gradients of its queries is written by place and head.
    """
    row, of_list, block, begin, end = _segment(
        offsets, firsts, block_ptr, first_row, segments, limit, l_b, K, P, H, C, S
    )
    if block >= tl.cdiv(K, S):
        return
    own = second_program().to(tl.int64)
    b, g = row_of(P, H, G, row)
    k, v = _block(k_ptr, v_ptr, b, g, block, k_b, k_g, k_n, v_b, v_g, v_n, K, S, D, BD, E, BE)
    sum_k = tl.zeros((S, BD), tl.float32)
    sum_v = tl.zeros((S, BE), tl.float32)
    turns: tl.constexpr = (R + BR - 1) // BR
    for turn in range(tl.cdiv(end - begin, BP) * turns):
        start = begin + turn // turns * BP
        is_pair, place, query, there = _queries(
            place_ptr, table_ptr, of_list, block, start, end, Q, K, N, offset, near, far, low, BP, BR, S, HAS_KEYS
        )
        there = tl.trans(there)
        r = turn % turns * BR + tl.arange(0, BP * BR) % BR
        h, real = row % P * R + r, is_pair & (r < R)
        q = gather(q_ptr + b * q_b, h * q_h + query * q_n, real, 1, D, BD)
        do = gather(do_ptr + b * do_b, h * do_h + query * do_n, real, 1, E, BE)
        at = (b * H + h) * Q + query
        lse = tl.load(lse_ptr + at, mask=real, other=float("inf"))
        lse = tl.where(lse > float("-inf"), lse, float("inf"))
        delta = tl.load(delta_ptr + at, mask=real, other=0.0)
        scores = capped(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, cap, HAS_CAP)
        weights = tl.exp2(tl.where(there, scores, float("-inf")) - lse[None, :] * LOG2_E)
        change = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        change = change * slope(scores, cap, HAS_CAP)
        sum_v = tl.dot(weights.to(do.dtype), do, sum_v, input_precision=PRECISION)
        sum_k = tl.dot(change.to(q.dtype), q, sum_k, input_precision=PRECISION)
        if OF_QUERIES:
            of_q = tl.dot(tl.trans(change.to(k.dtype)), k, input_precision=PRECISION) * scale
            to = part_q + ((own * Q * (N // S) + place) * R + r)[:, None] * D + tl.arange(0, BD)[None, :]
            tl.store(to, of_q.to(part_q.dtype.element_ty), mask=real[:, None] & (tl.arange(0, BD)[None, :] < D))
    at = (own * segments + tl.program_id(0)) * S + tl.arange(0, S)[:, None]
    d, e = tl.arange(0, BD)[None, :], tl.arange(0, BE)[None, :]
    tl.store(part_k + at * D + d, sum_k * scale, mask=d < D)
    tl.store(part_v + at * E + e, sum_v, mask=e < E)
