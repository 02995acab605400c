"""What `blockwise` walks: the shares of a call, their tiles, and what happens to the scores of a tile.

Legend: B batch, H query heads, G key heads, R query heads per key head, Q queries, K keys, D head dim; m queries and n keys of
a tile; M tokens that are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ....plan import BlockPlan, Gathered, Run, joined_rows, remembered
from ....plan.tile_lists import examples
from ...dropout import Dropout, kept_at
from ...scoring import Scoring

# tables of tiles: of a plan, or of what is gathered from it
Piece = BlockPlan | Gathered
# keys and values
Source = tuple[Tensor, Tensor]
# keys per tile: bounds the scores that exist at once, also for rows that see the whole sequence
MAX_KEYS = 2048
# masks of a plan that are kept: few differ, and where many do, documents cut them, memory must not grow with the text
MASKS = 64


@dataclass(frozen=True)
class Tile:
    """Queries `q0..q1` (counted from the query block's first) against keys `k0..k1` of a piece of the plan, ends exclusive.

    `masks` holds (first column, last + 1, mask `[m, n']`) for the parts of the tile that are partial.
    """

    piece: int
    q0: int
    q1: int
    k0: int
    k1: int
    masks: tuple[tuple[int, int, Tensor], ...]

    @property
    def queries(self) -> slice:
        return slice(self.q0, self.q1)

    def of_keys(self, t: Tensor) -> Tensor:
        """The tile's share of `[G, K, D]`, `[G, n, D]`."""
        return t[:, self.k0 : self.k1]

    def add(self, total: Tensor, chosen: Tensor | None, value: Tensor) -> None:
        """Add `value` `[G, n, D]` to `total` `[all key heads, K, D]`."""
        into = self.of_keys(total)
        if chosen is None:
            into.add_(value)
        else:
            into.index_add_(0, chosen, value)

    def cover(self, scores: Tensor) -> Tensor:
        """Put -inf on the pairs of `scores` `[G, R, m, n]` that the plan leaves out, in place."""
        for first, last, mask in self.masks:
            scores[..., first:last].masked_fill_(~mask, -torch.inf)
        return scores

    def additive(self, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the scores of `query` `[G, R, m, D]`: 0 or -inf, `[R * m, n]`; and which queries see anything, `[m]`.

        None where the plan leaves out no pair, and where all queries do.
        """
        if not self.masks:
            return None, None
        keys = self.k1 - self.k0
        mask = self.cover(query.new_zeros(query.shape[2], keys))
        is_masked = sum(last - first for first, last, _ in self.masks) == keys
        of_heads = mask if query.shape[1] == 1 else mask.repeat(query.shape[1], 1)
        return of_heads, (mask > -torch.inf).any(-1) if is_masked else None


@dataclass(frozen=True)
class JoinedTile:
    """A whole query block against keys of its own in every head: `index` `[G, n]`, of which some may not exist."""

    q1: int
    index: Tensor
    exists: Tensor
    piece: int = 0
    q0: int = 0

    @property
    def queries(self) -> slice:
        return slice(self.q0, self.q1)

    def _flat(self, heads: Tensor, length: int) -> Tensor:
        return (heads[:, None] * length + self.index).flatten()

    def of_keys(self, t: Tensor) -> Tensor:
        index = self._flat(torch.arange(len(t), device=t.device), t.shape[1])
        return t.flatten(0, 1).index_select(0, index).view(*self.index.shape, -1)

    def add(self, total: Tensor, chosen: Tensor, value: Tensor) -> None:
        total.view(-1, total.shape[-1]).index_add_(0, self._flat(chosen, total.shape[1]), value.flatten(0, 1))

    def cover(self, scores: Tensor) -> Tensor:
        return scores.masked_fill_(~self.exists[:, None, None], -torch.inf)

    def additive(self, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """As of a `Tile`, of each head: `[1, G, R * m, n]`, and `[G, 1, 1]`."""
        if self.exists.all():
            return None, None
        mask = query.new_zeros(self.exists.shape).masked_fill_(~self.exists, -torch.inf)
        rows = query.shape[1] * query.shape[2]
        return mask[None, :, None].expand(-1, -1, rows, -1), self.exists.any(-1)[:, None, None]


AnyTile = Tile | JoinedTile


@dataclass(frozen=True)
class Share:
    """One batch row and the heads that share a part of the plan's table."""

    b: int
    p: int  # the pattern of these heads
    heads: Tensor  # [G, R] int64: the query heads, those of one key head in a row
    chosen: Tensor | None  # [G] int64: the key heads if the part has only some of the heads, each with R = 1
    done: frozenset[int] = frozenset()  # query blocks that another part computes

    def queries(self, t: Tensor) -> Tensor:
        """The part's share of `[B, H, Q, ...]` as `[G, R, Q, ...]`."""
        t = t[self.b]
        return (t if self.chosen is None else t[neighbours(self.heads.flatten())]).unflatten(0, self.heads.shape)

    def keys(self, t: Tensor) -> Tensor:
        """The part's share of `[B, G, K, D]` as `[G, K, D]`."""
        return t[self.b] if self.chosen is None else t[self.b][neighbours(self.chosen)]

    def put(self, total: Tensor, rows: slice, value: Tensor) -> None:
        """Write `value` `[G, R, m, ...]` into `total` `[B, H, Q, ...]`."""
        heads = slice(None) if self.chosen is None else neighbours(self.heads.flatten())
        total[self.b][heads, rows] = value.flatten(0, 1).to(total.dtype)

    def rows(self, pieces: tuple[Piece, ...]) -> Iterator[tuple[slice, Iterator[Tile]]]:
        """Each query block that sees anything: its queries, its tiles."""
        for i in range(pieces[0].q_blocks):
            runs = [(number, run) for number, piece in enumerate(pieces) for run in self._runs(piece, i)]
            if runs and i not in self.done:
                rows = slice(*pieces[0].block_range(i, i, pieces[0].q_len))
                yield rows, (tile for number, run in runs for tile in self._tiles(pieces[number], number, rows, run))

    def _runs(self, piece: Piece, i: int) -> list[Run]:
        return piece.runs[(self.row(piece) * len(piece.patterns) + self.p) * piece.q_blocks + i]

    def row(self, piece: Piece) -> int:
        """`b` in a table, which may hold one row for all."""
        return self.b if piece.batch_rows > 1 else 0

    def _tiles(self, piece: Piece, number: int, rows: slice, run: Run) -> Iterator[Tile]:
        """Cut a run into tiles of at most MAX_KEYS keys and evaluate its partial blocks."""
        q_range = rows.start, rows.stop
        step = max(1, MAX_KEYS // piece.block_size)
        for first in range(run.first, run.last + 1, step):
            last = min(first + step - 1, run.last)
            k0, k1 = piece.block_range(first, last, piece.kv_len)
            masks = []
            for a, z in run.partial:
                if a <= last and z >= first:
                    blocks = max(a, first), min(z, last)
                    c0, c1 = piece.block_range(*blocks, piece.kv_len)
                    masks.append((c0 - k0, c1 - k0, self._mask(piece, q_range, blocks, (c0, c1))))
            if len(masks) == 1 and masks[0][1] - masks[0][0] == k1 - k0:
                yield from _trimmed(number, k0, masks[0][2])
            else:
                yield Tile(number, 0, q_range[1] - q_range[0], k0, k1, tuple(masks))

    def _mask(
        self, piece: Piece, q_range: tuple[int, int], blocks: tuple[int, int], k_range: tuple[int, int]
    ) -> Tensor:
        """`[m, n]` bool of neighbouring partial blocks of a query block; edges of a pattern look alike all along a text."""
        row = self.row(piece)
        if isinstance(piece, Gathered):
            return piece.mask(row, self.p, q_range, k_range)
        known, kept = examples(piece), _masks(piece)
        line = (row * len(piece.patterns) + self.p) * piece.q_blocks + q_range[0] // piece.block_size
        # blocks that hang over the last query or key are examples of their own
        key = tuple(known[line, j] for j in range(blocks[0], blocks[1] + 1))
        if key not in kept:
            if len(kept) >= MASKS:
                kept.clear()
            kept[key] = piece.mask(row, self.p, q_range, k_range)
        return kept[key]

    def places(self, piece: Piece, rows: slice, tile: Tile) -> tuple[Tensor, Tensor]:
        """Indices of a tile's queries, counted from the plan's first, and of its keys."""
        row = self.row(piece)
        q = piece.query_index(row, rows.start + tile.q0, rows.start + tile.q1)
        return q, piece.key_index(row, tile.k0, tile.k1)


@dataclass(frozen=True, kw_only=True)
class JoinedShare(Share):
    """Heads with patterns of their own that compute some query blocks together."""

    blocks: dict[int, Tensor]  # query block -> key blocks [G, L], -1 beyond their number

    def keys(self, t: Tensor) -> Tensor:
        # tiles take whole keys from it, which must lie side by side
        return super().keys(t).contiguous()

    def rows(self, pieces: tuple[Piece, ...]) -> Iterator[tuple[slice, Iterator[JoinedTile]]]:
        (plan,) = pieces
        within = torch.arange(plan.block_size, device=plan.device)
        for i, blocks in self.blocks.items():
            rows = slice(*plan.block_range(i, i, plan.q_len))
            index = (blocks[..., None] * plan.block_size + within).flatten(1)
            exists = (index >= 0) & (index < plan.kv_len)
            yield rows, iter((JoinedTile(rows.stop - rows.start, index.where(exists, 0), exists),))

    def places(self, piece: Piece, rows: slice, tile: JoinedTile) -> tuple[Tensor, Tensor]:
        return piece.query_index(self.row(piece), rows.start, rows.stop), tile.index[:, None, None]


@remembered
def _masks(plan: BlockPlan) -> dict[tuple[int, ...], Tensor]:
    return {}


def neighbours(index: Tensor) -> slice | Tensor:
    """A slice, which copies nothing, if the indices are consecutive."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if torch.equal(index, torch.arange(first, last + 1, device=index.device)) else index


def shares(plan: BlockPlan, pieces: tuple[Piece, ...], q: Tensor, groups: int, scoring: Scoring) -> Iterator[Share]:
    """The shares of a call; with patterns per head, those query blocks first that all heads compute together."""
    batch, num_heads = q.shape[:2]
    everything = torch.arange(num_heads, device=q.device)
    # a bias is read off as slices
    alone = pieces[0] if plan.heads and len(pieces) == 1 and scoring.bias is None else None
    joined = joined_rows(alone) if isinstance(alone, BlockPlan) else None
    for b in range(batch):
        blocks = {} if joined is None else joined[b if len(joined) > 1 else 0]
        if blocks:
            yield JoinedShare(b, 0, everything[:, None], everything // (num_heads // groups), blocks=blocks)
        for p in range(len(plan.patterns)):
            if plan.heads:
                heads = everything[[h for h, pattern in enumerate(plan.heads) if pattern == p]]
                yield Share(b, p, heads[:, None], heads // (num_heads // groups), frozenset(blocks))
            else:
                yield Share(b, p, everything.view(groups, -1), None)


def _trimmed(number: int, k0: int, mask: Tensor) -> Iterator[Tile]:
    """The smallest rectangle around what a partial tile holds: a few sinks do not cost whole blocks."""
    rows, columns = (mask.any(dim).nonzero() for dim in (1, 0))
    if len(rows):
        q0, q1, first, last = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        yield Tile(number, q0, q1, k0 + first, k0 + last, ((0, last - first, mask[q0:q1, first:last]),))


def keys_index(piece: Piece) -> Tensor | None:
    """The keys that a piece speaks of, `[B or 1, M]`; None: all."""
    return None if isinstance(piece, BlockPlan) else piece.keys


def keys_of(piece: Piece, t: Tensor) -> Tensor:
    """The keys of `[B, G, K, D]` that a piece speaks of."""
    index = keys_index(piece)
    return t if index is None else take(t, index)


def take(t: Tensor, index: Tensor) -> Tensor:
    """`[B, H, M, ...]` of `[B, H, L, ...]` at `index` `[B or 1, M]`, anything where it is -1."""
    index = index.clamp(min=0).view(*index.shape[:1], 1, index.shape[1], *[1] * (t.ndim - 3))
    return t.gather(2, index.expand(*t.shape[:2], index.shape[2], *t.shape[3:]))


def put_at(total: Tensor, index: Tensor, value: Tensor, add: bool = False) -> None:
    """Write or add what belongs to `take(total, index)`."""
    b, m = (index >= 0).expand(len(total), -1).nonzero(as_tuple=True)
    at = index.expand(len(total), -1)[b, m]
    value = value[b, :, m].to(total.dtype)
    # no index stands twice
    total[b, :, at] = total[b, :, at] + value if add else value


@dataclass(frozen=True)
class Change:
    """What soft cap and bias do to the scores of a tile of the query block `rows`."""

    scoring: Scoring
    plan: BlockPlan
    share: Share
    piece: Piece
    rows: slice
    tile: Tile

    @property
    def _place(self) -> tuple[int, int, int]:
        """First query and first key of the tile, and the plan's last query, in key coordinates."""
        offset = self.plan.q_offset
        return self.rows.start + self.tile.q0 + offset, self.tile.k0, offset + self.plan.q_len - 1

    @property
    def _index(self) -> Tensor:
        """`[m, n]`: where the bias has the pairs of gathered tokens; those beyond their number count nothing."""
        q, k = self.share.places(self.piece, self.rows, self.tile)
        assert self.scoring.bias is not None
        return (k - q[:, None] + self.plan.q_len - 1).clamp(0, self.scoring.bias.shape[1] - 1)

    def _bias(self, scores: Tensor) -> Tensor:
        heads = self.share.heads
        if isinstance(self.piece, Gathered):
            return self.scoring.tile_at(heads, self._index).to(scores.dtype)
        q, k, last = self._place
        return self.scoring.tile(heads, q, scores.shape[-2], k, scores.shape[-1], last).to(scores.dtype)

    def apply(self, scores: Tensor) -> Tensor:
        """Change `scores` `[G, R, m, n]` in place."""
        cap = self.scoring.softcap
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        if self.scoring.bias is not None:
            scores.add_(self._bias(scores))
        return scores

    def slope(self, scores: Tensor) -> Tensor | None:
        """d changed score / d score, given the changed ones before they are masked; None for 1 everywhere."""
        cap = self.scoring.softcap
        if cap is None:
            return None
        if self.scoring.bias is not None:
            scores = scores - self._bias(scores)
        return 1 - (scores / cap).square()

    def drop(self, dropout: Dropout) -> Tensor:
        """What dropout multiplies the weights of the tile by, `[G, R, m, n]`: 0 or 1 / (1 - p)."""
        assert dropout.seed is not None
        q, k = self.share.places(self.piece, self.rows, self.tile)
        b = torch.tensor(self.share.b, device=q.device)
        kept = kept_at(dropout.seed.to(q.device), b, self.share.heads[..., None, None], q[:, None], k, dropout.p)
        # a quotient of no floating tensor would have torch's default dtype
        return kept.float() / (1 - dropout.p)

    def add_gradient(self, total: Tensor | None, grad: Tensor) -> None:
        if total is None:
            return
        if isinstance(self.piece, Gathered):
            self.scoring.add_gradient_at(total, self.share.heads, grad, self._index)
        else:
            self.scoring.add_gradient(total, self.share.heads, grad, *self._place)
