"""The pairs of `lsh(...)`, from queries and keys.

Legend: B batch, H query heads, G key heads (G divides H), X = B * H, Y = B * G, R rounds, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pattern import LSH, Pattern, Window
from ..pattern.base import Intersection
from .block_plan import BlockPlan
from .hash_order import HashedPlan, TileSet, hash_vectors

# queries and keys of a tile
TILE = 64
# does it hold the pair of query q and key k of row x?
Held = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Buckets:
    """Where queries and keys stand when they are sorted by bucket, then by position.

    In round r query q sees key k if `low[r, q] <= rank[r, k] < high[r, q]`.
    """

    rank: Tensor  # [Y, R, K] int64: the place of each key in the hash order
    order: Tensor  # [Y, R, K] int64: the key at each place
    q_order: Tensor  # [X, R, Q] int64: the query at each place of their own order
    low: Tensor  # [X, R, Q] int64
    high: Tensor  # [X, R, Q] int64

    def holds(self, r: int, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Does round r hold pairs of tokens that broadcast?"""
        place = self.rank[x // (self.low.shape[0] // self.rank.shape[0]), r, k]
        return (place >= self.low[x, r, q]) & (place < self.high[x, r, q])


def sort_buckets(q: Tensor, k: Tensor, lsh: LSH, plan: BlockPlan, is_causal: bool) -> Buckets:
    """Hash queries `[B, H, Q, D]` and keys `[B, G, K, D]`, and find what each query sees in each round.

    `plan` is of any pattern of positions: it tells where sequences start and end, and what is padding.
    """
    start, end, real = sequence_bounds(plan, k.shape[0], k.device)
    # autocast would hash by rounded products
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        q_bucket, k_bucket = _hash(q.float(), k.float(), lsh, start)
    keys = k.shape[2]
    index = torch.arange(keys, device=k.device)
    own = slice(plan.q_offset, plan.q_offset + q.shape[2])
    # a bucket's keys in the order of their places: one number says both; padding stands behind all
    code = (k_bucket * keys + index).masked_fill(~real[:, None, None], torch.iinfo(torch.int64).max)
    ordered, order = code.flatten(0, 1).sort(dim=-1)  # [Y, R, K]
    base = q_bucket * keys  # [B, H, R, Q]

    def place(token: Tensor, right: bool) -> Tensor:
        # [B, Q] tokens -> how many keys stand before them in each query's bucket, [X, R, Q]
        wanted = (base + token[:, None, None]).unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # [B, G, R, H / G, Q]
        found = torch.searchsorted(ordered, wanted.flatten(3).flatten(0, 1).contiguous(), right=right)
        return found.unflatten(-1, (-1, q.shape[2])).transpose(1, 2).flatten(0, 1)

    begin, middle = place(start[:, own], right=False), place(index[own].expand_as(start[:, own]), right=True)
    low, high = torch.maximum(begin, middle - lsh.size), middle
    if not is_causal:
        high = torch.minimum(place(end[:, own], right=True), middle + lsh.size)
    alive = real[:, own].repeat_interleave(q.shape[1], dim=0)[:, None]
    low, high = low.where(alive, 0), high.where(alive, 0)
    rank = torch.empty_like(order).scatter_(-1, order, index.expand_as(order))
    return Buckets(rank, order, base.flatten(0, 1).sort(dim=-1, stable=True).indices, low, high)


def sequence_bounds(plan: BlockPlan, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the sequence of each token starts and ends, and whether it is real: `[B, K]` each."""
    sequences, shape = plan.sequences, (batch, plan.kv_len)
    real = sequences.real
    real = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real.expand(shape)
    if sequences.start is None or sequences.end is None:
        start = torch.zeros(shape, dtype=torch.int64, device=device)
        return start, start + plan.kv_len - 1, real
    start, end = (t.long().expand(shape) for t in (sequences.start, sequences.end))
    return start.clamp(min=0), end, real & (start >= 0)


def _hash(q: Tensor, k: Tensor, lsh: LSH, start: Tensor) -> tuple[Tensor, Tensor]:
    """Buckets `[B, H, R, Q]` and `[B, G, R, K]`; the query heads of a key head share its directions."""
    length = k.square().sum(-1)  # [B, G, K]
    longest = _longest_so_far(length, start).clamp(min=torch.finfo(k.dtype).tiny)
    rest = (1 - length / longest).clamp(min=0).sqrt()
    keys = torch.cat([k / longest.sqrt()[..., None], rest[..., None]], dim=-1)
    queries = torch.nn.functional.pad(q, (0, 1))
    factors = (lsh.buckets,) if isinstance(lsh.buckets, int) else lsh.buckets
    # made on the CPU, so that every device has the same
    generator = torch.Generator("cpu").manual_seed(lsh.seed)
    shape = k.shape[1], keys.shape[-1], lsh.rounds, sum(factors) // 2
    rotations = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(k)
    repeated = rotations.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    return hash_vectors(queries, repeated, lsh.buckets), hash_vectors(keys, rotations, lsh.buckets)


def _longest_so_far(length: Tensor, start: Tensor) -> Tensor:
    """The running maximum of `[B, G, K]` within each sequence."""
    index, step = torch.arange(length.shape[2], device=length.device), 1
    while step < length.shape[2]:
        before = torch.nn.functional.pad(length[..., :-step], (step, 0))
        length = torch.where((index - step >= start)[:, None], torch.maximum(length, before), length)
        step *= 2
    return length


def hashed_plan(
    q: Tensor, k: Tensor, hashes: Sequence[tuple[LSH, Pattern | None]], positions: BlockPlan
) -> tuple[HashedPlan, Held]:
    """The pairs of hashes, cut to patterns of positions, that `positions` does not hold: each pair once.

    Returns:
        the plan, and a function that says of rows of queries and of tokens whether it holds a pair.
    """
    heads = q.shape[1]
    held: list[Held] = [lambda x, q, k: positions.allows(x // heads, 0, q, k)]
    tile_sets: list[TileSet] = []
    q_index: list[Tensor] = []
    k_index: list[Tensor] = []
    for lsh, cut in hashes:
        within = None if cut is None else replace(positions, patterns=(cut,))
        buckets = sort_buckets(q, k, lsh, positions, leaves_out_future(cut))
        for r in range(lsh.rounds):
            holds = _within(buckets, r, within, heads)
            allows = _first_time(holds, tuple(held))
            tiles = sum(t.shape[-1] for t in q_index) // TILE, sum(t.shape[-1] for t in k_index) // TILE
            q_index.append(_padded(buckets.q_order[:, r]))
            k_index.append(_padded(buckets.order[:, r]))
            tile_sets += [TileSet(*found, allows) for found in _tiles(buckets, r, q_index[-1], *tiles)]
            held.append(holds)
    plan = HashedPlan(TILE, torch.cat(q_index, 1), torch.cat(k_index, 1), lambda: tuple(tile_sets), heads=heads)
    return plan, lambda x, q, k: torch.stack([one(x, q, k) for one in held[1:]]).any(0)


def leaves_out_future(cut: Pattern | None) -> bool:
    """Does a cut surely leave out the future? Then no key of it has to be found."""
    parts = cut.parts if isinstance(cut, Intersection) else (cut,)
    # a subclass of a window may hold other pairs
    return any(type(part) is Window and part.right == 0 for part in parts)


def _within(buckets: Buckets, r: int, within: BlockPlan | None, heads: int) -> Held:
    def holds(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = buckets.holds(r, x, q, k)
        return found if within is None else found & within.allows(x // heads, 0, q, k)

    return holds


def _first_time(holds: Held, before: tuple[Held, ...]) -> Held:
    def allows(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = holds(x, q, k)
        for other in before:
            found = found & ~other(x, q, k)
        return found

    return allows


def _padded(order: Tensor) -> Tensor:
    return torch.nn.functional.pad(order, (0, -order.shape[-1] % TILE), value=-1)


def _tiles(
    buckets: Buckets, r: int, places: Tensor, q_tiles: int, k_tiles: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tiles of queries with the tiles of keys between their lowest and highest, those with about as many together."""
    tokens = places.unflatten(1, (-1, TILE))  # [X, tiles, m]
    low, high = (t[:, r].gather(1, places.clamp(min=0)).view_as(tokens) for t in (buckets.low, buckets.high))
    sees = (tokens >= 0) & (low < high)
    first = low.masked_fill(~sees, torch.iinfo(torch.int64).max).amin(-1) // TILE
    last = (high.masked_fill(~sees, 0).amax(-1) - 1) // TILE
    x, i = sees.any(-1).nonzero(as_tuple=True)
    first, count = first[x, i], last[x, i] - first[x, i] + 1
    most, least = int(count.max()) if len(count) else 0, 0
    width = 1
    while least < most:
        chosen = (count > least) & (count <= width)
        if chosen.any():
            step = torch.arange(width, device=x.device)
            columns = torch.where(step < count[chosen, None], first[chosen, None] + step + k_tiles, -1)
            yield x[chosen], i[chosen] + q_tiles, columns
        least, width = width, 2 * width
