"""Triton kernels of attention over chosen keys: rows are gathered where they are, and no sum is made by atomics.

A key's gradient is a sum over the queries that chose it. Lists of them (`gathers.Choosers`) are cut to segments, each of which
is added up by one program, and the segments of a key are added in order. Keys that are chosen in blocks have lists together
(`block_kernels.py`).

Legend: B batch, H query heads, G key heads, C heads of the choice, P rows of heads that read other keys than their neighbours, R =
H / P; Q queries, K keys, N chosen keys of a query, S keys of a block, D and E head dims of keys and values; `BR` heads, `BN` chosen
keys and `BP` queries of a tile. Scores are powers of two. The choice is a table of keys, or of blocks, of which a query sees the keys
that are from `near` to `far` before its place, which is counted from `offset`, and not below `low`.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ..programs import second_program

LOG2_E = tl.constexpr(1.4426950408889634)
# what differs from call to call, of kernels that go over segments
OF_SEGMENTS = [
    "scale", "cap", "Q", "K", "N", "first_row", "segments", "limit", "l_b", "offset", "near", "far", "low",
]  # fmt: skip


@triton.jit
def row_of(P: tl.constexpr, H: tl.constexpr, heads: tl.constexpr, row):
    """The batch row, and the head of a tensor with `heads` heads that a row of P reads."""
    return row // P, row % P * heads // P


@triton.jit
def _program(
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """The query of a program, its batch row, key head and head of the choice, its heads, and which of them there are."""
    tiles: tl.constexpr = (R + BR - 1) // BR
    query, row = tl.program_id(0).to(tl.int64), (second_program() // tiles).to(tl.int64)
    b, g = row_of(P, H, G, row)
    _, c = row_of(P, H, C, row)
    r = second_program() % tiles * BR + tl.arange(0, BR)
    return query, b, g, c, row % P * R + r, r < R


@triton.jit
def gather(ptr, token, exists, stride, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)[None, :]
    return tl.load(ptr + token[:, None] * stride + d, mask=exists[:, None] & (d < D), other=0.0)


@triton.jit
def in_band(key, behind, K, near, far, low):
    """Which keys there are that are so far behind a query, of those that it may see."""
    return (key >= low) & (key < K) & (behind >= near) & (behind <= far)


@triton.jit
def _keys(table, start, place, N, K, near, far, low, BN: tl.constexpr, S: tl.constexpr):
    """The next chosen keys of a query at `place`, and which of them there are."""
    n = start + tl.arange(0, BN)
    if S == 1:
        key = tl.load(table + n, mask=n < N, other=-1)
        there = (key >= 0) & (key < K)
    else:
        if S % BN == 0:
            # all of one block, side by side
            key = tl.load(table + start // S) * S + (start % S + tl.arange(0, BN))
        else:
            key = tl.load(table + n // S, mask=n < N, other=-1) * S + n % S
        there = in_band(key, place - key, K, near, far, low)
    return key.to(tl.int64), there


@triton.jit
def capped(product, scale, cap, HAS_CAP: tl.constexpr):
    """Scores after scale and soft cap, times log2(e)."""
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        return (1 - 2 / (tl.exp2(product * (2 * LOG2_E * scale / cap)) + 1)) * (cap * LOG2_E)
    return product * (scale * LOG2_E)


@triton.jit
def absorbed(scores, top, total):
    """Weights of some more keys by the largest score so far, what shrinks the sums before, and the new largest score and total."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen nothing yet: subtracting -inf would give NaN
    finite = tl.where(new_top > float("-inf"), new_top, 0.0)
    weights, shrink = tl.exp2(scores - finite[:, None]), tl.exp2(top - finite)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def slope(scores, cap, HAS_CAP: tl.constexpr):
    """How much a score changes by its product, given the capped one."""
    if HAS_CAP:
        ratio = scores / (cap * LOG2_E)
        return 1 - ratio * ratio
    return tl.full(scores.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=["Q", "K", "N", "i_b", "offset", "near", "far", "low", "scale", "cap"])
