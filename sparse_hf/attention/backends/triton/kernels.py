"""Triton kernels over lists of tiles (`plan/tile_lists.py`): attention forward and backward, each pair computed once.

One kernel serves all patterns, since a pattern is data here: lists, and masks of the tiles that it cuts. Nothing is compiled per
pattern or length, no sum is made by atomics, and weights are recomputed from lse in the backward pass (Dao et al.,
arXiv:2205.14135). Tokens may stand in another order than in memory (hash buckets): `index` says which stands at each place.

Legend: B batch, H query heads, G key heads, R = H / G, D head dim; S places of a tile; a line is a query tile of a group of the lists
(`by_query`) or a key tile (`by_key`), and an entry one of its tiles. Scores are powers of two.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ...programs import second_program, second_programs

LOG2_E = tl.constexpr(1.4426950408889634)
# what a query may see of tokens in another order: all, its past and itself, its past, all but itself
ALL, PAST_AND_SELF, PAST, OTHERS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _mix(x):
    # `dropout._mix`, in 32 bits
    x = ((x ^ (x >> 16)) * 0x7FEB352D).to(tl.uint32)
    x = ((x ^ (x >> 15)) * 0x31848BAB).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _kept(seed, b, h, q, k, threshold):
    """`dropout.kept_at` for places q and k that broadcast; seed and threshold are words with a sign."""
    row = _mix(_mix(_mix((seed ^ b).to(tl.uint32)) ^ h.to(tl.uint32)) ^ q.to(tl.uint32))
    return _mix(row ^ _mix((k.to(tl.int64) + 0x9E3779B9).to(tl.uint32))) >= threshold.to(tl.uint32)


@triton.jit
def _tokens(index, width, row, place, length, INDEXED: tl.constexpr):
    """Which tokens stand at `place`, and which of them exist."""
    if INDEXED:
        token = tl.load(index + row * width + place).to(tl.int64)
        return tl.where(token >= 0, token, 0), token >= 0
    return place.to(tl.int64), place < length


@triton.jit
def _spots(token, exists, place, places, BY_PLACE: tl.constexpr):
    """Where results are written to: by token, or by place if a token stands at several."""
    if BY_PLACE:
        return place.to(tl.int64), place < places
    return token, exists


@triton.jit
def _item(segments, cut, CUT: tl.constexpr):
    """What a program works on: the number of a segment, a tile, the number of the tile's segment, and whether it is one.

    Segments, of which there are `cut`, come before the lines whose first entries are theirs.
    """
    item = tl.program_id(0)
    if CUT:
        is_part = item < cut
        tile = tl.load(segments + item * 2, mask=is_part, other=item - cut)
        return item, tile, tl.load(segments + item * 2 + 1, mask=is_part, other=0), is_part
    return item, item, 0, False


@triton.jit
def _spots_of_part(item, row, S: tl.constexpr):
    """Where a segment of a head of a batch row writes to."""
    return (item.to(tl.int64) * second_programs() + row) * S + tl.arange(0, S)


@triton.jit
def _rows(ptr, token, exists, stride, d, D: tl.constexpr):
    return tl.load(ptr + token[:, None] * stride + d[None, :], mask=exists[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _score(a, b, scale, cap, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b.T` after scale and soft cap, times log2(e)."""
    found = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        return (1 - 2 / (tl.exp2(found * (2 * LOG2_E * scale / cap)) + 1)) * (cap * LOG2_E)
    return found * (scale * LOG2_E)


@triton.jit
def _related(q, k, RELATION: tl.constexpr):
    if RELATION == PAST_AND_SELF:
        return q >= k
    if RELATION == PAST:
        return q > k
    if RELATION == OTHERS:
        return q != k
    return (q >= 0) & (k >= 0)


