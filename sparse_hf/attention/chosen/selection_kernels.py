"""Triton kernels that score keys and keep the best: products of an indexer's heads in one tile, and a choice by the digits of a threshold.

Legend: B batch, C heads of the choice, I heads of an indexer, Q queries of a piece, K keys, D head dim, N chosen keys of a query; `BM`
queries and `BN` keys of a tile. A key begins at `size` times its number, and the first query is at `offset`.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ..programs import second_program

# digits of a score's 32 bits, from the highest
BITS, DIGITS, DIGIT_BITS, DIGIT_VALUES = tl.constexpr(32), tl.constexpr(4), tl.constexpr(8), tl.constexpr(256)


@triton.jit(do_not_specialize=["offset", "size", "Q", "K"])
def indexer_scores(
    q_ptr, k_ptr, w_ptr, out_ptr, q_b, q_n, q_i, k_b, k_n, w_b, w_n, out_b, offset, size, Q, K,
    IS_CAUSAL: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum over heads of `weight * relu(q @ k)`, of a tile; tiles of no query's past are left as they are."""
    tiles = tl.cdiv(K, BN)
    b = (second_program() // tiles).to(tl.int64)
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), second_program() % tiles * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    last = tl.program_id(0) * BM + BM - 1 + offset
    if IS_CAUSAL and second_program() % tiles * BN * size > last:
        return
    box = (n[:, None] < K) & (d[None, :] < D)
    k = tl.load(k_ptr + b * k_b + n[:, None].to(tl.int64) * k_n + d[None, :], mask=box, other=0.0)
    q_ptr += b * q_b + m[:, None].to(tl.int64) * q_n + d[None, :]
    w_ptr += b * w_b + m.to(tl.int64) * w_n
    box = (m[:, None] < Q) & (d[None, :] < D)
    found = tl.zeros((BM, BN), tl.float32)
    for i in range(HEADS):
        q = tl.load(q_ptr + i * q_i, mask=box, other=0.0)
        weight = tl.load(w_ptr + i, mask=m < Q, other=0.0)
        found += tl.maximum(tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0) * weight[:, None]
    at = out_ptr + b * out_b + m[:, None].to(tl.int64) * K + n[None, :]
    tl.store(at, found, mask=(m[:, None] < Q) & (n[None, :] < K))


