"""Attention over chosen keys by the kernels of `kernels.py`.

Legend: B batch, H query heads, G key heads, C heads of the choice, P rows of heads that read other keys than their neighbours, R =
H / P; Q queries, K keys, N chosen keys of a query, D and E head dims of keys and values.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..backend import AttentionCall, Given, Gradients, Results
from ..backends.triton.walk import why_unfit
from ..devices import HALF_TYPES, shared_bytes
from ..launch import launch, power_of_two, strides_of
from ..strides import like, readable
from . import tiles
from .pieces import rows_of
from .tiles import Tile

# rows of queries of a tile of a key, and segments that are added at a time
CHOOSERS, ADDED = 32, 4
# heads of a tile: the matrix units take 16 rows at least
LEAST_HEADS, MOST_HEADS = 16, 64
# queries of a segment at least
LEAST_CHOOSERS = 64
# bytes of what segments write at once
MAX_PART_BYTES = 1 << 29
# blocks of keys whose gradients are made together: sizes, queries of a segment, and head dims
BLOCK_SIZES, BLOCK_CHOOSERS, MAX_BLOCK_DIM = (16, 32, 64, 128), 512, 128
# shared memory that such a block takes, and a larger one
SHARED_BYTES = 99 << 10, 227 << 10


def why_not(call: AttentionCall) -> str | None:
    """Why the kernels cannot compute a call, or None."""
    reason = why_unfit(call.q, call.v, padded=True)
    return reason or ("its kernels have no dropout" if call.dropout else None)


@dataclass(frozen=True, eq=False)
class Choosers:
    """The queries that chose each key, in order, cut to segments of `limit` of them; lists of one choice, or of B.

    The segments of key x are `firsts[x]` to `firsts[x + 1]`.
    """

    query: Tensor  # [B or 1, C, Q * N] int32
    offsets: Tensor  # [B or 1, C, K + 1] int32: where the queries of each key start
    firsts: Tensor  # [B or 1, C, K + 1] int32
    key: Tensor  # [B or 1, C, S] int32: the key of each segment, K where there is none
    limit: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As kernels take them."""
        return self.query, self.offsets, self.firsts, self.key


