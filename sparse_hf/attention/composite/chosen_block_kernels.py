"""A Triton kernel that says what blocks of neighbouring tokens are, in one pass.

Legend: H heads, D head dim.
"""

# Triton's types say that a kernel's helper never returns
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ..programs import second_program

# the mean; that of what is above zero and that of what is below; the largest and the smallest number
MEAN, SIDES, BOUNDS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["length", "size"])
def pool(
    t_ptr, out_ptr, t_b, t_h, t_n, length, size, H: tl.constexpr, WHAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What a block of a head is, in float32: `D` numbers of MEAN, else 2 `D`."""
    block, row = tl.program_id(0), second_program().to(tl.int64)
    d = tl.arange(0, BD)
    t_ptr += row // H * t_b + row % H * t_h
    first = block * size
    end = tl.minimum(first + size, length)
    one = tl.full((BD,), float("-inf") if WHAT == BOUNDS else 0.0, tl.float32)
    two = tl.full((BD,), float("inf") if WHAT == BOUNDS else 0.0, tl.float32)
    for start in range(first, end, BN):
        n = start + tl.arange(0, BN)
        there = (n < end)[:, None] & (d[None, :] < D)
        at = t_ptr + n.to(tl.int64)[:, None] * t_n + d[None, :]
        if WHAT == BOUNDS:
            one = tl.maximum(one, tl.max(tl.load(at, mask=there, other=float("-inf")).to(tl.float32), 0))
            two = tl.minimum(two, tl.min(tl.load(at, mask=there, other=float("inf")).to(tl.float32), 0))
        else:
            some = tl.load(at, mask=there, other=0.0).to(tl.float32)
            if WHAT == SIDES:
                one += tl.sum(tl.maximum(some, 0.0), 0)
                two += tl.sum(tl.minimum(some, 0.0), 0)
            else:
                one += tl.sum(some, 0)
    if WHAT != BOUNDS:
        one, two = one / (end - first), two / (end - first)
    out_ptr += (row * tl.num_programs(0) + block) * (D if WHAT == MEAN else 2 * D) + d
    tl.store(out_ptr, one, mask=d < D)
    if WHAT != MEAN:
        tl.store(out_ptr + D, two, mask=d < D)
