"""What a few global queries add to the gradients of all keys, on a GPU: one pass over k, v and their gradients.

A window kernel would do it too, but it writes gradients of its own that must then be added: twice the memory traffic.

Legend: S sequences, P tiles of `BN` keys in the longest; H query heads, G key heads, R = H / G; C global tokens of a sequence, of which a
launch takes `BC`. A program has one tile of keys of one sequence and key head, and walks the R query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....plan import Split
from ...backend import Given
from ...launch import launch, strides_of
from ...programs import second_program, second_programs
from .column_kernels import LOG2_E, options, padded, portions

TILE = 64


def add_rows_on_gpu(
    inputs: Sequence[Tensor], given: Given, grad_k: Tensor, grad_v: Tensor, split: Split, scale: float
) -> Tensor:
    """Add to the gradients of k and v, in place; gives those of the global queries, `[T, H, D]` in the order of `split.rows`."""
    q, k, v = inputs
    out, lse, grad_out, grad_lse = given.out, given.lse, given.some_grad_out, given.grad_lse
    heads, dim = q.shape[2:]
    longest = int((split.sequences[:, 4] - split.sequences[:, 3]).max())
    # wider heads fill shared memory
    tile = TILE if dim <= 128 else TILE // 2
    tiles = -(-longest // tile)
    given_lse = lse if grad_lse is None else grad_lse
    found = []
    for portion in portions(split):
        count = portion.keys.shape[1]
        # sums of one tile each, added up afterwards in a fixed order
        sums = q.new_empty((len(split.sequences), tiles, heads, count, dim), dtype=torch.float32)
        tensors = grad_out, q, k, v, out, lse, given_lse, grad_k, grad_v, sums, split.sequences_there, portion.keys
        strides = (
            *strides_of(grad_out, q, k, v, out), *lse.stride(), *given_lse.stride(), *strides_of(grad_k, grad_v)
        )  # fmt: skip
        numbers = scale, scale * LOG2_E, split.q_offset, tiles, count
        constants = {
            "HAS_GRAD_LSE": grad_lse is not None, "R": heads // k.shape[2], "BC": padded(count), "BN": tile, "D": dim,
            "BD": padded(dim),
        }  # fmt: skip
        grid = len(split.sequences) * tiles, k.shape[2]
        launch(_row_gradients, grid, tensors, strides, numbers, constants, **options(q))
        found.append(sums.sum(1).transpose(1, 2))  # [S, C, H, D]
    return torch.cat(found, 1).flatten(0, 1)[split.asked]


@triton.jit(do_not_specialize=["q_offset", "tiles", "C"])
def _row_gradients(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dlse_ptr, dk_ptr, dv_ptr, dq_ptr, sequences, columns,
    do_b, do_m, do_h, q_b, q_m, q_h, k_b, k_n, k_g, v_b, v_n, v_g, o_b, o_m, o_h,
    l_b, l_h, l_m, dl_b, dl_h, dl_m, dk_b, dk_n, dk_g, dv_b, dv_n, dv_g,
    scale, scale_log2, q_offset, tiles, C,
    HAS_GRAD_LSE: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    s = (tl.program_id(0) // tiles).to(tl.int64)
    g = second_program().to(tl.int64)
    b = tl.load(sequences + s * 5).to(tl.int64)
    first_q, last_q = tl.load(sequences + s * 5 + 1), tl.load(sequences + s * 5 + 2)
    first = tl.load(sequences + s * 5 + 3) + tl.program_id(0) % tiles * BN
    last = tl.load(sequences + s * 5 + 4)
    c, d = tl.arange(0, BC), tl.arange(0, BD)
    row = tl.load(columns + s * C + c, mask=c < C, other=-1) - q_offset
    asked = (row >= first_q) & (row < last_q)
    wide = tl.where(asked, row, 0).to(tl.int64)
    at_rows = asked[:, None] & (d[None, :] < D)
    keys = first + tl.arange(0, BN)
    key = keys.to(tl.int64)[:, None]
    at_keys = (keys < last)[:, None] & (d[None, :] < D)
    k = tl.load(k_ptr + b * k_b + key * k_n + g * k_g + d[None, :], mask=at_keys, other=0.0)
    v = tl.load(v_ptr + b * v_b + key * v_n + g * v_g + d[None, :], mask=at_keys, other=0.0)
    sum_k = tl.zeros((BN, BD), tl.float32)
    sum_v = tl.zeros((BN, BD), tl.float32)
    for r in range(R):
        h = g * R + r
        q = tl.load(q_ptr + b * q_b + wide[:, None] * q_m + h * q_h + d[None, :], mask=at_rows, other=0.0)
        do = tl.load(do_ptr + b * do_b + wide[:, None] * do_m + h * do_h + d[None, :], mask=at_rows, other=0.0)
        out = tl.load(out_ptr + b * o_b + wide[:, None] * o_m + h * o_h + d[None, :], mask=at_rows, other=0.0)
        lse = tl.load(lse_ptr + b * l_b + h * l_h + wide * l_m, mask=asked, other=float("inf"))
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        if HAS_GRAD_LSE:
            delta -= tl.load(dlse_ptr + b * dl_b + h * dl_h + wide * dl_m, mask=asked, other=0.0)
        scores = tl.dot(k, tl.trans(q)) * scale_log2  # [BN, BC]
        weights = tl.exp2(scores - lse[None, :] * 1.4426950408889634)
        weights = tl.where((keys < last)[:, None] & asked[None, :], weights, 0.0)
        change = (weights * (tl.dot(v, tl.trans(do)) - delta[None, :])).to(q.dtype)
        sum_v += tl.dot(weights.to(do.dtype), do)
        sum_k += tl.dot(change, q)
        # [S, tiles, H, C, D]
        sums = ((tl.program_id(0).to(tl.int64) * second_programs() * R + h) * C + c[:, None]) * D + d[None, :]
        tl.store(dq_ptr + sums, tl.dot(tl.trans(change), k) * scale, mask=(c[:, None] < C) & (d[None, :] < D))
    at_dk = dk_ptr + b * dk_b + key * dk_n + g * dk_g + d[None, :]
    at_dv = dv_ptr + b * dv_b + key * dv_n + g * dv_g + d[None, :]
    dk = tl.load(at_dk, mask=at_keys, other=0.0)
    dv = tl.load(at_dv, mask=at_keys, other=0.0)
    tl.store(at_dk, (dk.to(tl.float32) + sum_k * scale).to(dk.dtype), mask=at_keys)
    tl.store(at_dv, (dv.to(tl.float32) + sum_v).to(dv.dtype), mask=at_keys)
