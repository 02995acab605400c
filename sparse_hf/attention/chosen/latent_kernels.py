"""Triton kernels of attention over chosen latents, which are keys and values in one: each is read once for a tile of heads.

Legend: B batch, H heads, Q queries, K keys, N chosen keys of a query, L numbers of a latent, P numbers of a key that say its
position; `BR` heads and `BN` chosen keys of a tile.

A product whose result another one reads is given to all warps by rows, of which a tile of heads has too few, so that they would do the
same twice. Branches that are always taken, `if start < N`, stand between them, across which Triton does not look.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ..programs import second_program
from .kernels import LOG2_E, absorbed, gather

# keys that are looked at at once for the last one
LOOKED_AT = tl.constexpr(1024)


@triton.jit
def _end(index_ptr, N):
    """How many of the first chosen keys have all that there are: early queries have few, behind which there is none."""
    end = 0
    for start in range(0, N, LOOKED_AT):
        n = start + tl.arange(0, LOOKED_AT)
        end = tl.maximum(end, tl.max(tl.where(tl.load(index_ptr + n, mask=n < N, other=-1) >= 0, n + 1, 0)))
    return end


@triton.jit
def _chosen(index_ptr, k_ptr, p_ptr, start, N, K, k_n, p_n, BN: tl.constexpr, L: tl.constexpr, BL: tl.constexpr,
            P: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """The next chosen latents, what says their positions, and which of them there are."""
    n = start + tl.arange(0, BN)
    key = tl.load(index_ptr + n, mask=n < N, other=-1)
    there = (key >= 0) & (key < K)
    key = tl.where(there, key, 0).to(tl.int64)
    return gather(k_ptr, key, there, k_n, L, BL), gather(p_ptr, key, there, p_n, P, BP), there


@triton.jit(do_not_specialize=["Q", "K", "N", "i_b", "scale"])
def forward(
    q_ptr, t_ptr, k_ptr, p_ptr, index_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, t_b, t_h, t_n, k_b, k_n, p_b, p_n, o_b, o_h, o_n, scale, Q, K, N, i_b,
    BN: tl.constexpr, H: tl.constexpr, BR: tl.constexpr, L: tl.constexpr, BL: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Out `[BR, L]` and lse of one query, for some heads. Tiles of one query stand side by side, so that they share a cache."""
    tiles: tl.constexpr = (H + BR - 1) // BR
    query, b = (tl.program_id(0) // tiles).to(tl.int64), second_program().to(tl.int64)
    h = tl.program_id(0) % tiles * BR + tl.arange(0, BR)
    real = h < H
    q = gather(q_ptr + b * q_b + query * q_n, h, real, q_h, L, BL)
    turned = gather(t_ptr + b * t_b + query * t_n, h, real, t_h, P, BP)
    index_ptr += b * i_b + query * N
    k_ptr += b * k_b
    p_ptr += b * p_b
    out = tl.zeros((BR, BL), tl.float32)
    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    shrink, scores, weights = total, tl.zeros((BR, BN), tl.float32), tl.zeros((BR, BN), q.dtype)
    for start in range(0, _end(index_ptr, N), BN):
        latent, place, there = _chosen(index_ptr, k_ptr, p_ptr, start, N, K, k_n, p_n, BN, L, BL, P, BP)
        if start < N:
            scores = tl.dot(turned, tl.trans(place), input_precision=PRECISION)
        if start < K + N:
            scores = tl.dot(q, tl.trans(latent), scores, input_precision=PRECISION) * (scale * LOG2_E)
            scores = tl.where(there[None, :], scores, float("-inf"))
            new, shrink, top, total = absorbed(scores, top, total)
            weights = new.to(latent.dtype)
        out = tl.dot(weights, latent, out * shrink[:, None], input_precision=PRECISION)
    c = tl.arange(0, BL)[None, :]
    safe = tl.where(total > 0, total, 1.0)
    at = out_ptr + b * o_b + h[:, None] * o_h + query * o_n + c
    tl.store(at, (out / safe[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None] & (c < L))
    lse = tl.where(total > 0, (top + tl.log2(safe)) / LOG2_E, float("-inf"))
    tl.store(lse_ptr + (b * H + h) * Q + query, lse, mask=real)


@triton.jit(do_not_specialize=["K", "N", "scale"])
def gradients(
    given_ptr, k_ptr, p_ptr, index_ptr, lse_ptr, delta_ptr, share_ptr, grad_ptr, k_n, p_n, l_h, l_n, d_h, d_n, s_h, scale, K, N,
    BN: tl.constexpr, H: tl.constexpr, BR: tl.constexpr, L: tl.constexpr, BL: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient `[BR, L + P]` of one projected query, for some heads, and the weights of its keys with the gradients of its products.

    `given` has the gradients of sums before the queries, `[Q, 2 H, L + P]`, and the shares are in the same order, `[Q, 2 H, N]`.
    """
    tiles: tl.constexpr = (H + BR - 1) // BR
    query = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.program_id(0) % tiles * BR + tl.arange(0, BR)
    real = h < H
    given_ptr += query * (2 * H * (L + P))
    do = gather(given_ptr, h, real, L + P, L, BL)
    q = gather(given_ptr, H + h, real, L + P, L, BL)
    turned = gather(given_ptr + L, H + h, real, L + P, P, BP)
    delta = tl.load(delta_ptr + h * d_h + query * d_n, mask=real, other=0.0)
    lse = tl.load(lse_ptr + h * l_h + query * l_n, mask=real, other=float("inf"))
    lse = tl.where(lse > float("-inf"), lse, float("inf"))
    index_ptr += query * N
    share_ptr += query * (2 * H * s_h) + h[:, None] * s_h
    total = tl.zeros((BR, BL), tl.float32)
    total_turned = tl.zeros((BR, BP), tl.float32)
    scores, weights = tl.zeros((BR, BN), tl.float32), tl.zeros((BR, BN), q.dtype)
    change = weights
    for start in range(0, _end(index_ptr, N), BN):
        latent, place, there = _chosen(index_ptr, k_ptr, p_ptr, start, N, K, k_n, p_n, BN, L, BL, P, BP)
        if start < N:
            scores = tl.dot(turned, tl.trans(place), input_precision=PRECISION)
        if start < K + N:
            scores = tl.dot(q, tl.trans(latent), scores, input_precision=PRECISION) * (scale * LOG2_E)
            new = tl.exp2(tl.where(there[None, :], scores, float("-inf")) - lse[:, None] * LOG2_E)
            slope = new * (tl.dot(do, tl.trans(latent), input_precision=PRECISION) - delta[:, None]) * scale
            weights, change = new.to(latent.dtype), slope.to(latent.dtype)
        n = start + tl.arange(0, BN)[None, :]
        exists = real[:, None] & (n < s_h)
        tl.store(share_ptr + n, weights, mask=exists)
        tl.store(share_ptr + H * s_h + n, change, mask=exists)
        total = tl.dot(change, latent, total, input_precision=PRECISION)
        total_turned = tl.dot(change, place, total_turned, input_precision=PRECISION)
    grad_ptr += query * (H * (L + P)) + h[:, None] * (L + P)
    c, p = tl.arange(0, BL)[None, :], tl.arange(0, BP)[None, :]
    tl.store(grad_ptr + c, total.to(grad_ptr.dtype.element_ty), mask=real[:, None] & (c < L))
    tl.store(grad_ptr + L + p, total_turned.to(grad_ptr.dtype.element_ty), mask=real[:, None] & (p < P))


@triton.jit
def add_rows(
    added_ptr, order_ptr, offsets_ptr, total_ptr, W: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """Add the rows of one key, in the order of the queries that chose it, to what it has."""
    key = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets_ptr + key), tl.load(offsets_ptr + key + 1)
    s, w = tl.arange(0, BS), tl.arange(0, BW)
    total = tl.zeros((BS, BW), tl.float32)
    for start in range(begin, end, BS):
        row = tl.load(order_ptr + start + s, mask=start + s < end, other=0)
        total += gather(added_ptr, row, start + s < end, W, W, BW).to(tl.float32)
    at = total_ptr + key * W + w
    tl.store(at, tl.load(at, mask=w < W, other=0.0) + tl.sum(total, 0), mask=w < W)
