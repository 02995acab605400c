"""A plan as lists of tiles that a kernel walks: of each query tile its key tiles, and of each key tile its query tiles.

Tiles that the pattern fills are told apart from those that need a mask. Masks are few, since a pattern's edges look alike all
along a text: each distinct one is kept once.

Legend: B batch, H heads, G groups (batch rows x patterns of the plan), Nq query tiles, N listed tiles, S tokens of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..pattern.base import Marks
from .block_plan import BlockPlan
from .cache import kept, made, remembered
from .hash_order import HashedPlan, ring_tiles

# A program walks up to so many tiles of a line, or so many times what lines have on the average; what is beyond becomes segments,
# of which each has a program of its own, so that the few lines of global tokens keep nobody waiting. As they are merged one
# after the other, segments are no shorter than so many times the root of the longest line.
PROGRAM_TILES, PROGRAM_TILES_OVER_MEAN, SEGMENT_TILES_OVER_ROOT = 16, 2, 2
# Up to so many tiles of all heads a GPU waits for the host, to whom further kernels cost more than long lines cost the GPU (on an
# H200): a program then walks this many tiles at least.
HOST_BOUND_TILES, HOST_BOUND_PROGRAM_TILES = 1 << 12, 64
# tiles that a program walks where lines are not cut
UNLIMITED = 1 << 30
# mask bits that are evaluated at once
MASK_BITS_AT_ONCE = 1 << 22
# numbers from 0 that are told apart in 64 bits
MAX_NUMBERS = 1 << 62
# lists of rings that are kept
RINGS_KEPT = 32


@dataclass(frozen=True, eq=False)
class Lists:
    """The tiles of each line (a query tile or a key tile of a group); those with a mask come first."""

    offsets: Tensor  # [G * lines + 1] int32: where the entries of each line begin
    masked: Tensor  # [G * lines] int32: how many of them have a mask
    others: Tensor  # [N] int32: the tile of keys (of queries) of each entry
    masks: Tensor  # [N] int32: the number of its mask, 0 where it has none
    lines: int  # lines of a group
    limit: int  # entries that one program walks
    # [T, 2] int32: a tile that has more entries than that in a group, and the number of a segment, from 1
    segments: Tensor
    long: Tensor  # [L, 3] int32: such a tile, its first row in `segments`, and how many there are

    @kept
    def cut(self) -> int:
        """Segments of all tiles."""
        return len(self.segments)

    @kept
    def items(self) -> int:
        """Programs of one head of a batch row."""
        return self.cut + self.lines


@dataclass(frozen=True, eq=False)
class TileLists:
    size: int  # S
    group_of: Tensor  # [B * H] int32: the group of a head of a batch row
    by_query: Lists
    # makes `by_key`, which the backward pass alone reads
    make_by_key: Callable[[], Lists]
    # [M, S, S] uint8, queries x keys: 1 where a query sees a key; and keys x queries. Of chunks tokens are compared instead
    masks: Tensor
    masks_by_key: Tensor

    @kept
    def by_key(self) -> Lists:
        return self.make_by_key()


@remembered
def tile_lists(plan: BlockPlan, size: int, batch: int, num_heads: int) -> TileLists:
    """The lists of a plan in tiles of `size`, for `batch` rows and `num_heads` query heads."""
    own = plan.own_lists(size)
    if own is not None:
        return own
    plan = plan if plan.block_size == size else replace(plan, block_size=size)
    row, j, q_tiles = _rows(plan), plan.columns, max(1, plan.q_blocks)
    # a tile that hangs over the last query or key is never full
    full = plan.full & (row % q_tiles < plan.q_len // size) & (j < plan.kv_len // size)
    masks, mask = masks_of(plan, row, j, full)
    patterns = len(plan.patterns)
    heads = torch.tensor(plan.heads or [0] * num_heads, device=plan.device)
    first = torch.arange(batch, device=plan.device) * patterns if plan.batch_rows > 1 else heads.new_zeros(batch)
    groups = plan.batch_rows * patterns
    least = least_of_program(batch * num_heads * plan.q_blocks)
    of_keys = row // q_tiles * plan.kv_blocks + j
    by_key = make_lists(groups, plan.kv_blocks, Entries(of_keys, row % q_tiles, full, mask), least)
    return TileLists(
        size,
        (first[:, None] + heads).flatten().int(),
        make_lists(groups, plan.q_blocks, Entries(row, j, full, mask), least),
        lambda: by_key,
        masks,
        masks.transpose(1, 2).contiguous(),
    )


def least_of_program(tiles: int) -> int:
    """How many entries a program walks at least, of so many query tiles of all heads."""
    return HOST_BOUND_PROGRAM_TILES if tiles <= HOST_BOUND_TILES else PROGRAM_TILES


class Entries(NamedTuple):
    """Tiles to be listed, `[N]` each: line (counted through all groups), tile on the other side, is it full, its mask."""

    line: Tensor
    other: Tensor
    full: Tensor
    mask: Tensor


def make_lists(groups: int, lines: int, entries: Entries, least: int | None) -> Lists:
    """Sort entries by line, those with a mask first; otherwise they stay in order.

    Lines of up to `least` entries are not cut; None: no line is.
    """
    device = entries.line.device
    found, order = (entries.line.int() * 2 + entries.full).sort(stable=True)
    # where the entries of each line begin, and those of them that are full
    bounds = torch.arange(2 * groups * lines + 1, dtype=torch.int32, device=device)
    begin = torch.searchsorted(found, bounds, out_int32=True)
    offsets = begin[::2].contiguous()
    limit, segments, long = UNLIMITED, entries.line.new_zeros(0, 2), entries.line.new_zeros(0, 3)
    if least is not None and len(entries.line):
        # many small steps, for each of which a GPU would have to be waited for
        limit, segments, long = segments_of(offsets.diff().view(groups, lines).amax(0).cpu(), least)
    return Lists(
        offsets,
        begin[1::2] - offsets[:-1],
        entries.other[order].int(),
        entries.mask[order].int(),
        lines,
        limit,
        segments.int().to(device),
        long.int().to(device),
    )


def segments_of(entries: Tensor, least: int) -> tuple[int, Tensor, Tensor]:
    """`limit`, `segments` and `long` of lines that have up to so many `entries` in a group."""
    mean = int(entries.sum()) / int(entries.count_nonzero())
    limit = max(least, int(PROGRAM_TILES_OVER_MEAN * mean), SEGMENT_TILES_OVER_ROOT * math.isqrt(int(entries.max())))
    long = (entries > limit).nonzero().flatten()
    more = (entries[long] - 1) // limit
    first = more.cumsum(0) - more
    number = torch.arange(int(more.sum()), device=entries.device) - first.repeat_interleave(more) + 1
    return limit, torch.stack((long.repeat_interleave(more), number), 1), torch.stack((long, first, more), 1)


def _rows(plan: BlockPlan) -> Tensor:
    """The table row of each block of the plan, `[N]` int32."""
    counts = plan.row_offsets.diff()
    row = torch.arange(len(counts), dtype=torch.int32, device=plan.device)
    return row.repeat_interleave(counts, output_size=len(plan.columns))


def masks_of(plan: BlockPlan, row: Tensor, j: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct masks `[M, S, S]` uint8 of the tiles that are not full, and which of them each tile has, `[N]`."""
    size, wanted = plan.block_size, (~full).nonzero().flatten()
    if not len(wanted):
        return torch.zeros(1, size, size, dtype=torch.uint8, device=plan.device), row.new_zeros(1).expand_as(row)
    number = torch.zeros_like(row)
    row, j = row[wanted].long(), j[wanted].long()
    tiles = row // plan.q_blocks, row % plan.q_blocks, j
    found = _alike(plan, *tiles)
    # an example is its own
    own = found == torch.arange(len(found), device=plan.device)
    examples, which = own.nonzero().flatten(), (own.cumsum(0) - 1)[found]
    at_once = max(1, MASK_BITS_AT_ONCE // size**2)
    some_tiles = zip(*(t[examples].split(at_once) for t in tiles), strict=True)
    evaluated = (_evaluated(plan, group, i, j).flatten(1) for group, i, j in some_tiles)
    words = torch.cat([_packed(bits).view(torch.int64) for bits in evaluated])
    words, mask = words.unique(dim=0, return_inverse=True)
    number[wanted] = mask[which].int()
    return _unpacked(words.view(torch.uint8)).view(-1, size, size), number


@remembered
def examples(plan: BlockPlan) -> dict[tuple[int, int], int]:
    """For each partial block of a plan, by its table row and column: the number of one that holds the same pairs."""
    partial = ~plan.full
    row, column, lines = _rows(plan)[partial].long(), plan.columns[partial].long(), max(1, plan.q_blocks)
    found = _alike(plan, row // lines, row % lines, column)
    return dict(zip(zip(row.tolist(), column.tolist(), strict=True), found.tolist(), strict=True))


def _alike(plan: BlockPlan, group: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """For each tile one that holds the same pairs, `[T]`: by the pattern's signature, itself where that does not tell."""
    size, sequences, found = plan.block_size, plan.sequences, torch.arange(len(i), device=plan.device)
    if plan.mask_function is not None:
        return found
    b, p = group // len(plan.patterns), group % len(plan.patterns)
    b = b if sequences.rows > 1 else torch.zeros_like(b)
    q, k = i * size + plan.q_offset, j * size
    # tiles that hang over the last query or key
    numbers = [(plan.q_offset + plan.q_len - q).clamp(max=size), (plan.kv_len - k).clamp(max=size)]
    whole, length = torch.ones_like(found, dtype=torch.bool), None
    if sequences.start is not None and sequences.end is not None:
        origin = sequences.start[b, q]
        whole = (sequences.start[b, k] == origin) & _is_whole(plan, True)[b, i] & _is_whole(plan, False)[b, j]
        length = sequences.end[b, q] + 1 - origin
        q, k = q - origin, k - origin
    if sequences.marks is not None:
        numbers += [_marked(plan, sequences.marks, True)[b, i], _marked(plan, sequences.marks, False)[b, j]]
    numbers += plan.tile_numbers(group, i, j)
    distinct = list(dict.fromkeys(plan.patterns))
    which_pattern = torch.tensor([distinct.index(pattern) for pattern in plan.patterns], device=plan.device)[p]
    for index, pattern in enumerate(distinct):
        own = (whole & (which_pattern == index)).nonzero().flatten()
        marks = Marks(length=plan.kv_len if length is None else length[own])
        signature = pattern.signature(q[own], k[own], size, marks)
        if signature is not None and len(own):
            which = _numbered([*signature, *(t[own] for t in numbers)])
            found[own] = torch.zeros_like(own).scatter_(0, which, own)[which]
    return found


def _numbered(columns: list[Tensor]) -> Tensor:
    """The rows of `columns` `[T]` each, numbered from 0: equal rows, and no others, have one number."""
    table = torch.stack(columns)
    table = table - table.amin(1, keepdim=True)
    number, count = table.new_zeros(table.shape[1]), 1
    for column, most in zip(table, table.amax(1).tolist(), strict=True):
        if count * (most + 1) > MAX_NUMBERS:
            _, number = number.unique(return_inverse=True)
            count = len(number)
        number, count = number * (most + 1) + column, count * (most + 1)
    return number.unique(return_inverse=True)[1]


def _tokens(plan: BlockPlan, of_queries: bool) -> Tensor:
    """The tokens of each tile, `[Nq or Nk, S]`; those beyond the last are the last."""
    first, lines, length = (
        (plan.q_offset, plan.q_blocks, plan.q_len) if of_queries else (0, plan.kv_blocks, plan.kv_len)
    )
    token = torch.arange(lines * plan.block_size, device=plan.device).clamp(max=length - 1)
    return (first + token).view(lines, plan.block_size)


def _is_whole(plan: BlockPlan, of_queries: bool) -> Tensor:
    """Which tiles hold tokens of one sequence only, `[B or 1, Nq or Nk]`."""
    sequences, tokens = plan.sequences, _tokens(plan, of_queries)
    assert sequences.start is not None
    start = sequences.start[:, tokens]
    whole = (start == start[..., :1]).all(-1)
    return whole if sequences.real is None else whole & sequences.real[:, tokens].all(-1)


def _marked(plan: BlockPlan, marks: Tensor, of_queries: bool) -> Tensor:
    """Which tokens of each tile are marked, as a number, `[B or 1, Nq or Nk]`."""
    of_tiles = marks[:, _tokens(plan, of_queries)]
    number = _packed(of_tiles.flatten(0, 1)).unique(dim=0, return_inverse=True)[1]
    return number.view(of_tiles.shape[:2])


def _packed(flags: Tensor) -> Tensor:
    """`[T, 8 * m]` bool as bits, `[T, m]` uint8."""
    # of 8 bytes that are 0 or 1 the product moves the last bit of byte n to bit 56 + n
    return (flags.contiguous().view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """`_packed` again as flags, uint8."""
    return (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).flatten(1)


def _evaluated(plan: BlockPlan, group: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Tiles pair by pair, `[T, S, S]` bool."""
    step = torch.arange(plan.block_size, device=plan.device)
    q, k = (i[:, None] * plan.block_size + step)[:, :, None], (j[:, None] * plan.block_size + step)[:, None, :]
    b = (group // len(plan.patterns))[:, None, None]
    exists = (q < plan.q_len) & (k < plan.kv_len)
    q, k = q.clamp(max=plan.q_len - 1), k.clamp(max=plan.kv_len - 1)
    if len(dict.fromkeys(plan.patterns)) == 1:
        p = 0 if len(plan.patterns) == 1 else (group % len(plan.patterns))[:, None, None]
        return plan.allows(b, p, q, k) & exists
    held = torch.zeros_like(exists)
    for p in range(len(plan.patterns)):
        own = (group % len(plan.patterns) == p).nonzero().flatten()
        if len(own):
            held[own] = plan.allows(b[own], p, q[own], k[own]).expand(-1, *held.shape[1:])
    return held & exists


def chunk_lists(plan: HashedPlan) -> TileLists:
    """The lists of a plan of chunks. Every tile is masked, by comparing tokens."""
    assert plan.chunks is not None
    if plan.chunks.alike:
        return _ring_lists(plan.size, plan.q_index.shape[0], plan.chunks.ring, plan.device)
    return _padded_lists(plan)


@lru_cache(maxsize=RINGS_KEPT)
def _ring_lists(size: int, rows: int, ring: tuple[int, int, int, int], device: torch.device) -> TileLists:
    """Those of all plans whose rows are such rings: nothing in them depends on which tokens stand where."""
    return made(_make_ring_lists, size, rows, ring, device)


def _make_ring_lists(size: int, rows: int, ring: tuple[int, int, int, int], device: torch.device) -> TileLists:
    rounds, tiles, *_ = ring
    group_of = torch.zeros(rows, dtype=torch.int32, device=device)
    found = ring_tiles(torch.tensor([tiles], device=device), *ring)
    return _lists_without_masks(size, group_of, *_masked_lists(1, rounds * tiles, found))


@remembered
def _padded_lists(plan: HashedPlan) -> TileLists:
    rows = plan.q_index.shape[0]
    group_of = torch.arange(rows, dtype=torch.int32, device=plan.device)
    found = ((tiles.x, tiles.i, tiles.columns) for tiles in plan.tile_sets)
    lines = plan.q_index.shape[1] // plan.size
    return _lists_without_masks(plan.size, group_of, *_masked_lists(rows, lines, found))


def _lists_without_masks(size: int, group_of: Tensor, by_query: Lists, by_key: Lists) -> TileLists:
    none = torch.zeros(0, dtype=torch.uint8, device=group_of.device)
    return TileLists(size, group_of, by_query, lambda: by_key, none, none)


def _masked_lists(groups: int, lines: int, found: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Lists, Lists]:
    """By query and by key, of tiles of queries and those that each sees: rows `[T]`, tiles `[T]` and columns `[T, w]`."""
    x, i, columns = (torch.cat(some) for some in zip(*found, strict=True))
    exists = columns >= 0
    group, i, j = (t.expand_as(columns)[exists] for t in (x[:, None], i[:, None], columns))
    full, mask = torch.zeros_like(group, dtype=torch.bool), torch.zeros_like(group)
    by_query = make_lists(groups, lines, Entries(group * lines + i, j, full, mask), None)
    by_key = make_lists(groups, lines, Entries(group * lines + j, i, full, mask), None)
    return by_query, by_key