@triton.jit
def _absorb(
    state_out, top, total, q, q_token, q_exists, q_place, k_ptr, v_ptr, k_n, v_n, others, numbers, masks, k_index, width_k,
    row, entry, kv_len, scale, cap, seed, b, h, threshold, boost,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, RELATION: tl.constexpr, HAS_CAP: tl.constexpr, DROPOUT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge one tile of keys into the running (out, top, total)."""
    n, d = tl.arange(0, S), tl.arange(0, BD)
    k_place = tl.load(others + entry) * S + n
    token, exists = _tokens(k_index, width_k, row, k_place, kv_len, INDEXED)
    if MASKED:
        k = _rows(k_ptr, token, exists, k_n, d, D)
        v = _rows(v_ptr, token, exists, v_n, d, D)
    else:
        k = _rows(k_ptr, token, n >= 0, k_n, d, D)
        v = _rows(v_ptr, token, n >= 0, v_n, d, D)
    scores = _score(q, k, scale, cap, HAS_CAP, PRECISION)
    if MASKED:
        if INDEXED:
            seen = _related(q_token[:, None], token[None, :], RELATION) & q_exists[:, None] & exists[None, :]
        else:
            at = tl.load(numbers + entry).to(tl.int64) * (S * S)
            seen = tl.load(masks + at + tl.arange(0, S)[:, None] * S + n[None, :]) != 0
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen nothing yet: subtracting -inf would give NaN
    finite = tl.where(new_top > float("-inf"), new_top, 0.0)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(top - finite)
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT:
        weights = tl.where(_kept(seed, b, h, q_place[:, None], k_place[None, :], threshold), weights * boost, 0.0)
    state_out = state_out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return state_out, new_top, total


# numbers that change from batch to batch must not compile another kernel each
_VARY = [
    "q_len", "kv_len", "cut", "lines", "limit", "width_q", "width_k", "tiles_of_round", "seed", "threshold", "scale", "cap", "boost",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARY)
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_out, part_lse, q_index, k_index,
    groups, offsets, masked, others, numbers, masks, segments,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, o_b, o_h, o_n, l_h,
    scale, cap, seed, threshold, boost, q_len, kv_len, cut, lines, limit, width_q, width_k, tiles_of_round,
    H: tl.constexpr, R: tl.constexpr, CUT: tl.constexpr, INDEXED: tl.constexpr, BY_PLACE: tl.constexpr,
    RELATION: tl.constexpr, HAS_CAP: tl.constexpr, DROPOUT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse of a line of one head; of a segment of it, in float32, to memory of its own."""
    row = second_program().to(tl.int64)
    item, i, number, is_part = _item(segments, cut, CUT)
    group = tl.load(groups + row)
    line = group * lines + i
    begin = tl.load(offsets + line)
    first = begin + number * limit
    last = tl.minimum(tl.load(offsets + line + 1), first + limit)
    middle = begin + tl.load(masked + line)
    b, h = row // H, row % H
    m, d = tl.arange(0, S), tl.arange(0, BD)
    place = i * S + m
    token, exists = _tokens(q_index, width_q, row, place, q_len, INDEXED)
    q = _rows(q_ptr + b * q_b + h * q_h, token, exists, q_n, d, D)
    k_ptr += b * k_b + h // R * k_g
    v_ptr += b * v_b + h // R * v_g
    who_b, who_h = b, h
    if INDEXED:
        who_b, who_h = row, (i // tiles_of_round).to(tl.int64)
    out = tl.zeros((S, BD), tl.float32)
    top = tl.full((S,), float("-inf"), tl.float32)
    total = tl.zeros((S,), tl.float32)
    for entry in range(first, tl.minimum(middle, last)):
        out, top, total = _absorb(
            out, top, total, q, token, exists, place, k_ptr, v_ptr, k_n, v_n, others, numbers, masks, k_index, width_k, row,
            entry, kv_len, scale, cap, seed, who_b, who_h, threshold, boost,
            True, INDEXED, RELATION, HAS_CAP, DROPOUT, S, D, BD, PRECISION,
        )  # fmt: skip
    for entry in range(tl.maximum(first, middle), last):
        out, top, total = _absorb(
            out, top, total, q, token, exists, place, k_ptr, v_ptr, k_n, v_n, others, numbers, masks, k_index, width_k, row,
            entry, kv_len, scale, cap, seed, who_b, who_h, threshold, boost,
            False, INDEXED, RELATION, HAS_CAP, DROPOUT, S, D, BD, PRECISION,
        )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    out = out / safe[:, None]
    lse = tl.where(total > 0, (top + tl.log2(safe)) / LOG2_E, float("-inf"))
    spot, there = _spots(token, exists, place, lines * S, BY_PLACE)
    if CUT:
        there = there & (is_part == 0)
        at = _spots_of_part(item, row, S)
        tl.store(part_out + at[:, None] * D + d[None, :], out, mask=is_part & (d[None, :] < D))
        tl.store(part_lse + at, lse, mask=is_part & (m >= 0))
    at = out_ptr + b * o_b + h * o_h + spot[:, None] * o_n + d[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=there[:, None] & (d[None, :] < D))
    tl.store(lse_ptr + row * l_h + spot, lse, mask=there)


@triton.jit
def _slope(weights, change, delta, score, cap, HAS_CAP: tl.constexpr):
    """d loss / d (scale * q @ k), given that by the weights."""
    found = weights * (change - delta)
    if HAS_CAP:
        part = score / (cap * LOG2_E)
        found *= 1 - part * part
    return found


@triton.jit
def _of_queries(
    grad_q, q, do, lse, delta, q_token, q_exists, q_place, k_ptr, v_ptr, k_n, v_n, others, numbers, masks, k_index, width_k,
    row, entry, kv_len, scale, cap, seed, b, h, threshold, boost,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, RELATION: tl.constexpr, HAS_CAP: tl.constexpr, DROPOUT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to the gradient of queries."""
    n, d = tl.arange(0, S), tl.arange(0, BD)
    k_place = tl.load(others + entry) * S + n
    token, exists = _tokens(k_index, width_k, row, k_place, kv_len, INDEXED)
    if MASKED:
        k = _rows(k_ptr, token, exists, k_n, d, D)
        v = _rows(v_ptr, token, exists, v_n, d, D)
    else:
        k = _rows(k_ptr, token, n >= 0, k_n, d, D)
        v = _rows(v_ptr, token, n >= 0, v_n, d, D)
    scores = _score(q, k, scale, cap, HAS_CAP, PRECISION)
    powers = scores - lse[:, None]
    if MASKED:
        if INDEXED:
            seen = _related(q_token[:, None], token[None, :], RELATION) & q_exists[:, None] & exists[None, :]
        else:
            at = tl.load(numbers + entry).to(tl.int64) * (S * S)
            seen = tl.load(masks + at + tl.arange(0, S)[:, None] * S + n[None, :]) != 0
        powers = tl.where(seen, powers, float("-inf"))
    weights = tl.exp2(powers)
    change = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        change = tl.where(_kept(seed, b, h, q_place[:, None], k_place[None, :], threshold), change * boost, 0.0)
    slope = _slope(weights, change, delta[:, None], scores, cap, HAS_CAP)
    return grad_q + tl.dot(slope.to(k.dtype), k, input_precision=PRECISION)


@triton.jit(do_not_specialize=_VARY)
def gradients_of_queries(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, part, q_index, k_index,
    groups, offsets, masked, others, numbers, masks, segments,
    do_b, do_h, do_n, q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, o_b, o_h, o_n, dq_b, dq_h, dq_n, l_h, delta_h,
    scale, cap, seed, threshold, boost, q_len, kv_len, cut, lines, limit, width_q, width_k, tiles_of_round,
    HAS_GRAD_LSE: tl.constexpr, H: tl.constexpr, R: tl.constexpr, CUT: tl.constexpr, INDEXED: tl.constexpr,
    BY_PLACE: tl.constexpr, RELATION: tl.constexpr, HAS_CAP: tl.constexpr, DROPOUT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a line's queries, and delta = sum(grad_out * out) - grad_lse of each, which the next kernel reads."""
    row = second_program().to(tl.int64)
    item, i, number, is_part = _item(segments, cut, CUT)
    group = tl.load(groups + row)
    line = group * lines + i
    begin = tl.load(offsets + line)
    first = begin + number * limit
    last = tl.minimum(tl.load(offsets + line + 1), first + limit)
    middle = begin + tl.load(masked + line)
    b, h = row // H, row % H
    m, d = tl.arange(0, S), tl.arange(0, BD)
    place = i * S + m
    token, exists = _tokens(q_index, width_q, row, place, q_len, INDEXED)
    q = _rows(q_ptr + b * q_b + h * q_h, token, exists, q_n, d, D)
    do = _rows(do_ptr + b * do_b + h * do_h, token, exists, do_n, d, D)
    out = _rows(out_ptr + b * o_b + h * o_h, token, exists, o_n, d, D)
    lse = tl.load(lse_ptr + row * l_h + token, mask=exists, other=float("-inf"))
    # a row that sees nothing has weight 0 everywhere: its tiles are masked
    lse = tl.where(lse > float("-inf"), lse, 0.0) * LOG2_E
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(dlse_ptr + row * l_h + token, mask=exists, other=0.0)
    k_ptr += b * k_b + h // R * k_g
    v_ptr += b * v_b + h // R * v_g
    who_b, who_h = b, h
    if INDEXED:
        who_b, who_h = row, (i // tiles_of_round).to(tl.int64)
    grad_q = tl.zeros((S, BD), tl.float32)
    for entry in range(first, tl.minimum(middle, last)):
        grad_q = _of_queries(
            grad_q, q, do, lse, delta, token, exists, place, k_ptr, v_ptr, k_n, v_n, others, numbers, masks, k_index, width_k,
            row, entry, kv_len, scale, cap, seed, who_b, who_h, threshold, boost,
            True, INDEXED, RELATION, HAS_CAP, DROPOUT, S, D, BD, PRECISION,
        )  # fmt: skip
    for entry in range(tl.maximum(first, middle), last):
        grad_q = _of_queries(
            grad_q, q, do, lse, delta, token, exists, place, k_ptr, v_ptr, k_n, v_n, others, numbers, masks, k_index, width_k,
            row, entry, kv_len, scale, cap, seed, who_b, who_h, threshold, boost,
            False, INDEXED, RELATION, HAS_CAP, DROPOUT, S, D, BD, PRECISION,
        )  # fmt: skip
    grad_q *= scale
    spot, there = _spots(token, exists, place, lines * S, BY_PLACE)
    if CUT:
        there, exists = there & (is_part == 0), exists & (is_part == 0)
        at = part + _spots_of_part(item, row, S)[:, None] * D + d[None, :]
        tl.store(at, grad_q, mask=is_part & (d[None, :] < D))
    at = dq_ptr + b * dq_b + h * dq_h + spot[:, None] * dq_n + d[None, :]
    tl.store(at, grad_q.to(dq_ptr.dtype.element_ty), mask=there[:, None] & (d[None, :] < D))
    tl.store(delta_ptr + row * delta_h + place, delta, mask=exists)


@triton.jit
def _of_keys(
    grad_k, grad_v, k, v, k_token, k_exists, k_place, q_ptr, do_ptr, lse_ptr, delta_ptr, q_n, do_n, others, numbers, masks,
    q_index, width_q, row, entry, q_len, scale, cap, seed, b, h, tiles_of_round, threshold, boost,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, RELATION: tl.constexpr, HAS_CAP: tl.constexpr, DROPOUT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries gives to the gradients of keys and values; all scores are keys x queries."""
    m, d = tl.arange(0, S), tl.arange(0, BD)
    i = tl.load(others + entry)
    place = i * S + m
    token, exists = _tokens(q_index, width_q, row, place, q_len, INDEXED)
    if MASKED:
        q = _rows(q_ptr, token, exists, q_n, d, D)
        do = _rows(do_ptr, token, exists, do_n, d, D)
        lse = tl.load(lse_ptr + token, mask=exists, other=0.0)
        delta = tl.load(delta_ptr + place, mask=exists, other=0.0)
        lse = tl.where(lse > float("-inf"), lse, 0.0)
    else:
        q = _rows(q_ptr, token, m >= 0, q_n, d, D)
        do = _rows(do_ptr, token, m >= 0, do_n, d, D)
        lse = tl.load(lse_ptr + token)
        delta = tl.load(delta_ptr + place)
    scores = _score(k, q, scale, cap, HAS_CAP, PRECISION)
    powers = scores - (lse * LOG2_E)[None, :]
    if MASKED:
        if INDEXED:
            seen = _related(token[None, :], k_token[:, None], RELATION) & exists[None, :] & k_exists[:, None]
        else:
            at = tl.load(numbers + entry).to(tl.int64) * (S * S)
            seen = tl.load(masks + at + tl.arange(0, S)[:, None] * S + m[None, :]) != 0
        powers = tl.where(seen, powers, float("-inf"))
    weights = tl.exp2(powers)
    change = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dropped = weights
    if DROPOUT:
        who_h = h
        if INDEXED:
            who_h = (i // tiles_of_round).to(tl.int64)
        kept = _kept(seed, b, who_h, place[None, :], k_place[:, None], threshold)
        dropped = tl.where(kept, weights * boost, 0.0)
        change = tl.where(kept, change * boost, 0.0)
    grad_v += tl.dot(dropped.to(do.dtype), do, input_precision=PRECISION)
    slope = _slope(weights, change, delta[None, :], scores, cap, HAS_CAP)
    grad_k += tl.dot(slope.to(q.dtype), q, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=_VARY)
def gradients_of_keys(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, part_k, part_v, q_index, k_index,
    groups, offsets, masked, others, numbers, masks, segments,
    do_b, do_h, do_n, q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, dk_b, dk_g, dk_n, dv_b, dv_g, dv_n, l_h, delta_h,
    scale, cap, seed, threshold, boost, q_len, kv_len, cut, lines, limit, width_q, width_k, tiles_of_round,
    H: tl.constexpr, R: tl.constexpr, CUT: tl.constexpr, INDEXED: tl.constexpr, BY_PLACE: tl.constexpr,
    RELATION: tl.constexpr, HAS_CAP: tl.constexpr, DROPOUT: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a line's keys and values from all query heads that read them."""
    of_keys = second_program().to(tl.int64)
    item, j, number, is_part = _item(segments, cut, CUT)
    b, g = of_keys // (H // R), of_keys % (H // R)
    n, d = tl.arange(0, S), tl.arange(0, BD)
    place = j * S + n
    # keys of another order belong to one query head: R is 1
    token, exists = _tokens(k_index, width_k, of_keys, place, kv_len, INDEXED)
    k = _rows(k_ptr + b * k_b + g * k_g, token, exists, k_n, d, D)
    v = _rows(v_ptr + b * v_b + g * v_g, token, exists, v_n, d, D)
    grad_k = tl.zeros((S, BD), tl.float32)
    grad_v = tl.zeros((S, BD), tl.float32)
    for r in range(R):
        h = g * R + r
        row = b * H + h
        line = tl.load(groups + row) * lines + j
        begin = tl.load(offsets + line)
        first = begin + number * limit
        last = tl.minimum(tl.load(offsets + line + 1), first + limit)
        middle = begin + tl.load(masked + line)
        who = row if INDEXED else b
        for entry in range(first, tl.minimum(middle, last)):
            grad_k, grad_v = _of_keys(
                grad_k, grad_v, k, v, token, exists, place, q_ptr + b * q_b + h * q_h, do_ptr + b * do_b + h * do_h,
                lse_ptr + row * l_h, delta_ptr + row * delta_h, q_n, do_n, others, numbers, masks, q_index, width_q, row,
                entry, q_len, scale, cap, seed, who, h, tiles_of_round, threshold, boost,
                True, INDEXED, RELATION, HAS_CAP, DROPOUT, S, D, BD, PRECISION,
            )  # fmt: skip
        for entry in range(tl.maximum(first, middle), last):
            grad_k, grad_v = _of_keys(
                grad_k, grad_v, k, v, token, exists, place, q_ptr + b * q_b + h * q_h, do_ptr + b * do_b + h * do_h,
                lse_ptr + row * l_h, delta_ptr + row * delta_h, q_n, do_n, others, numbers, masks, q_index, width_q, row,
                entry, q_len, scale, cap, seed, who, h, tiles_of_round, threshold, boost,
                False, INDEXED, RELATION, HAS_CAP, DROPOUT, S, D, BD, PRECISION,
            )  # fmt: skip
    grad_k *= scale
    spot, there = _spots(token, exists, place, lines * S, BY_PLACE)
    if CUT:
        there = there & (is_part == 0)
        at = _spots_of_part(item, of_keys, S)[:, None] * D + d[None, :]
        box = is_part & (d[None, :] < D)
        tl.store(part_k + at, grad_k, mask=box)
        tl.store(part_v + at, grad_v, mask=box)
    box = there[:, None] & (d[None, :] < D)
    at_k = dk_ptr + b * dk_b + g * dk_g + spot[:, None] * dk_n + d[None, :]
    at_v = dv_ptr + b * dv_b + g * dv_g + spot[:, None] * dv_n + d[None, :]
    tl.store(at_k, grad_k.to(dk_ptr.dtype.element_ty), mask=box)
    tl.store(at_v, grad_v.to(dv_ptr.dtype.element_ty), mask=box)


@triton.jit(do_not_specialize=["length"])
def merge_segments(
    part_out, part_lse, long, out_ptr, lse_ptr, o_b, o_h, o_n, l_h, length,
    H: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Merge the segments of tiles with many entries into their out and lse."""
    row = second_program().to(tl.int64)
    rows = row * 0 + second_programs()
    at = long + tl.program_id(0) * 3
    tile, first, count = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    m, d = tl.arange(0, S), tl.arange(0, BD)
    place = tile.to(tl.int64) * S + m
    there = place < length
    box = there[:, None] & (d[None, :] < D)
    at = out_ptr + row // H * o_b + row % H * o_h + place[:, None] * o_n + d[None, :]
    out = tl.load(at, mask=box, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + row * l_h + place, mask=there, other=float("-inf"))
    for s in range(first, first + count):
        more = (s * rows + row) * S + m
        other = tl.load(part_lse + more)
        top = tl.maximum(lse, other)
        finite = tl.where(top > float("-inf"), top, 0.0)
        one, two = tl.exp(lse - finite), tl.exp(other - finite)
        total = tl.where(one + two > 0, one + two, 1.0)
        part = tl.load(part_out + more[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        out = out * (one / total)[:, None] + part * (two / total)[:, None]
        lse = tl.where(one + two > 0, finite + tl.log(total), float("-inf"))
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=box)
    tl.store(lse_ptr + row * l_h + place, lse, mask=there)


@triton.jit
def _add(
    parts, total_ptr, row, rows, first, count, stride, place, box, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    m, d = tl.arange(0, S), tl.arange(0, BD)
    at = total_ptr + place[:, None] * stride + d[None, :]
    total = tl.load(at, mask=box, other=0.0).to(tl.float32)
    for s in range(first, first + count):
        more = (s * rows + row) * S + m
        total += tl.load(parts + more[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
    tl.store(at, total.to(total_ptr.dtype.element_ty), mask=box)


@triton.jit(do_not_specialize=["length"])
def add_segments(
    parts_a, parts_b, long, a_ptr, b_ptr, a_b, a_h, a_n, b_b, b_h, b_n, length,
    H: tl.constexpr, TWO: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the gradients that segments found, in a fixed order, to one tensor or `TWO`, of `H` heads."""
    row = second_program().to(tl.int64)
    rows = row * 0 + second_programs()
    at = long + tl.program_id(0) * 3
    tile, first, count = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    place = tile.to(tl.int64) * S + tl.arange(0, S)
    box = (place < length)[:, None] & (tl.arange(0, BD)[None, :] < D)
    b, h = row // H, row % H
    _add(parts_a, a_ptr + b * a_b + h * a_h, row, rows, first, count, a_n, place, box, S, D, BD)
    if TWO:
        _add(parts_b, b_ptr + b * b_b + h * b_h, row, rows, first, count, b_n, place, box, S, D, BD)
