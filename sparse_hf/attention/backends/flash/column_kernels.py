"""`columns` on a GPU, one Triton kernel forward and one backward: each reads q and out once, however the sequences lie.

Legend: S sequences, each cut into P spans of queries; B batch, K keys, H query heads, G key heads, D head dim; C columns of a sequence, of
which the backward kernel takes `BC` in a launch. A program has one span of one sequence and head, and walks it in tiles of `BM` queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....plan import Split, remembered
from ...backend import Given
from ...launch import launch, strides_of
from ...programs import second_program, second_programs
from .column_reach import reach

LOG2_E = 1.4426950408889634
# columns of one launch, and programs that keep a GPU busy in the backward pass
MOST_COLUMNS, PROGRAMS = 32, 2048


@dataclass(frozen=True, eq=False)
class _Portion:
    """The columns of a backward launch: keys `[S, C]`, and flattened the batch row, the key (0 beyond the columns) and which exist."""

    keys: Tensor
    b: Tensor
    places: Tensor
    real: Tensor
    # the keys as a slice, where they are the same in all batch rows
    span: slice | None

    def take(self, t: Tensor) -> Tensor:
        """The columns of `[B, K, G, D]`: `[S, C, G, D]`."""
        if self.span is not None:
            return t[:, self.span]
        return t[self.b, self.places].unflatten(0, self.keys.shape)

    def add(self, t: Tensor, total: Tensor) -> None:
        """Add `[S, C, G, D]` to `[B, K, G, D]`: no key comes twice, so that the order of adding plays no part."""
        if self.span is not None:
            t[:, self.span] += total
            return
        place = self.b[self.real], self.places[self.real]
        t[place] = (t[place] + total.flatten(0, 1)[self.real]).to(t.dtype)


@remembered
def portions(split: Split) -> tuple[_Portion, ...]:
    b = split.sequences_there[:, :1].long()
    return tuple(
        _Portion(
            keys.contiguous(),
            b.expand(keys.shape).flatten(),
            keys.clamp(min=0).flatten().long(),
            (keys >= 0).flatten().nonzero().flatten(),
            slice(first, first + keys.shape[1]) if split.leading else None,
        )
        for first, keys in zip(
            range(0, split.columns.shape[1], MOST_COLUMNS), split.columns.split(MOST_COLUMNS, dim=1), strict=True
        )
    )


def absorb_on_gpu(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, split: Split, scale: float) -> None:
    rest = out, lse, split.sequences_there
    numbers = scale, _limits(split), split.q_offset, split.longest
    if split.columns.shape[1] > MOST_COLUMNS:
        absorb_columns(q, k, v, *rest, split.columns, split.column_counts, *numbers)
    else:
        (portion,) = portions(split)
        absorb_columns(q, portion.take(k), portion.take(v), *rest, portion.keys, None, *numbers)


def absorb_columns(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Tensor, columns: Tensor, counts: Tensor | None,
    scale: float, limits: tuple[int, int, int, int], q_offset: int, longest: int,
) -> None:  # fmt: skip
    """Merge columns `[S, C]` of the sequences `[S, 5]` into `out` `[B, Q, H, D]` and `lse` `[B, H, Q]`, in place.

    Of each sequence the first `counts` `[S]` int32 are read, k and v being `[B, K, G, D]`. Without counts it is all, which are
    `MOST_COLUMNS` at most, and k and v are those of the columns, `[S, C, G, D]`.
    """
    tile, many = tile_of(q), counts is not None
    spans, count = -(-longest // tile), columns.shape[1]
    tensors = q, k, v, out, lse, sequences, columns, columns if counts is None else counts
    strides = (*strides_of(q, out), *lse.stride(), *strides_of(k, v))
    numbers = scale * LOG2_E, *limits, q_offset, spans, count
    constants = {"MANY": many, **constants_of(q.shape[2] // k.shape[2], q.shape[3], min(count, MOST_COLUMNS), tile)}
    launch(_absorb, (len(sequences) * spans, q.shape[2]), tensors, strides, numbers, constants, num_warps=4)


def add_gradients_on_gpu(
    inputs: Sequence[Tensor], given: Given, grads: Sequence[Tensor], split: Split, scale: float
) -> None:
    """Add to the gradients of q, k and v, in place."""
    (q, k, v), (grad_q, grad_k, grad_v) = inputs, grads
    out, lse, grad_out, grad_lse = given.out, given.lse, given.some_grad_out, given.grad_lse
    sequences, heads = split.sequences_there, q.shape[2]
    # it waits for memory: many small programs, with nothing fetched ahead, keep more of it busy. Measured on an H200
    tile, small = 32 if q.shape[3] <= 128 else 16, {"num_warps": 2, "num_stages": 1}
    # so many spans that all multiprocessors have work, each of whole tiles
    spans = max(1, min(-(-split.longest // tile), PROGRAMS // max(1, len(sequences) * heads)))
    span = -(-split.longest // (spans * tile)) * tile
    given_lse = lse if grad_lse is None else grad_lse
    for portion in portions(split):
        k_columns, v_columns = portion.take(k), portion.take(v)
        count = portion.keys.shape[1]
        # sums of one span each, added up afterwards in a fixed order
        sums = q.new_empty((2, len(sequences), spans, heads, count, q.shape[3]), dtype=torch.float32)
        tensors = grad_out, q, k_columns, v_columns, out, lse, given_lse, grad_q, *sums, sequences, portion.keys
        strides = (
            *strides_of(grad_out, q, out, grad_q), *lse.stride(), *given_lse.stride(), *strides_of(k_columns, v_columns)
        )  # fmt: skip
        numbers = scale, scale * LOG2_E, *_limits(split), split.q_offset, spans, span, count
        grid = len(sequences) * spans, heads
        constants = {"HAS_GRAD_LSE": grad_lse is not None, **constants_of(heads // k.shape[2], q.shape[3], count, tile)}
        launch(_gradients, grid, tensors, strides, numbers, constants, **small)
        # [2, S, spans, G, R, C, D] -> [2, S, C, G, D]
        totals = sums.unflatten(3, (k.shape[2], -1)).sum((2, 4)).transpose(2, 3)
        for grad, total in zip((grad_k, grad_v), totals, strict=True):
            portion.add(grad, total)


def constants_of(repeats: int, dim: int, count: int, tile: int) -> dict[str, int]:
    """What kernels of `count` columns at a time are compiled for, of `repeats` query heads for a key head."""
    return {"R": repeats, "BC": padded(count), "BM": tile, "D": dim, "BD": padded(dim)}


def options(q: Tensor) -> dict[str, int]:
    """Warps and stages of a kernel of gradients."""
    return {"num_warps": 4, "num_stages": 3} if q.shape[3] <= 128 else {"num_warps": 8, "num_stages": 1}


def _limits(split: Split) -> tuple[int, int, int, int]:
    """How far the window reaches, left and right, and what limits the columns."""
    window, clip = reach(split)
    return *window, *clip


def tile_of(q: Tensor) -> int:
    """Queries of a tile."""
    # measured on an H100; wider heads fill shared memory
    return 64 if q.shape[3] <= 128 else 32


def padded(n: int) -> int:
    # the matrix units take no side below 16
    return max(16, 1 << (n - 1).bit_length())


@triton.jit
def seen_columns(rows, key, real, q_offset, left, right, clip_left, clip_right):
    distance = key[None, :] - (rows[:, None] + q_offset)
    in_window = (distance >= -left) & (distance <= right)
    return real & (key[None, :] >= 0) & (distance >= -clip_left) & (distance <= clip_right) & (in_window == 0)


# numbers that change from batch to batch must not compile another kernel each
_VARY = ["left", "right", "clip_left", "clip_right", "q_offset", "spans", "span", "C"]


@triton.jit
def _columns_of(pointer, place, stride, there, BD: tl.constexpr):
    """`[BC, BD]`, zeros where there is none."""
    d = tl.arange(0, BD)
    return tl.load(pointer + place[:, None] * stride + d[None, :], mask=there, other=0.0)


@triton.jit
def _merged(q, k, v, seen, scale, top, total, out):
    """One more tile of columns: the highest score, the sum of weights and the weighted values so far."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    higher = tl.maximum(tl.max(scores, 1), top)
    # a row that has seen nothing yet: subtracting -inf would give NaN
    finite = tl.where(higher > float("-inf"), higher, 0.0)
    weights = tl.exp2(scores - finite[:, None])
    kept = tl.exp2(top - finite)
    out = tl.dot(weights.to(v.dtype), v) + out * kept[:, None]
    return higher, total * kept + tl.sum(weights, 1), out


