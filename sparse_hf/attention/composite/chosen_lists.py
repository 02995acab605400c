"""The lists of tiles of a choice, made on its device: the host is told nothing of what was chosen, and waits for nothing.

What positions say of each tile is found once for lengths and pattern, and a kernel puts it together with the flags of a choice.

Legend: B batch, H query heads, C heads of the choice; Nq and Nk tiles of queries and of keys, T groups of queries and M blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...pattern import EMPTY, PARTIAL, Pattern
from ...pattern.base import Marks
from ...plan import BlockPlan
from ...plan.batch import PlanCache
from ...plan.cache import kept, made, remembered
from ...plan.tile_lists import UNLIMITED, Lists, TileLists, least_of_program, masks_of, segments_of
from ..backends.triton import walk
from ..launch import launch, power_of_two

# tiles of a plane whose kinds are kept, tiles in it that a pattern cuts, and masks, which 16 bits number; larger planes are listed
# from tables, where the host's time no longer counts
MAX_TILES, MAX_CUT, MAX_MASKS = 1 << 24, 1 << 20, (1 << 15) - 2
# tiles whose kinds are found at once; planes that are kept when nobody uses them any more, and the bytes of all but the last of them
TILES_AT_ONCE, PLANES_KEPT, MAX_PLANE_BYTES = 1 << 22, 4, 1 << 27
# lines of keys that are walked as they are: of so many query tiles, no host is told how long they became
MAX_WHOLE_LINE = 256
# others that a program looks at at once, and its warps
MAX_OTHERS, WARPS = 128, 1


@dataclass(frozen=True, eq=False)
class Plane:
    """What positions say of the tiles of a head, for lists by query or by key.

    Attributes:
        joint: of each line and other, `[Nq, Nk]` or `[Nk, Nq]` int16, what a chosen tile holds with positions: -1 nothing, 0 all, else
            1 + the number of a mask.
        beside: what positions alone hold in it.
        ends: the others of each line, from the first to behind the last, `[lines, 2]` int32.
    """

    joint: Tensor
    beside: Tensor

    @kept
    def ends(self) -> Tensor:
        some = (self.joint >= 0) | (self.beside >= 0)
        first, count = some.int().argmax(1), some.shape[1]
        last = count - some.flip(1).int().argmax(1)
        return torch.stack((first, last.where(some.any(1), first)), 1).int()


@dataclass(frozen=True, eq=False)
class Kinds:
    """The planes of lists by query and by key, and the masks of tiles that are cut, queries x keys: `[masks, S, S]` uint8."""

    by_query: Plane
    masks: Tensor

    @kept
    def by_key(self) -> Plane:
        return Plane(self.by_query.joint.T.contiguous(), self.by_query.beside.T.contiguous())

    @kept
    def alone(self) -> Plane:
        """The plane by query of what is chosen, without positions."""
        return Plane(self.by_query.joint, torch.full_like(self.by_query.beside, -1))

    @kept
    def masks_by_key(self) -> Tensor:
        return self.masks.transpose(1, 2).contiguous()

    @property
    def most_bytes(self) -> int:
        """What this holds with all that is made of it when asked for."""
        joint, beside = self.by_query.joint, self.by_query.beside
        return 2 * (joint.nbytes + beside.nbytes + self.masks.nbytes) + beside.nbytes

    @kept
    def held(self) -> Tensor:
        """Tiles of each line of queries that positions hold pairs of, on the CPU, `[Nq]`."""
        return (self.by_query.beside >= 0).sum(1).cpu()


PLANES = PlanCache(PLANES_KEPT, MAX_PLANE_BYTES)


def find_kinds(beside: BlockPlan, cut: Pattern) -> Kinds | None:
    """The kinds of the tiles of a plan of positions, all of whose pairs are alike for batch rows and heads, and of what may be chosen
    beside it; None where they are too many."""
    if not 0 < beside.q_blocks * beside.kv_blocks <= MAX_TILES:
        return None
    found = PLANES.get((beside, cut))
    if found is None:
        kinds = made(_make_kinds, beside, cut)
        found = PLANES.put((beside, cut), (kinds,), kinds.most_bytes if kinds else 0)
    return found[0]


def _make_kinds(beside: BlockPlan, cut: Pattern) -> Kinds | None:
    size, found, masks = beside.block_size, [], []
    for pattern in (beside.patterns[0] | cut, beside.patterns[0]):
        plan = replace(beside, patterns=(pattern,))
        step = max(1, TILES_AT_ONCE // plan.kv_blocks)
        kinds = torch.cat([_states(plan, some) for some in torch.arange(plan.q_blocks, device=plan.device).split(step)])
        i, j = (kinds > 0).nonzero(as_tuple=True)
        if len(i) > MAX_CUT:
            return None
        if len(i):
            some, number = masks_of(plan, i.int(), j.int(), torch.zeros_like(i, dtype=torch.bool))
            kinds[i, j] = (number + 1 + sum(map(len, masks))).to(kinds.dtype)
            masks.append(some)
            if sum(map(len, masks)) > MAX_MASKS:
                return None
        found.append(kinds)
    none = torch.zeros(1, size, size, dtype=torch.uint8, device=beside.device)
    return Kinds(Plane(*found), torch.cat(masks) if masks else none)


def _states(plan: BlockPlan, i: Tensor) -> Tensor:
    """What the pattern says of some lines of tiles, `[m, Nk]` int16: -1 of empty ones, 0 of full ones and 1 of others."""
    size, j = plan.block_size, torch.arange(plan.kv_blocks, device=plan.device)
    q, k = i[:, None] * size, j * size
    q1, k1 = (q + size - 1).clamp(max=plan.q_len - 1), (k + size - 1).clamp(max=plan.kv_len - 1)
    offset = plan.q_offset
    state = plan.patterns[0].blocks(q + offset, q1 + offset, k, k1, Marks(length=plan.kv_len)).expand(len(i), len(j))
    # a tile that hangs over the last query or key is never full
    whole = (q + size <= plan.q_len) & (k + size <= plan.kv_len)
    state = state.where(whole, state.clamp(max=PARTIAL))
    return (state == PARTIAL).to(torch.int16) - (state == EMPTY).to(torch.int16)


class Cut(NamedTuple):
    """How many entries lists have, and which lines are cut into segments."""

    entries: int
    limit: int
    segments: Tensor
    long: Tensor


@remembered
def known_cut(kinds: Kinds, more: int, rows: int, heads_of_row: int) -> Cut:
    """Of lists by query whose lines have at most `more` tiles beside those of positions."""
    held = kinds.held
    bound = (held + more).clamp(max=kinds.by_query.joint.shape[1])
    return _cut(bound, rows * int(bound.sum()), rows * heads_of_row * len(bound), kinds.masks.device)


def _cut(bound: Tensor, entries: int, tiles: int, device: torch.device) -> Cut:
    """Of lines of up to `bound` entries in a row, on the CPU."""
    least = least_of_program(tiles)
    if not bound.any() or int(bound.max()) <= least:
        return _whole(entries, device)
    limit, segments, long = segments_of(bound, least)
    return Cut(entries, limit, segments.int().to(device), long.int().to(device))


def _whole(entries: int, device: torch.device) -> Cut:
    none = torch.zeros(0, 3, dtype=torch.int32, device=device)
    return Cut(entries, UNLIMITED, none[:, :2], none)


@dataclass(frozen=True, eq=False)
class Flags:
    """Which blocks of keys each group of queries chose.

    Attributes:
        make: gives `[B, C, T, at least M]` uint8, not 0 where it did, contiguous in the last dimension. It grows with the product of
            lengths, and is made anew for either pass, so that nobody holds it between them.
        tiles: tiles of a group, and of a block.
        shift: tiles of the first group that come before the first query.
        heads_of_row: query heads that share one of C.
    """

    make: Callable[[], Tensor]
    tiles: tuple[int, int] = (1, 1)
    shift: int = 0
    heads_of_row: int = 1

    def lists(self, kinds: Kinds, most: int | None) -> TileLists:
        """The lists of a plan whose heads have these flags.

        Args:
            most: tiles that a line of queries chose at most; None: they are counted, and the host waits.
        """
        flags = self.make()
        rows, device = flags.shape[0] * flags.shape[1], flags.device
        cut = None if most is None else known_cut(kinds, most, rows, self.heads_of_row)
        by_query = self.listed(kinds.by_query, flags, (self.tiles[0], self.shift, self.tiles[1], 0), cut)

        def by_key() -> Lists:
            flags, sides = self.make().transpose(2, 3).contiguous(), (self.tiles[1], 0, self.tiles[0], self.shift)
            entries = len(by_query.others)
            is_short = by_query.lines <= MAX_WHOLE_LINE
            return self.listed(kinds.by_key, flags, sides, _whole(entries, flags.device) if is_short else None)

        of_heads = torch.arange(rows * self.heads_of_row, dtype=torch.int32, device=device)
        of_heads = of_heads if self.heads_of_row == 1 else of_heads // self.heads_of_row
        return TileLists(kinds.masks.shape[1], of_heads, by_query, by_key, kinds.masks, kinds.masks_by_key)

    def listed(self, plane: Plane, flags: Tensor, sides: tuple[int, int, int, int], cut: Cut | None) -> Lists:
        """Lists by the lines of a plane; without `cut`, entries are counted first, and the host waits."""
        from . import chosen_list_kernels as kernels

        (lines, columns), rows = plane.joint.shape, flags.shape[0] * flags.shape[1]
        sizes = flags.stride(1), flags.stride(2), lines, columns, *sides
        counts = torch.zeros(rows * lines + 1, dtype=torch.int32, device=flags.device)
        masked = counts.new_empty(rows * lines)

        def run(offsets: Tensor, others: Tensor, masks: Tensor, **flag: bool) -> None:
            tensors = flags, plane.joint, plane.beside, plane.ends, offsets, masked, others, masks
            constants = {**flag, "BN": min(MAX_OTHERS, max(16, power_of_two(columns)))}
            launch(kernels.list_tiles, (lines, rows), tensors, (), sizes, constants, num_warps=WARPS)

        run(counts, masked, masked, WRITE=False)
        offsets = counts.cumsum(0, dtype=torch.int32)
        if cut is None:
            *bound, entries = torch.cat([counts[1:].view(rows, lines).amax(0), offsets[-1:]]).tolist()
            cut = _cut(torch.tensor(bound, device="cpu"), entries, rows * self.heads_of_row * lines, flags.device)
        others = counts.new_empty(max(1, cut.entries))
        masks = torch.empty_like(others)
        run(offsets, others, masks, WRITE=True)
        return Lists(offsets, masked, others, masks, lines, cut.limit, cut.segments, cut.long)


def packed(flags: Tensor) -> Tensor:
    """Flags `[..., n]`, 0 or 1, as bits: `[..., n / 8]` uint8."""
    flags = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flags << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` flags of `packed`."""
    flags = bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return flags.flatten(-2)[..., :count].contiguous()


def may_list(device: torch.device) -> bool:
    """Are choices on such a device listed by the kernel?"""
    return device.type in walk.DEVICES and walk.IS_INSTALLED


def flags_of(found: Tensor, blocks: int) -> Tensor:
    """Chosen blocks `[B, C, T, c]`, -1 for none, as flags, `[B, C, T, M + 1]` uint8."""
    flags = torch.zeros(*found.shape[:3], blocks + 1, dtype=torch.uint8, device=found.device)
    return flags.scatter_(-1, found.masked_fill(found < 0, blocks).long(), 1)