def choosers(index: Tensor, num_keys: int, limit: int | None = None) -> Choosers:
    """The lists of a choice `[B or 1, C, Q, N]`."""
    queries, chosen = index.shape[2:]
    limit = max(LEAST_CHOOSERS, chosen) if limit is None else limit
    key = index.flatten(2)
    key = key.where((key >= 0) & (key < num_keys), num_keys)
    # sorted sooner
    key = key.short() if num_keys < torch.iinfo(torch.int16).max else key
    ordered, order = key.sort(dim=-1, stable=True)
    step = torch.arange(num_keys + 1, dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1).contiguous()
    offsets = torch.searchsorted(ordered, step, out_int32=True)
    counts = offsets.diff(dim=-1)
    firsts = torch.nn.functional.pad(((counts + limit - 1) // limit).cumsum(-1, dtype=torch.int32), (1, 0))
    segments = num_keys + -(-queries * chosen // limit)
    place = torch.arange(segments, dtype=torch.int32, device=key.device).expand(*key.shape[:2], -1).contiguous()
    of_segment = torch.searchsorted(firsts, place, right=True, out_int32=True) - 1
    return Choosers((order // chosen).int().contiguous(), offsets, firsts, of_segment.contiguous(), limit)


@dataclass(frozen=True)
class Shape:
    """What all kernels are told of a call."""

    call: AttentionCall

    @cached_property
    def table(self) -> Tensor:
        """The choice, `[B or 1, C, Q, N / S]`, with S keys of a number."""
        return self.call.plan.table

    @property
    def rows(self) -> int:
        """P."""
        return rows_of(self.call)

    @property
    def heads_of_tile(self) -> int:
        repeats = self.call.q.shape[1] // self.rows
        return min(MOST_HEADS, max(LEAST_HEADS, power_of_two(repeats)))

    @property
    def grid(self) -> tuple[int, int]:
        """Queries, and tiles of heads."""
        tiles = -(-self.call.q.shape[1] // self.rows // self.heads_of_tile)
        return self.call.q.shape[2], self.call.q.shape[0] * self.rows * tiles

    @property
    def dims(self) -> dict[str, int]:
        d, e = self.call.q.shape[3], self.call.v.shape[3]
        return {"D": d, "BD": max(16, power_of_two(d)), "E": e, "BE": max(16, power_of_two(e))}

    @property
    def heads(self) -> dict[str, int]:
        q, k, rows = self.call.q, self.call.k, self.rows
        return {"H": q.shape[1], "G": k.shape[1], "C": self.call.plan.shape[1], "P": rows, "R": q.shape[1] // rows}

    @property
    def constants(self) -> dict:
        """Of the kernels that walk the keys of a query."""
        cap = {"HAS_CAP": self.call.scoring.softcap is not None, "PRECISION": "ieee"}
        tile = {"BR": self.heads_of_tile, "BN": self.tile.side, "S": self.call.plan.per_entry}
        return {**self.heads, **tile, **self.dims, **cap}

    @property
    def has_large_tiles(self) -> bool:
        """Do the kernels that walk the keys of a query take many at a time?"""
        return self.call.q.dtype in HALF_TYPES and max(self.call.q.shape[3], self.call.v.shape[3]) <= MAX_BLOCK_DIM

    @property
    def tile(self) -> Tile:
        """Of these."""
        return tiles.of_query(self.heads_of_tile, is_wide=not self.has_large_tiles, least_heads=LEAST_HEADS)

    def tile_of_block(self, size: int, *, backward: bool) -> Tile:
        """Of those that go block by block."""
        return tiles.of_block(size, max(self.call.q.shape[3], self.call.v.shape[3]), backward=backward)

    @property
    def of_keys(self) -> dict:
        """Of the kernel that makes the gradients of a key."""
        heads = min(CHOOSERS // 2, power_of_two(self.heads["R"]))
        tile = {"BR": heads, "BP": CHOOSERS // heads}
        tile["S"] = self.call.plan.per_entry
        return {**self.heads, **tile, **self.dims, "HAS_CAP": self.call.scoring.softcap is not None}

    def of_blocks(self, size: int, rows: int) -> dict:
        """Of those that go block by block."""
        heads = min(rows, power_of_two(self.heads["R"]))
        tile = {"BR": heads, "BP": rows // heads, "S": size, "HAS_KEYS": self.call.plan.per_entry == 1}
        return {**self.heads, **tile, **self.dims, "HAS_CAP": self.call.scoring.softcap is not None}

    def empty_gradients(self, *of: Tensor, adds: bool = False) -> list[Tensor]:
        """`[B, P, K, D]` for each of keys and values; rows of the same key head are added afterwards, as are several with `adds`."""
        batch, groups, keys, _ = of[0].shape
        work = of[0].dtype if self.rows == groups and not adds else torch.float32
        return [torch.empty(batch, self.rows, keys, t.shape[3], dtype=work, device=t.device) for t in of]

    def of_key_heads(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """`[B, G, K, D]` of each, as keys are."""
        groups, dtype = self.call.k.shape[1], self.call.k.dtype
        if self.rows > groups:
            grads = [grad.unflatten(1, (groups, -1)).sum(2) for grad in grads]
        return grads[0].to(dtype), grads[1].to(dtype)

    @property
    def numbers(self) -> tuple[float, ...]:
        q, scoring = self.call.q, self.call.scoring
        return scoring.scale, float(scoring.softcap or 1), q.shape[2], self.call.k.shape[2], self.call.plan.shape[3]

    @property
    def limits(self) -> tuple[int, ...]:
        """Where the first query is, and what of its blocks it sees."""
        return self.call.plan.offset, *astuple(self.call.plan.band)

    @property
    def row_step(self) -> int:
        """How many numbers of the table lie between batch rows; none where they share one."""
        plan = self.call.plan
        return self.batch_step * plan.shape[2] * (plan.shape[3] // plan.per_entry)

    @property
    def batch_step(self) -> int:
        """How many lists of the choice lie between batch rows; none where they share one."""
        return self.call.plan.shape[1] if self.call.plan.shape[0] > 1 else 0


def block_size(call: AttentionCall) -> int:
    """The keys of a block of the choice, where their gradients are made together; else 1."""
    size, dim = call.plan.size, max(call.q.shape[3], call.v.shape[3])
    if size not in BLOCK_SIZES or dim > MAX_BLOCK_DIM or call.q.dtype not in HALF_TYPES:
        return 1
    needed = SHARED_BYTES[size * dim > tiles.MAX_OF_FOUR_WARPS]
    return size if shared_bytes(call.q.device) >= needed else 1


def _choosers_of_blocks(blocks: Tensor, num_blocks: int) -> Choosers:
    """The lists of chosen blocks `[B or 1, C, Q, N / S]`, with places in them."""
    return choosers(blocks.flatten(2)[..., None], num_blocks, BLOCK_CHOOSERS)


def lists_of(shape: Shape, size: int) -> Choosers:
    """The lists of keys, or of blocks of keys."""
    plan, keys = shape.call.plan, shape.call.k.shape[2]
    return choosers(plan.index, keys) if size == 1 else _choosers_of_blocks(plan.blocks, -(-keys // size))


def _shape(call: AttentionCall) -> tuple[Shape, Tensor, Tensor, Tensor]:
    return Shape(call), readable(call.q), readable(call.k), readable(call.v)


def forward(call: AttentionCall) -> Results:
    """Out `[B, H, Q, E]` and lse `[B, H, Q]`."""
    from . import kernels

    shape, q, k, v = _shape(call)
    out, lse = like(q, v.shape[3]), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel():
        launch(
            kernels.forward, shape.grid, (q, k, v, shape.table, out, lse), strides_of(q, k, v, out),
            (*shape.numbers, shape.row_step, *shape.limits), shape.constants, **shape.tile.options,
        )  # fmt: skip
    return out, lse


def backward(call: AttentionCall, given: Given) -> Gradients:
    """Gradients of q, k and v."""
    from . import kernels

    shape, q, k, v = _shape(call)
    out, lse, grad_out, grad_lse = (
        readable(given.out),
        given.lse.contiguous(),
        readable(given.some_grad_out),
        given.grad_lse,
    )
    grad_q, delta = like(q), torch.empty_like(lse)
    if not q.numel() or not k.numel():
        return grad_q.zero_(), like(k).zero_(), like(v).zero_(), None
    # anything will do where it is not read
    given_lse = lse if grad_lse is None else grad_lse.contiguous()
    launch(
        kernels.gradients_of_queries, shape.grid, (grad_out, q, k, v, out, shape.table, lse, given_lse, delta, grad_q),
        strides_of(grad_out, q, k, v, out, grad_q),
        (*shape.numbers, shape.row_step, *shape.limits),
        {"HAS_GRAD_LSE": grad_lse is not None, **shape.constants}, **shape.tile.options,
    )  # fmt: skip
    return grad_q, *_of_keys(shape, (grad_out, q, k, v, lse, delta)), None


def _of_keys(shape: Shape, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    from . import block_kernels, kernels

    grad_out, q, k, v = tensors[:4]
    whole, grads = block_size(shape.call), shape.empty_gradients(k, v)
    # else a program has one key, of a block or alone
    size = shape.call.plan.per_entry if whole == 1 else whole
    lists = lists_of(shape, size)
    rows, segments = k.shape[0] * shape.rows, lists.key.shape[2]
    some = max(1, MAX_PART_BYTES // (4 * segments * size * (k.shape[3] + v.shape[3])))
    kernel, given, constants, options = kernels.gradients_of_keys, tensors, shape.of_keys, {"num_warps": 4}
    programs = segments * size
    if whole > 1:
        # anything will do where nothing is written
        kernel, given = block_kernels.gradients, (*tensors[:4], shape.table, *tensors[4:], q)
        tile, programs = shape.tile_of_block(size, backward=True), segments
        constants = {**shape.of_blocks(size, tile.side), "OF_QUERIES": False, "PRECISION": "ieee"}
        options = tile.options
    for first in range(0, rows, some):
        count = min(some, rows - first)
        parts = [
            torch.empty(count, segments, size, t.shape[3], dtype=torch.float32, device=k.device) for t in (k, v)
        ]  # fmt: skip
        launch(
            kernel, (programs, count), (*given, *parts, *lists.tensors), strides_of(grad_out, q, k, v),
            (*shape.numbers, first, segments, lists.limit, shape.batch_step, *shape.limits), constants, **options,
        )  # fmt: skip
        add_up(shape, size, lists, parts, grads, first)
    return shape.of_key_heads(grads)


def add_up(shape: Shape, size: int, lists: Choosers, parts: list[Tensor], grads: list[Tensor], first: int) -> None:
    """Add the segments `[rows, S, keys of a block, D]` of some rows of heads, from `first` on, up to the gradients of their keys."""
    from . import kernels

    keys, heads = grads[0].shape[2], {name: shape.heads[name] for name in ("H", "C", "P")}
    launch(
        kernels.add_segments, (keys, parts[0].shape[0]), (*parts, lists.firsts, *grads), strides_of(*grads),
        (keys, first, parts[0].shape[1], shape.batch_step), {**heads, "S": size, "BS": ADDED, **shape.dims}, num_warps=1,
    )  # fmt: skip
