"""`threshold(...)`: tiles without those that cannot matter, as a plan that backends of tables run like any other.

All products of queries and keys are made to judge tiles; those of kept tiles again, to attend. Kernels judge square tiles of texts
without padding and documents (`chosen_judging`); others are judged here, in plain PyTorch, some queries at a time.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; T groups of queries and M blocks of keys, which make
tiles of pairs; Nq and Nk tiles of the plan, which may be others. A piece has r heads, m queries and t groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...pattern import Threshold
from ...plan.cache import kept
from ...plan.tile_lists import TileLists
from ..backend import AttentionCall
from ..left_out import is_heard
from . import chosen_judging
from .chosen_blocks import Blocks
from .chosen_lists import Flags, Kinds, find_kinds, packed, unpacked
from .chosen_rest import Rest
from .chosen_tiles import ChosenTiles, Listed, in_tiles, is_among, largest_tile

# scores that exist at once, on the CPU and elsewhere, where the host would wait for many small pieces
MAX_SCORES, MAX_SCORES_ELSEWHERE = 1 << 22, 1 << 26


@dataclass(frozen=True, eq=False)
class WeightyTiles(ChosenTiles):
    """Tiles that a threshold keeps, counted along sequences, and the tiles of the plan that they reach into.

    Attributes:
        weighty: of kept tiles, `((b * H + h) * T + t) * M + m`, ascending.
        blocks: the blocks of keys.
        of_query, of_key: the group of each query and the block of each key, `[B or 1, Q]` and `[B or 1, K]`.
        shape: T and M.
        is_aligned: is each tile of the plan inside one of these?
    """

    weighty: Tensor | None = None
    blocks: Blocks | None = None
    of_query: Tensor | None = None
    of_key: Tensor | None = None
    shape: tuple[int, int] = (0, 0)
    is_aligned: bool = True

    @kept
    def codes(self) -> Tensor:
        return _reached(self)

    def own_lists(self, size: int) -> None:
        return None

    def chosen(self, b: Tensor, h: Tensor | int, q: Tensor, k: Tensor) -> Tensor:
        assert self.cut is not None and self.of_query is not None and self.of_key is not None
        assert self.weighty is not None
        row = b if self.of_query.shape[0] > 1 else torch.zeros_like(b)
        (groups, blocks), row_of_head = self.shape, b * len(self.patterns) + h
        code = (row_of_head * groups + self.of_query[row, q]) * blocks + self.of_key[row, k]
        return is_among(code, self.weighty) & self.cut.allows(b, 0, q, k)

    def _is_full(self, codes: Tensor) -> Tensor:
        return super()._is_full(codes) if self.is_aligned else torch.zeros_like(codes, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Weighing:
    """A call, and what a threshold asks of it."""

    call: AttentionCall
    content: Threshold
    rest: Rest

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.rest, self.content.size)

    def of_query(self) -> Tensor:
        """The group of each query, counted from the first of a call, `[B or 1, Q]`."""
        queries, offset = self.call.q.shape[2], self.rest.positions.q_offset
        if self.content.queries == 1:
            return torch.arange(queries, device=self.call.q.device)[None]
        own = Blocks(self.rest, self.content.queries).of_token[:, offset:][:, :queries]
        return own - own[:, :1]

    def pieces(self, of_query: Tensor) -> Iterator[tuple[int, int, slice, slice]]:
        """A batch row, key head, query heads and queries, which are all of their groups."""
        batch, heads, queries, _ = self.call.q.shape
        groups, repeats = self.call.k.shape[1], heads // max(1, self.call.k.shape[1])
        scores = MAX_SCORES if self.call.q.device.type == "cpu" else MAX_SCORES_ELSEWHERE
        most = max(1, scores // max(1, self.call.k.shape[2]))
        for b in range(batch):
            edges = _edges(of_query[b if of_query.shape[0] > 1 else 0], most)
            for first, last in zip(edges, [*edges[1:], queries], strict=True):
                some = max(1, most // (last - first))
                for g in range(groups):
                    for h in range(g * repeats, (g + 1) * repeats, some):
                        yield b, g, slice(h, min(h + some, (g + 1) * repeats)), slice(first, last)


def _edges(groups: Tensor, most: int) -> list[int]:
    """Where pieces of at most `most` queries begin, or of one group that has more; none for no queries."""
    if not len(groups):
        return []
    starts = (torch.nn.functional.pad(groups.diff() != 0, (1, 0), value=True)).nonzero()[:, 0].tolist()
    found: list[int] = []
    for start, end in zip(starts, [*starts[1:], len(groups)], strict=True):
        if not found or end - found[-1] > most:
            found.append(start)
    return found


def weigh(weighing: Weighing, of_query: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The codes of kept tiles, ascending, and the share of weights that is left out, `[B, H, Q]`."""
    q, blocks = weighing.call.q, weighing.blocks
    left_out = torch.full(q.shape[:3], torch.nan, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    inside = blocks.first[..., None] + torch.arange(blocks.size, device=q.device)
    # of the tokens of each block, and of those that there are
    there, inside = inside <= blocks.last[..., None], inside.clamp(max=max(0, weighing.call.k.shape[2] - 1))
    codes = [torch.zeros(0, dtype=torch.int64, device=q.device)]
    for b, g, heads, queries in weighing.pieces(of_query):
        row = b if of_query.shape[0] > 1 else 0
        weights, candidates = _weights(weighing, b, g, heads, queries)  # [r, m, K], [m, K]
        worth = weights.where(candidates, 0)
        token, exists = (t[b if t.shape[0] > 1 else 0] for t in (inside, there))  # [M, S]
        most = worth[..., token.flatten()].unflatten(-1, token.shape).where(exists, 0).amax(-1)  # [r, m, M]
        group = of_query[row, queries] - of_query[row, queries.start]
        wanted = torch.zeros(len(most), int(group[-1]) + 1, most.shape[2], dtype=torch.int32, device=q.device)
        wanted.index_add_(1, group, (most >= weighing.content.share).int())
        keeps = wanted > 0  # [r, t, M]
        block = blocks.of_token[b if blocks.of_token.shape[0] > 1 else 0]
        lost = worth.masked_fill_(keeps[:, group][..., block], 0).sum(-1)
        # a query that sees nothing has 0 / 0
        left_out[b, heads, queries] = lost / weights.sum(-1)
        r, t, m = keeps.nonzero(as_tuple=True)
        line = (b * q.shape[1] + heads.start + r) * shape[0] + of_query[row, queries.start] + t
        codes.append(line * shape[1] + m)
    return torch.cat(codes).sort().values, left_out


def _weights(weighing: Weighing, b: int, g: int, heads: slice, queries: slice) -> tuple[Tensor, Tensor]:
    """What queries give to keys, of what they give to their heaviest, `[r, m, K]`; and the pairs that are judged, `[m, K]`."""
    call, rest = weighing.call, weighing.rest
    wide = torch.promote_types(call.q.dtype, torch.float32)
    scores = call.q[b, heads, queries].to(wide) @ call.k[b, g].to(wide).mT * call.scoring.scale
    if call.scoring.softcap is not None:
        scores = (scores / call.scoring.softcap).tanh_().mul_(call.scoring.softcap)
    row = torch.full((1, 1), b, device=scores.device)
    x = torch.arange(queries.start, queries.stop, device=scores.device)[:, None]
    y = torch.arange(scores.shape[2], device=scores.device)
    held, may = (plan.allows(row, 0, x, y).expand(scores.shape[1:]) for plan in (rest.positions, rest.cut))
    scores.masked_fill_(~(held | may), -torch.inf)
    top = scores.amax(-1, keepdim=True)
    return scores.sub_(top.where(top > -torch.inf, 0)).exp_(), may & ~held


@dataclass(frozen=True, eq=False)
class FlaggedTiles(ChosenTiles):
    """Tiles of the plan that a threshold keeps.

    A layer holds a bit for each tile: of texts of 131,072 tokens 0.5 MiB a head.

    Attributes:
        kinds: what positions say of tiles.
        bits: `[B, H, Nq, Nk / 8]` uint8, a bit for each tile, 1 where it is kept.
    """

    kinds: Kinds | None = None
    bits: Tensor | None = None

    @property
    def flags(self) -> Callable[[], Tensor]:
        """Gives `[B, H, Nq, Nk]` uint8, 1 where a tile is kept; lists that are kept with this call it, and so it must not hold this."""
        assert self.bits is not None
        return partial(unpacked, self.bits, self.kv_blocks)

    @kept
    def codes(self) -> Tensor:
        return self.flags().flatten().nonzero()[:, 0]

    def own_lists(self, size: int) -> TileLists | None:
        assert self.kinds is not None
        return Flags(self.flags).lists(self.kinds, None) if size == self.block_size else None


def weighty_tiles(call: AttentionCall, content: Threshold, rest: Rest) -> tuple[ChosenTiles, Tensor | None]:
    """The plan of the pairs of positions and of kept tiles, and the share of weights that is left out, `[B, H, Q]`.

    None is left out where kernels judge and nobody listens.
    """
    positions, (batch, heads) = rest.positions, call.q.shape[:2]
    tile = math.gcd(content.size, largest_tile(call.q.device))
    # tiles of the plan begin where the sequence does
    is_bare = positions.is_bare and positions.sequences.marks is None
    is_aligned = is_bare and not positions.q_offset % tile and not content.queries % tile
    beside, cut = in_tiles(positions, tile), replace(rest.cut, block_size=tile)
    common: dict[str, Any] = {
        "patterns": (Listed((beside.patterns[0], cut.patterns[0]), is_aligned),) * heads, "heads": tuple(range(heads)),
        "q_len": positions.q_len, "kv_len": positions.kv_len, "q_offset": positions.q_offset, "block_size": tile,
        "batch_rows": batch, "sequences": positions.sequences, "mask_function": positions.mask_function,
        "device": positions.device, "beside": beside, "cut": cut,
    }  # fmt: skip
    if is_aligned and content.size == content.queries == tile and chosen_judging.why_not(call) is None:
        kinds = find_kinds(beside, cut.patterns[0])
        if kinds is not None:
            flags, left_out = chosen_judging.judge(call, content.share, kinds, is_heard())
            return FlaggedTiles(**common, kinds=kinds, bits=packed(flags)), left_out
    weighing = Weighing(call, content, rest)
    of_query, of_key = weighing.of_query(), weighing.blocks.of_token
    rows = max(len(of_query), len(of_key))
    of_query, of_key = of_query.expand(rows, -1), of_key.expand(rows, -1)
    shape = (int(of_query.max()) + 1 if of_query.numel() else 1), weighing.blocks.first.shape[1]
    weighty, left_out = weigh(weighing, of_query, shape)
    return WeightyTiles(
        **common,
        weighty=weighty,
        blocks=weighing.blocks,
        of_query=of_query,
        of_key=of_key,
        shape=shape,
        is_aligned=is_aligned,
    ), left_out


def _reached(plan: WeightyTiles) -> Tensor:
    """The codes of the tiles of the plan that kept tiles reach into, ascending."""
    blocks = plan.blocks
    assert plan.weighty is not None and plan.of_query is not None and blocks is not None
    (groups, columns), heads, tile = plan.shape, len(plan.patterns), plan.block_size
    line, m = plan.weighty // columns, plan.weighty % columns
    row, t = line // groups, line % groups
    of_batch = row // heads if len(plan.of_query) > 1 else torch.zeros_like(row)
    # the first and the last query of each group of each row, which ascend
    number = torch.arange(groups, device=plan.device).expand(len(plan.of_query), -1).contiguous()
    of_query = plan.of_query.contiguous()
    q0 = torch.searchsorted(of_query, number)[of_batch, t]
    q1 = torch.searchsorted(of_query, number, right=True)[of_batch, t] - 1
    of_keys = of_batch if blocks.first.shape[0] > 1 else torch.zeros_like(of_batch)
    k0, k1 = (edge[of_keys, m] for edge in (blocks.first, blocks.last))
    found = [torch.zeros(0, dtype=torch.int64, device=plan.device)]
    corners = [edge // tile for edge in (q0, q1, k0, k1)]
    if len(row):
        for i in range(int((corners[1] - corners[0]).max()) + 1):
            for j in range(int((corners[3] - corners[2]).max()) + 1):
                x, y = corners[0] + i, corners[2] + j
                there = (x <= corners[1]) & (y <= corners[3])
                found.append(((row * plan.q_blocks + x) * plan.kv_blocks + y)[there])
    return torch.cat(found).unique()