@triton.jit(do_not_specialize=[name for name in _VARY if name != "span"])
def _absorb(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sequences, columns, counts,
    q_b, q_m, q_h, o_b, o_m, o_h, l_b, l_h, l_m, k_s, k_c, k_g, v_s, v_c, v_g,
    scale, left, right, clip_left, clip_right, q_offset, spans, C,
    MANY: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    s = (tl.program_id(0) // spans).to(tl.int64)
    h = second_program().to(tl.int64)
    b = tl.load(sequences + s * 5).to(tl.int64)
    first = tl.load(sequences + s * 5 + 1) + tl.program_id(0) % spans * BM
    last = tl.load(sequences + s * 5 + 2)
    if first >= last:
        return
    c, d = tl.arange(0, BC), tl.arange(0, BD)
    rows = first + tl.arange(0, BM)
    wide = rows.to(tl.int64)
    real = (rows < last)[:, None]
    box = real & (d[None, :] < D)
    q = tl.load(q_ptr + b * q_b + wide[:, None] * q_m + h * q_h + d[None, :], mask=box, other=0.0)
    at_out = out_ptr + b * o_b + wide[:, None] * o_m + h * o_h + d[None, :]
    at_lse = lse_ptr + b * l_b + h * l_h + wide * l_m
    before = tl.load(at_out, mask=box, other=0.0)
    top = tl.load(at_lse, mask=rows < last, other=0.0) * 1.4426950408889634
    total, out = tl.where(top > float("-inf"), 1.0, 0.0), before.to(tl.float32)
    if MANY:
        for start in range(0, tl.load(counts + s), BC):
            key = tl.load(columns + s * C + start + c, mask=start + c < C, other=-1)
            place, there = tl.where(key >= 0, key, 0).to(tl.int64), (key[:, None] >= 0) & (d[None, :] < D)
            k = _columns_of(k_ptr + b * k_s + h // R * k_g, place, k_c, there, BD)
            v = _columns_of(v_ptr + b * v_s + h // R * v_g, place, v_c, there, BD)
            seen = seen_columns(rows, key, real, q_offset, left, right, clip_left, clip_right)
            top, total, out = _merged(q, k, v, seen, scale, top, total, out)
    else:
        key = tl.load(columns + s * C + c, mask=c < C, other=-1)
        there = (c[:, None] < C) & (d[None, :] < D)
        k = _columns_of(k_ptr + s * k_s + h // R * k_g, c, k_c, there, BD)
        v = _columns_of(v_ptr + s * v_s + h // R * v_g, c, v_c, there, BD)
        seen = seen_columns(rows, key, real, q_offset, left, right, clip_left, clip_right)
        top, total, out = _merged(q, k, v, seen, scale, top, total, out)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(at_out, (out / safe[:, None]).to(before.dtype), mask=box)
    tl.store(at_lse, tl.where(total > 0, (top + tl.log2(safe)) / 1.4426950408889634, float("-inf")), mask=rows < last)


@triton.jit(do_not_specialize=_VARY)
def _gradients(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr, sequences, columns,
    do_b, do_m, do_h, q_b, q_m, q_h, o_b, o_m, o_h, dq_b, dq_m, dq_h,
    l_b, l_h, l_m, dl_b, dl_h, dl_m, k_s, k_c, k_g, v_s, v_c, v_g,
    scale, scale_log2, left, right, clip_left, clip_right, q_offset, spans, span, C,
    HAS_GRAD_LSE: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    s = (tl.program_id(0) // spans).to(tl.int64)
    h = second_program().to(tl.int64)
    b = tl.load(sequences + s * 5).to(tl.int64)
    first = tl.load(sequences + s * 5 + 1) + tl.program_id(0) % spans * span
    last = tl.minimum(tl.load(sequences + s * 5 + 2), first + span)
    c, d = tl.arange(0, BC), tl.arange(0, BD)
    key = tl.load(columns + s * C + c, mask=c < C, other=-1)
    inside = (c[:, None] < C) & (d[None, :] < D)
    k = tl.load(k_ptr + s * k_s + c[:, None] * k_c + h // R * k_g + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + s * v_s + c[:, None] * v_c + h // R * v_g + d[None, :], mask=inside, other=0.0)
    sum_k = tl.zeros((BC, BD), tl.float32)
    sum_v = tl.zeros((BC, BD), tl.float32)
    for start in range(first, last, BM):
        rows = start + tl.arange(0, BM)
        wide = rows.to(tl.int64)
        real = (rows < last)[:, None]
        box = real & (d[None, :] < D)
        q = tl.load(q_ptr + b * q_b + wide[:, None] * q_m + h * q_h + d[None, :], mask=box, other=0.0)
        do = tl.load(do_ptr + b * do_b + wide[:, None] * do_m + h * do_h + d[None, :], mask=box, other=0.0)
        out = tl.load(out_ptr + b * o_b + wide[:, None] * o_m + h * o_h + d[None, :], mask=box, other=0.0)
        # asked for with the others, so that they come together
        at_dq = dq_ptr + b * dq_b + wide[:, None] * dq_m + h * dq_h + d[None, :]
        dq = tl.load(at_dq, mask=box, other=0.0)
        lse = tl.load(lse_ptr + b * l_b + h * l_h + wide * l_m, mask=rows < last, other=float("inf"))
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        if HAS_GRAD_LSE:
            delta -= tl.load(dlse_ptr + b * dl_b + h * dl_h + wide * dl_m, mask=rows < last, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale_log2
        seen = seen_columns(rows, key, real, q_offset, left, right, clip_left, clip_right)
        weights = tl.where(seen, tl.exp2(scores - lse[:, None] * 1.4426950408889634), 0.0)
        change = (weights * (tl.dot(do, tl.trans(v)) - delta[:, None])).to(q.dtype)
        tl.store(at_dq, (dq.to(tl.float32) + tl.dot(change, k) * scale).to(dq.dtype), mask=box)
        sum_k += tl.dot(tl.trans(change), q)
        sum_v += tl.dot(tl.trans(weights.to(do.dtype)), do)
    # [S, spans, H, C, D]
    sums = ((tl.program_id(0).to(tl.int64) * second_programs() + h) * C + c[:, None]) * D + d[None, :]
    tl.store(dk_ptr + sums, sum_k * scale, mask=inside)
    tl.store(dv_ptr + sums, sum_v, mask=inside)