def forward(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, o_b, o_h, o_n,
    scale, cap, Q, K, N, i_b, offset, near, far, low,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse of one query, for `BR` of the heads that read the same keys."""
    query, b, g, c, h, real = _program(H, G, C, P, R, BR)
    q = gather(q_ptr + b * q_b + query * q_n, h, real, q_h, D, BD)
    table = table_ptr + b * i_b + (c * Q + query) * (N // S)
    out = tl.zeros((BR, BE), tl.float32)
    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, N, BN):
        key, there = _keys(table, start, query + offset, N, K, near, far, low, BN, S)
        k = gather(k_ptr + b * k_b + g * k_g, key, there, k_n, D, BD)
        v = gather(v_ptr + b * v_b + g * v_g, key, there, v_n, E, BE)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, HAS_CAP)
        scores = tl.where(there[None, :], scores, float("-inf"))
        weights, shrink, top, total = absorbed(scores, top, total)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    safe = tl.where(total > 0, total, 1.0)
    e = tl.arange(0, BE)[None, :]
    at = out_ptr + b * o_b + h[:, None] * o_h + query * o_n + e
    tl.store(at, (out / safe[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None] & (e < E))
    lse = tl.where(total > 0, (top + tl.log2(safe)) / LOG2_E, float("-inf"))
    tl.store(lse_ptr + (b * H + h) * Q + query, lse, mask=real)


@triton.jit(do_not_specialize=["Q", "K", "N", "i_b", "offset", "near", "far", "low", "scale", "cap"])
def gradients_of_queries(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    do_b, do_h, do_n, q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, o_b, o_h, o_n, dq_b, dq_h, dq_n,
    scale, cap, Q, K, N, i_b, offset, near, far, low,
    HAS_GRAD_LSE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one query, for `BR` of the heads that read the same keys, and delta, which that of keys reads."""
    query, b, g, c, h, real = _program(H, G, C, P, R, BR)
    q = gather(q_ptr + b * q_b + query * q_n, h, real, q_h, D, BD)
    do = gather(do_ptr + b * do_b + query * do_n, h, real, do_h, E, BE)
    out = gather(out_ptr + b * o_b + query * o_n, h, real, o_h, E, BE)
    at = (b * H + h) * Q + query
    lse = tl.load(lse_ptr + at, mask=real, other=float("inf"))
    lse = tl.where(lse > float("-inf"), lse, float("inf"))
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(dlse_ptr + at, mask=real, other=0.0)
    tl.store(delta_ptr + at, delta, mask=real)
    table = table_ptr + b * i_b + (c * Q + query) * (N // S)
    total = tl.zeros((BR, BD), tl.float32)
    for start in range(0, N, BN):
        key, there = _keys(table, start, query + offset, N, K, near, far, low, BN, S)
        k = gather(k_ptr + b * k_b + g * k_g, key, there, k_n, D, BD)
        v = gather(v_ptr + b * v_b + g * v_g, key, there, v_n, E, BE)
        scores = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, HAS_CAP)
        weights = tl.exp2(tl.where(there[None, :], scores, float("-inf")) - lse[:, None] * LOG2_E)
        change = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        change = change * slope(scores, cap, HAS_CAP)
        total += tl.dot(change.to(k.dtype), k, input_precision=PRECISION)
    d = tl.arange(0, BD)[None, :]
    at = dq_ptr + b * dq_b + h[:, None] * dq_h + query * dq_n + d
    tl.store(at, (total * scale).to(dq_ptr.dtype.element_ty), mask=real[:, None] & (d < D))


@triton.jit(do_not_specialize=OF_SEGMENTS)
def gradients_of_keys(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, part_k, part_v, query_ptr, offsets, firsts, key_ptr,
    do_b, do_h, do_n, q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n,
    scale, cap, Q, K, N, first_row, segments, limit, l_b, offset, near, far, low,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """What the queries of one segment add to the gradients of its key and value, or of one of those of its block, in float32."""
    segment, own = (tl.program_id(0) // S).to(tl.int64), second_program().to(tl.int64)
    row = first_row + own
    b, g = row_of(P, H, G, row)
    _, c = row_of(P, H, C, row)
    of_list = b * l_b + c
    block, blocks = tl.load(key_ptr + of_list * segments + segment).to(tl.int64), tl.cdiv(K, S)
    key = block * S + tl.program_id(0) % S
    if key >= K:
        return
    offsets += of_list * (blocks + 1) + block
    begin = tl.load(offsets) + (segment - tl.load(firsts + of_list * (blocks + 1) + block)) * limit
    end = tl.minimum(tl.load(offsets + 1), begin + limit)
    d, e, m = tl.arange(0, BD), tl.arange(0, BE), tl.arange(0, BP * BR)
    k = tl.load(k_ptr + b * k_b + g * k_g + key * k_n + d, mask=d < D, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * v_b + g * v_g + key * v_n + e, mask=e < E, other=0.0).to(tl.float32)
    sum_k = tl.zeros((BD,), tl.float32)
    sum_v = tl.zeros((BE,), tl.float32)
    for start in range(begin, end, BP):
        pair = start + m // BR
        query = tl.load(query_ptr + of_list * Q * (N // S) + pair, mask=pair < end, other=0).to(tl.int64)
        there = pair < end
        if S > 1:
            query = query // (N // S)
            there = there & in_band(key, query + offset - key, K, near, far, low)
        for first in range(0, R, BR):
            r = first + m % BR
            h, real = row % P * R + r, there & (r < R)
            q = gather(q_ptr + b * q_b, h * q_h + query * q_n, real, 1, D, BD).to(tl.float32)
            do = gather(do_ptr + b * do_b, h * do_h + query * do_n, real, 1, E, BE).to(tl.float32)
            at = (b * H + h) * Q + query
            lse = tl.load(lse_ptr + at, mask=real, other=float("inf"))
            lse = tl.where(lse > float("-inf"), lse, float("inf"))
            delta = tl.load(delta_ptr + at, mask=real, other=0.0)
            scores = capped(tl.sum(q * k[None, :], 1), scale, cap, HAS_CAP)
            weights = tl.exp2(scores - lse * LOG2_E)
            change = weights * (tl.sum(do * v[None, :], 1) - delta) * slope(scores, cap, HAS_CAP)
            sum_k += tl.sum(q * change[:, None], 0)
            sum_v += tl.sum(do * weights[:, None], 0)
    at = own * segments * S + tl.program_id(0)
    tl.store(part_k + at * D + d, sum_k * scale, mask=d < D)
    tl.store(part_v + at * E + e, sum_v, mask=e < E)


@triton.jit(do_not_specialize=["K", "first_row", "segments", "l_b"])
def add_segments(
    part_k, part_v, firsts, dk_ptr, dv_ptr, dk_b, dk_p, dk_n, dv_b, dv_p, dv_n, K, first_row, segments, l_b,
    H: tl.constexpr, C: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    E: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Add the segments of one key, in order, which are those of its block."""
    key, own = tl.program_id(0).to(tl.int64), second_program().to(tl.int64)
    row = first_row + own
    b, c = row_of(P, H, C, row)
    firsts += (b * l_b + c) * (tl.cdiv(K, S) + 1) + key // S
    begin, end = tl.load(firsts), tl.load(firsts + 1)
    d, e, s = tl.arange(0, BD)[None, :], tl.arange(0, BE)[None, :], tl.arange(0, BS)[:, None]
    sum_k = tl.zeros((BS, BD), tl.float32)
    sum_v = tl.zeros((BS, BE), tl.float32)
    for start in range(begin, end, BS):
        at = (own * segments + start + s) * S + key % S
        sum_k += tl.load(part_k + at * D + d, mask=(start + s < end) & (d < D), other=0.0)
        sum_v += tl.load(part_v + at * E + e, mask=(start + s < end) & (e < E), other=0.0)
    total_k, total_v = tl.sum(sum_k, 0), tl.sum(sum_v, 0)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    tl.store(dk_ptr + b * dk_b + row % P * dk_p + key * dk_n + d, total_k.to(dk_ptr.dtype.element_ty), mask=d < D)
    tl.store(dv_ptr + b * dv_b + row % P * dv_p + key * dv_n + e, total_v.to(dv_ptr.dtype.element_ty), mask=e < E)
