"""A Triton kernel of attention over chosen latents, which are keys and values in one: each is read once for a tile of heads.

Legend: B batch, H heads, Q queries, K keys, N chosen keys of a query, L numbers of a latent, P numbers of a key that say its
position; `BR` heads and `BN` chosen keys of a tile.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import LOG2_E, absorbed, gather

# keys that are looked at at once for the last one
LOOKED_AT = tl.constexpr(1024)


@triton.jit(do_not_specialize=["Q", "K", "N", "i_b", "scale"])
def forward(
    q_ptr, t_ptr, k_ptr, p_ptr, index_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, t_b, t_h, t_n, k_b, k_n, p_b, p_n, o_b, o_h, o_n, scale, Q, K, N, i_b,
    H: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, BL: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Out `[BR, L]` and lse of one query, for some heads. Tiles of one query stand side by side, so that they share a cache."""
    tiles: tl.constexpr = (H + BR - 1) // BR
    query, b = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) % tiles * BR + tl.arange(0, BR)
    real = h < H
    q = gather(q_ptr + b * q_b + query * q_n, h, real, q_h, L, BL)
    turned = gather(t_ptr + b * t_b + query * t_n, h, real, t_h, P, BP)
    index_ptr += b * i_b + query * N
    k_ptr += b * k_b
    p_ptr += b * p_b
    c, p = tl.arange(0, BL)[None, :], tl.arange(0, BP)[None, :]
    # early queries have few keys, behind which there is none
    end = 0
    for start in range(0, N, LOOKED_AT):
        n = start + tl.arange(0, LOOKED_AT)
        end = tl.maximum(end, tl.max(tl.where(tl.load(index_ptr + n, mask=n < N, other=-1) >= 0, n + 1, 0)))
    out = tl.zeros((BR, BL), tl.float32)
    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, end, BN):
        n = start + tl.arange(0, BN)
        key = tl.load(index_ptr + n, mask=n < N, other=-1)
        there = (key >= 0) & (key < K)
        key = tl.where(there, key, 0).to(tl.int64)[:, None]
        latent = tl.load(k_ptr + key * k_n + c, mask=there[:, None] & (c < L), other=0.0)
        place = tl.load(p_ptr + key * p_n + p, mask=there[:, None] & (p < P), other=0.0)
        scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(turned, tl.trans(place), scores, input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(there[None, :], scores, float("-inf"))
        weights, shrink, top, total = absorbed(scores, top, total)
        out = tl.dot(weights.to(latent.dtype), latent, out * shrink[:, None], input_precision=PRECISION)
    safe = tl.where(total > 0, total, 1.0)
    at = out_ptr + b * o_b + h[:, None] * o_h + query * o_n + c
    tl.store(at, (out / safe[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None] & (c < L))
    lse = tl.where(total > 0, (top + tl.log2(safe)) / LOG2_E, float("-inf"))
    tl.store(lse_ptr + (b * H + h) * Q + query, lse, mask=real)
