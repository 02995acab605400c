"""Triton kernels that judge tiles by a threshold: products of queries and keys, and no values.

The first goes over all tiles, and drops those that weigh little beside the heaviest key so far; since the heaviest of all is no
lighter, none of these would be kept. The second looks again at the few that are left, when the heaviest of all is known.

Legend: B batch, H query heads, G key heads, R = H / G, D head dim; S tokens of a tile; a line is a tile of queries. Scores are powers
of two.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ..backends.triton.kernels import _rows, _score
from ..programs import second_program


@triton.jit
def _queries(q_ptr, q_b, q_h, q_n, q_len, H: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The queries of a program's line, where they stand, and which of them there are."""
    row = second_program().to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    q_ptr += row // H * q_b + row % H * q_h
    return _rows(q_ptr, place, place < q_len, q_n, tl.arange(0, BD), D), row * q_len + place, place < q_len


@triton.jit
def _scores(
    q, k_ptr, k_n, j, kv_len, scale, cap, HAS_CAP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    place = j.to(tl.int64) * S + tl.arange(0, S)
    k = _rows(k_ptr, place, place < kv_len, k_n, tl.arange(0, BD), D)
    return _score(q, k, scale, cap, HAS_CAP, PRECISION)


@triton.jit
def _holds(kind, masks, S: tl.constexpr):
    """The pairs of a tile of a kind (`chosen_list_kernels.list_tiles`), `[S, S]`."""
    at = tl.maximum(kind - 1, 0).to(tl.int64) * (S * S) + tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
    return (kind == 0) | ((kind > 0) & (tl.load(masks + at) != 0))


@triton.jit
def _finite(top):
    # a row that has seen nothing yet: subtracting -inf would give NaN
    return tl.where(top > float("-inf"), top, 0.0)


@triton.jit
def _weigh(
    scores, judged, top, total, lost, flag_ptr, share, MASKED: tl.constexpr, TELL: tl.constexpr,
):  # fmt: skip
    """Merge a tile into the running (top, total, lost), and flag it if a pair that is judged may weigh enough."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = _finite(new_top)
    most = tl.max(tl.where(judged, scores, float("-inf")), 1) if MASKED else tl.max(scores, 1)
    wanted = tl.max(most - finite, 0) >= share
    tl.store(flag_ptr, wanted.to(tl.uint8))
    if TELL:
        weights, shrink = tl.exp2(scores - finite[:, None]), tl.exp2(top - finite)
        given = tl.sum(weights, 1)
        total = total * shrink + given
        if MASKED:
            given = tl.sum(tl.where(judged, weights, 0.0), 1)
        lost = lost * shrink + tl.where(wanted, 0.0, given)
    return new_top, total, lost


_VARY = ["q_len", "kv_len", "lines", "columns", "scale", "cap", "share"]


@triton.jit(do_not_specialize=_VARY)
def judge(
    q_ptr, k_ptr, top_ptr, total_ptr, lost_ptr, flags, joint, beside, offsets, mixed, others, masks,
    q_b, q_h, q_n, k_b, k_g, k_n, scale, cap, share, q_len, kv_len, lines, columns,
    H: tl.constexpr, R: tl.constexpr, HAS_CAP: tl.constexpr, TELL: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flag the tiles of a line that may be kept, and find the top, and where `TELL` the total and what is lost with the others.

    Of a line the first `mixed` tiles have pairs of positions or a mask; all pairs of the others are judged.
    """
    line, row = tl.program_id(0), second_program().to(tl.int64)
    q, spot, exists = _queries(q_ptr, q_b, q_h, q_n, q_len, H, S, D, BD)
    k_ptr += row // H * k_b + row % H // R * k_g
    flags += (row * lines + line) * columns
    of_line = line.to(tl.int64) * columns
    begin, end = tl.load(offsets + line), tl.load(offsets + line + 1)
    middle = begin + tl.load(mixed + line)
    top = tl.full((S,), float("-inf"), tl.float32)
    total = tl.zeros((S,), tl.float32)
    lost = tl.zeros((S,), tl.float32)
    for entry in range(begin, middle):
        j = tl.load(others + entry)
        seen = _holds(tl.load(joint + of_line + j).to(tl.int32), masks, S)
        held = _holds(tl.load(beside + of_line + j).to(tl.int32), masks, S)
        scores = _scores(q, k_ptr, k_n, j, kv_len, scale, cap, HAS_CAP, S, D, BD, PRECISION)
        scores = tl.where(seen, scores, float("-inf"))
        top, total, lost = _weigh(scores, seen & (held == 0), top, total, lost, flags + j, share, True, TELL)
    for entry in range(middle, end):
        j = tl.load(others + entry)
        scores = _scores(q, k_ptr, k_n, j, kv_len, scale, cap, HAS_CAP, S, D, BD, PRECISION)
        top, total, lost = _weigh(scores, scores, top, total, lost, flags + j, share, False, TELL)
    tl.store(top_ptr + spot, top, mask=exists)
    if TELL:
        tl.store(total_ptr + spot, total, mask=exists)
        tl.store(lost_ptr + spot, lost, mask=exists)


@triton.jit(do_not_specialize=_VARY)
def judge_again(
    q_ptr, k_ptr, top_ptr, total_ptr, lost_ptr, flags, joint, beside, offsets, others, masks,
    q_b, q_h, q_n, k_b, k_g, k_n, scale, cap, share, q_len, kv_len, lines, columns,
    H: tl.constexpr, R: tl.constexpr, HAS_CAP: tl.constexpr, TELL: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take back the flags of listed tiles that weigh little beside the top, and where `TELL` add what is lost with them."""
    line, row = tl.program_id(0), second_program().to(tl.int64)
    q, spot, exists = _queries(q_ptr, q_b, q_h, q_n, q_len, H, S, D, BD)
    k_ptr += row // H * k_b + row % H // R * k_g
    flags += (row * lines + line) * columns
    of_line = line.to(tl.int64) * columns
    finite = _finite(tl.load(top_ptr + spot, mask=exists, other=float("-inf")))
    lost = tl.zeros((S,), tl.float32)
    for entry in range(tl.load(offsets + row * lines + line), tl.load(offsets + row * lines + line + 1)):
        j = tl.load(others + entry)
        seen = _holds(tl.load(joint + of_line + j).to(tl.int32), masks, S)
        held = _holds(tl.load(beside + of_line + j).to(tl.int32), masks, S)
        scores = _scores(q, k_ptr, k_n, j, kv_len, scale, cap, HAS_CAP, S, D, BD, PRECISION)
        scores = tl.where(seen & (held == 0), scores, float("-inf"))
        wanted = tl.max(tl.max(scores, 1) - finite, 0) >= share
        tl.store(flags + j, wanted.to(tl.uint8))
        if TELL:
            lost += tl.where(wanted, 0.0, tl.sum(tl.exp2(scores - finite[:, None]), 1))
    if TELL:
        lost += tl.load(lost_ptr + spot, mask=exists, other=0.0)
        total = tl.load(total_ptr + spot, mask=exists, other=1.0)
        # a query that sees nothing has 0 / 0
        tl.store(lost_ptr + spot, lost / total, mask=exists)