@triton.jit(do_not_specialize=["offset", "size", "Q", "K"])
def dot_scores(
    q_ptr, k_ptr, out_ptr, q_b, q_c, q_n, k_b, k_g, k_n, offset, size, Q, K,
    IS_CAUSAL: tl.constexpr, C: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`q @ k`, of a tile; tiles of keys that begin behind all queries are left as they are."""
    tiles, row = tl.cdiv(K, BN), second_program().to(tl.int64)
    first_query, first_key = tl.program_id(0) // tiles * BM, tl.program_id(0) % tiles * BN
    if IS_CAUSAL and first_key * size > first_query + BM - 1 + offset:
        return
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    q_ptr += row // C * q_b + row % C * q_c + first_query.to(tl.int64) * q_n
    k_ptr += row // C * k_b + row % C * G // C * k_g + first_key.to(tl.int64) * k_n
    found = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)[None, :]
        q = tl.load(q_ptr + (m[:, None] * q_n + d), mask=(first_query + m[:, None] < Q) & (d < D), other=0.0)
        k = tl.load(k_ptr + (n[:, None] * k_n + d), mask=(first_key + n[:, None] < K) & (d < D), other=0.0)
        if q.dtype != k.dtype:
            q, k = q.to(tl.float32), k.to(tl.float32)
        found = tl.dot(q, tl.trans(k), found, input_precision=PRECISION)
    out_ptr += (row * Q + first_query) * K + first_key
    box = (first_query + m[:, None] < Q) & (first_key + n[None, :] < K)
    tl.store(out_ptr + (m[:, None] * K + n[None, :]), found, mask=box)


@triton.jit
def _end(query, offset, size, K, IS_CAUSAL: tl.constexpr):
    """How many of the first keys begin no later than where a query is."""
    if IS_CAUSAL:
        return tl.where(query + offset < 0, 0, tl.minimum(K, (query + offset) // size + 1))
    return query * 0 + K


@triton.jit
def _ordered(scores_ptr, n, end):
    """Scores as whole numbers in their order, and which of them may be chosen."""
    x = tl.load(scores_ptr + n, mask=n < end, other=float("-inf"))
    # minus zero is zero
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    # floats below zero are in the opposite order of their bits
    order = bits ^ ((bits >> 31) | -2147483648)
    return order.to(tl.uint32, bitcast=True), (n < end) & (x != float("-inf"))


@triton.jit(do_not_specialize=["offset", "size", "Q", "K", "count"])
def select(
    scores_ptr, index_ptr, index_r, index_n, offset, size, Q, K, count, IS_CAUSAL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys of one query with the highest scores, in ascending order; of equal scores the lower key."""
    query, row = tl.program_id(0), second_program().to(tl.int64)
    scores_ptr += (row * Q + query) * K
    index_ptr += row * index_r + query.to(tl.int64) * index_n
    end = _end(query, offset, size, K, IS_CAUSAL)
    threshold = tl.full((), 0, tl.uint32)
    missing = count
    value = tl.arange(0, DIGIT_VALUES)
    for step in tl.static_range(DIGITS):
        shift = (DIGITS - 1 - step) * DIGIT_BITS
        found = tl.zeros((DIGIT_VALUES,), tl.int32)
        for start in range(0, end, BN):
            order, may = _ordered(scores_ptr, start + tl.arange(0, BN), end)
            if step > 0:
                may = may & (((order ^ threshold) >> (shift + DIGIT_BITS)) == 0)
            digits = ((order >> shift) & (DIGIT_VALUES - 1)).to(tl.int32)
            found += tl.histogram(digits, DIGIT_VALUES, mask=may)
        if step == 0:
            missing = tl.minimum(missing, tl.sum(found))
        # the highest digit with enough scores from it upwards
        digit = tl.max(tl.where(tl.cumsum(found, 0, reverse=True) >= missing, value, 0))
        missing -= tl.sum(tl.where(value > digit, found, 0))
        threshold = threshold | (digit.to(tl.uint32) << shift)
    taken = 0
    equal = 0
    for start in range(0, end, BN):
        n = start + tl.arange(0, BN)
        order, may = _ordered(scores_ptr, n, end)
        same = (may & (order == threshold)).to(tl.int32)
        chosen = (may & (order > threshold)) | ((same > 0) & (equal + tl.cumsum(same, 0) <= missing))
        place = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(index_ptr + place, n, mask=chosen)
        taken += tl.sum(chosen.to(tl.int32))
        equal += tl.sum(same)
    for start in range(0, count, BN):
        n = start + tl.arange(0, BN)
        tl.store(index_ptr + n, -1, mask=(n >= taken) & (n < count))


@triton.jit(do_not_specialize=["offset", "size", "Q", "K", "count"])
def select_of_few(
    scores_ptr, index_ptr, index_r, index_n, offset, size, Q, K, count,
    IS_CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same of `BM` queries, all of whose scores are at hand: the threshold is found bit by bit."""
    query, row = tl.program_id(0) * BM + tl.arange(0, BM), second_program().to(tl.int64)
    n, c = tl.arange(0, BN)[None, :], tl.arange(0, BC)[None, :]
    end = tl.where(query < Q, _end(query, offset, size, K, IS_CAUSAL), 0)
    order, may = _ordered(scores_ptr + (row * Q + query)[:, None] * K, n, end[:, None])
    # below whatever may be chosen
    order = tl.where(may, order, 0)
    taken = tl.minimum(count, tl.sum(may.to(tl.int32), 1))
    threshold, one = tl.full((BM,), 0, tl.uint32), tl.full((BM,), 1, tl.uint32)
    for step in tl.static_range(BITS):
        shift = BITS - 1 - step
        higher = threshold | (one << shift)
        enough = tl.sum((order >= higher[:, None]).to(tl.int32), 1) >= taken
        threshold = tl.where(enough, higher, threshold)
    above, same = order > threshold[:, None], (order == threshold[:, None]).to(tl.int32)
    missing = taken - tl.sum(above.to(tl.int32), 1)
    chosen = above | ((same > 0) & (tl.cumsum(same, 1) <= missing[:, None]))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    index_ptr += row * index_r + query.to(tl.int64)[:, None] * index_n
    tl.store(index_ptr + place, tl.broadcast_to(n, (BM, BN)), mask=chosen)
    left = (query < Q)[:, None] & (c >= taken[:, None]) & (c < count)
    tl.store(index_ptr + tl.broadcast_to(c, (BM, BC)), -1, mask=left)
