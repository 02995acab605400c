"""Triton kernels for a few new tokens over the slots of a static cache: a causal window with first tokens, read where it lies.

Keys are split over programs, since a row and key head alone would keep a GPU waiting, and the query heads of a key head are
computed together, so that each key is read once (as in FlashDecoding). A second kernel merges what the splits found. How many
slots are filled is read on the device. Tokens go by their positions, padding left out, and a position has a slot: that many
behind the first of its row, or in a ring.

Legend: B batch, H query heads, G key heads, R = H / G, Q new tokens, K slots, D head dim; M = R * Q rows of a key head.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, power_of_two, strides_of
from ..programs import second_program, second_programs
from ..scoring import Scoring
from ..strides import like, readable
from .reach import Reach
from .ring import Ring

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# keys of a step of the loop, by the width of a head
BLOCK = {64: 128, 128: 64, 256: 32}
# programs that keep a GPU busy, splits that one program merges, and keys below which another costs more than it saves
PROGRAMS, MAX_SPLITS, LEAST_KEYS = 512, 64, 128
# the matrix units take rows from 16
LEAST_ROWS = 16


# numbers that change from call to call must not compile another kernel each
@triton.jit(do_not_specialize=["scale", "cap", "left", "first", "chunk", "head", "turn"])
def split(
    q_ptr, k_ptr, v_ptr, seen_ptr, real_ptr, begins_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, r_b,
    scale, cap, left, first, chunk, head, turn,
    G: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PADDED: tl.constexpr, HOLED: tl.constexpr, IN_RING: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse, in float32, of the keys of one split, for all rows of a key head."""
    part, pair = tl.program_id(0), second_program().to(tl.int64)
    b, g = pair // G, pair % G
    seen = tl.load(seen_ptr).to(tl.int32)
    begin = 0
    if PADDED:
        begin = tl.load(begins_ptr + b).to(tl.int32)
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    of_group, new = m // Q, m % Q
    rows = m < R * Q
    # positions: tokens of the row before the new ones, and the new ones' own
    before = seen - begin
    place = before + new
    q_at = q_ptr + b * q_b + (g * R + of_group)[:, None] * q_h + new[:, None] * q_n + d[None, :]
    q = tl.load(q_at, mask=rows[:, None] & (d[None, :] < D), other=0.0)
    # visible positions of a row: first tokens, then the window, each once
    start = tl.maximum(first, before - left)
    ahead = tl.minimum(first, before + Q)
    total = ahead + tl.maximum(before + Q - start, 0)
    out = tl.zeros((BM, BD), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    for at in range(part * chunk, tl.minimum((part + 1) * chunk, total), BN):
        number = at + n
        key = tl.where(number < ahead, number, start + number - ahead)
        slot = begin + key
        if IN_RING:
            slot = tl.where(key < head, key, head + (key - head) % turn)
        there = number < tl.minimum((part + 1) * chunk, total)
        box = there[:, None] & (d[None, :] < D)
        k = tl.load(k_ptr + b * k_b + g * k_g + slot.to(tl.int64)[:, None] * k_n + d[None, :], mask=box, other=0.0)
        v = tl.load(v_ptr + b * v_b + g * v_g + slot.to(tl.int64)[:, None] * v_n + d[None, :], mask=box, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_CAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            scores = (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / cap)) + 1)) * cap
        scores *= LOG2_E
        distance = place[:, None] - key[None, :]
        if HOLED:
            there = there & (tl.load(real_ptr + b * r_b + slot, mask=there, other=0) != 0)
        visible = (distance >= 0) & ((distance <= left) | (key[None, :] < first)) & there[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top > float("-inf"), new_top, 0.0)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        weight = weight * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    lse = tl.where(weight > 0, top + tl.log2(tl.where(weight > 0, weight, 1.0)), float("-inf"))
    out = out / tl.where(weight > 0, weight, 1.0)[:, None]
    spot = (part * second_programs() + pair) * BM + m
    tl.store(lse_ptr + spot, lse)
    tl.store(out_ptr + spot[:, None] * BD + d[None, :], out)


@triton.jit(do_not_specialize=["splits"])
def join(
    part_out, part_lse, out_ptr, lse_ptr, o_b, o_h, o_n, splits,
    G: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row of a key head."""
    row, pair = tl.program_id(0), second_program().to(tl.int64)
    s, d = tl.arange(0, BS), tl.arange(0, BD)
    spot = (s * second_programs() + pair) * BM + row
    lse = tl.load(part_lse + spot, mask=s < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top > float("-inf"), top, 0.0))
    parts = tl.load(part_out + spot[:, None] * BD + d[None, :], mask=(s < splits)[:, None], other=0.0)
    total = tl.sum(weights, 0)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    b, h = pair // G, pair % G * R + row // Q
    tl.store(lse_ptr + (b * G * R + h) * Q + row % Q, tl.where(total > 0, (top + tl.log2(total)) * LN_2, float("-inf")))
    at = out_ptr + b * o_b + h * o_h + row % Q * o_n + d
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=d < D)


def decode(
    inputs: tuple[Tensor, Tensor, Tensor], seen: Tensor, real: Tensor | None, begins: Tensor | None, reach: Reach, ring: Ring,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention `[B, H, Q, D]`, and its lse `[B, H, Q]`.

    Args:
        inputs: q, k and v.
        seen, real, begins, ring: see `Filled`.
        reach: the pairs.
        scoring: scale and soft cap.
    """
    q, k, v = (readable(t) for t in inputs)
    batch, heads, new, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    rows, width = heads // groups * new, max(16, power_of_two(dim))
    keys = min(slots, reach.first + reach.left + new)
    most = max(1, min(PROGRAMS // (batch * groups), MAX_SPLITS, -(-keys // LEAST_KEYS)))
    block = BLOCK[max(64, width)]
    chunk = -(-keys // (most * block)) * block
    splits = -(-keys // chunk)
    held = max(LEAST_ROWS, power_of_two(rows))
    part_out = q.new_empty((splits, batch * groups, held, width), dtype=torch.float32)
    part_lse = q.new_empty((splits, batch * groups, held), dtype=torch.float32)
    out, lse = like(q), q.new_empty((batch, heads, new), dtype=torch.float32)
    shapes = {"G": groups, "R": heads // groups, "Q": new, "D": dim, "BD": width, "BM": held}
    # what is not there is not read: anything will do
    of_rows = seen if real is None else real.contiguous().view(torch.uint8), seen if begins is None else begins
    flags = {"PADDED": begins is not None, "HOLED": real is not None, "IN_RING": bool(ring)}
    launch(
        split, (splits, batch * groups), (q, k, v, seen, *of_rows, part_out, part_lse), (*strides_of(q, k, v), slots),
        (scoring.scale, float(scoring.softcap or 1), min(reach.left, slots), reach.first, chunk, ring.first, max(ring.length, 1)),
        {**shapes, "BN": block, **flags, "HAS_CAP": scoring.softcap is not None, "PRECISION": "ieee"},
        num_warps=4, num_stages=2,
    )  # fmt: skip
    launch(
        join, (rows, batch * groups), (part_out, part_lse, out, lse), strides_of(out), (splits,),
        {**shapes, "BS": power_of_two(splits)}, num_warps=4,
    )  # fmt: skip
    return out, lse
