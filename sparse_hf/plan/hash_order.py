"""Plans of pairs that are chosen from queries and keys: tiles in the order of hash buckets.

Legend: B batch, H heads, X = B * H rows, R rounds, N tokens, m places of a tile, C tiles of a round, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from .cache import kept

# numbers that hashing makes at once, on a CPU and elsewhere: with many buckets it would make tokens x buckets of them
HASH_NUMBERS_ON_CPU, HASH_NUMBERS_ON_GPU = 1 << 22, 1 << 26


@dataclass(frozen=True, eq=False)
class TileSet:
    """Tiles of queries of which none holds a query twice, and the tiles of keys that each sees."""

    x: Tensor  # [T] int64: the row
    i: Tensor  # [T] int64: the tile of queries
    columns: Tensor  # [T, w] int64: tiles of keys, -1 for none; one that stands there twice counts twice
    # may query q of row x see key k? Tokens, not places, that broadcast
    allows: Callable[[Tensor, Tensor, Tensor], Tensor]

    def split(self, size: int) -> Iterator[TileSet]:
        """The same tiles, at most `size` at a time."""
        for x, i, columns in zip(self.x.split(size), self.i.split(size), self.columns.split(size), strict=True):
            yield TileSet(x, i, columns, self.allows)


@dataclass(frozen=True)
class Chunks:
    """What a plan of chunks is made of, for kernels that know chunks only.

    Every chunk of queries sees `left` chunks of keys before its own and `right` after it, in a ring of `tiles` to a round. Where
    `alike` is false, padding gives rows other numbers of chunks.
    """

    rounds: int
    tiles: int
    left: int
    right: int
    is_causal: bool
    sees_itself: bool
    alike: bool

    @property
    def ring(self) -> tuple[int, int, int, int]:
        return self.rounds, self.tiles, self.left, self.right


@dataclass(frozen=True, eq=False)
class HashedPlan:
    """Which tiles meet, and which token stands at which place of them: O(N) tables, never O(N^2).

    X rows of queries, Y of keys, where Y divides X: query row x reads key row `x // (X / Y)`.
    """

    size: int  # m
    q_index: Tensor  # [X, tiles * m] int64: the token at each place, -1 for none
    k_index: Tensor  # [Y, tiles * m]
    list_tiles: Callable[[], tuple[TileSet, ...]]  # not called where a kernel knows them by `chunks`
    # H where no query meets a key twice, so that the pair is known by its tokens; None where it may
    heads: int | None = None
    chunks: Chunks | None = None

    @kept
    def tile_sets(self) -> tuple[TileSet, ...]:
        return self.list_tiles()

    @property
    def device(self) -> torch.device:
        return self.q_index.device

    @property
    def repeats(self) -> int:
        """Query rows per key row."""
        return self.q_index.shape[0] // self.k_index.shape[0]

    def queries(self, tiles: TileSet) -> Tensor:
        """The tokens of a set's tiles, `[T, m]`, -1 for none."""
        return self.q_index.unflatten(1, (-1, self.size))[tiles.x, tiles.i]

    def keys(self, tiles: TileSet) -> Tensor:
        """The tokens that each tile sees, `[T, w * m]`, -1 for none."""
        found = self.k_index.unflatten(1, (-1, self.size))[
            (tiles.x // self.repeats)[:, None], tiles.columns.clamp(min=0)
        ]
        return torch.where(tiles.columns[..., None] >= 0, found, -1).flatten(1)

    def counts(self, q_len: int, kv_len: int) -> Tensor:
        """How often each query meets each key, `[X, Q, K]`. O(N^2): for the reference and for tests."""
        rows = self.q_index.shape[0]
        total = torch.zeros(rows * q_len * kv_len, dtype=torch.int64, device=self.device)
        for tiles in self.tile_sets:
            x, q, k = tiles.x[:, None, None], self.queries(tiles)[:, :, None], self.keys(tiles)[:, None, :]
            held = (q >= 0) & (k >= 0) & tiles.allows(x, q.clamp(min=0), k.clamp(min=0))
            pair = ((x * q_len + q) * kv_len + k).expand_as(held)[held]
            total.index_add_(0, pair, torch.ones_like(pair))
        return total.view(rows, q_len, kv_len)


def hash_vectors(vectors: Tensor, rotations: Tensor, buckets: int | tuple[int, ...]) -> Tensor:
    """The bucket of each vector: the direction to which it is closest, of random ones and their opposites.

    Args:
        vectors: `[B, H, N, D]`.
        rotations: `[H, D, R, S / 2]`, where S is the number of buckets, or the sum of its factors.
        buckets: their number, or factors of it: a bucket is then one bucket of each factor (arXiv:2001.04451, section 2;
            Andoni et al., arXiv:1509.02897).

    Returns:
        `[B, H, R, N]` int64, without gradient.
    """
    vectors = vectors.detach()
    factors = (buckets,) if isinstance(buckets, int) else tuple(buckets)
    per_token = vectors.shape[0] * rotations.shape[0] * rotations.shape[2] * 2 * rotations.shape[3]
    if torch.compiler.is_compiling():
        return _hash(vectors, rotations, factors)
    at_once = HASH_NUMBERS_ON_CPU if vectors.device.type == "cpu" else HASH_NUMBERS_ON_GPU
    some = vectors.split(max(1, at_once // per_token), dim=2)
    return torch.cat([_hash(of_some, rotations, factors) for of_some in some], dim=-1)


def _hash(vectors: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    rotated = torch.einsum("bhnd,hdrs->bhrns", vectors, rotations)
    found, product = None, 1
    for factor, own in zip(factors, rotated.split([f // 2 for f in factors], dim=-1), strict=True):
        bucket = product * torch.cat([own, -own], dim=-1).argmax(-1)
        found = bucket if found is None else found + bucket
        product *= factor
    assert found is not None
    return found


@dataclass(frozen=True)
class Chunking:
    """How tokens in hash order, or in that of their positions, fall into chunks.

    `multiple` and `least` are those of Transformers: a text of more than `least` tokens is padded to a multiple of
    `multiple`, which is one of `size`.
    """

    size: int
    left: int
    right: int
    multiple: int
    least: int

    @overload
    def tiles(self, length: int) -> int: ...
    @overload
    def tiles(self, length: Tensor) -> Tensor: ...
    def tiles(self, length: int | Tensor) -> int | Tensor:
        """Chunks of a text of `length` tokens: a number for a number, a tensor for a tensor."""
        padded = (length + self.multiple - 1) // self.multiple * self.multiple // self.size
        if isinstance(length, Tensor):
            return torch.where(length <= self.least, 1, padded).clamp(min=1)
        return 1 if length <= self.least else max(1, padded)

    def side(self, length: int) -> int:
        """Tokens of a chunk: a text that is one chunk is no longer than itself."""
        return length if self.tiles(length) == 1 else self.size


def plan_chunks(
    buckets: Tensor | None,
    real: Tensor | None,
    shape: tuple[int, int, int],
    chunking: Chunking,
    *,
    is_causal: bool,
    sees_itself: bool,
    device,
) -> HashedPlan:
    """The plan of `lsh_chunks(...)`, or of `ring(...)` if there are no buckets.

    Args:
        buckets: `[B, H, R, N]`, or None to keep tokens in the order of their positions (one round).
        real: `[B, N]`, true on real tokens. In hash order padding stands behind all buckets. A row that is padded on the
            left has the chunks that it has without that padding; padding on the right counts, as in Transformers.
        shape: B, H, N.
        is_causal: may a query see its past only?
        sees_itself: may a query see itself?
    """
    batch, heads, length = shape
    rounds, tiles = 1 if buckets is None else buckets.shape[2], chunking.tiles(length)
    size = chunking.side(length)
    places = _places(buckets, real, shape, tiles * size, device)
    own = torch.full((batch * heads,), tiles, device=device)
    if real is not None:
        own = chunking.tiles(length - real.int().argmax(1)).repeat_interleave(heads)

    def allows(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if is_causal:
            return q >= k if sees_itself else q > k
        return (q >= 0) & (k >= 0) if sees_itself else q != k

    chunks = Chunks(rounds, tiles, chunking.left, chunking.right, is_causal, sees_itself, alike=real is None)

    def list_tiles() -> tuple[TileSet, ...]:
        return tuple(TileSet(*_drop_empty(found, places, size), allows) for found in ring_tiles(own, *chunks.ring))

    return HashedPlan(size, places, places, list_tiles, chunks=chunks)


def _places(buckets: Tensor | None, real: Tensor | None, shape: tuple[int, int, int], width: int, device) -> Tensor:
    """The token at each of the `width` places of each round, -1 for none: `[X, R * width]`."""
    batch, heads, length = shape
    behind = None if real is None else ~real
    if buckets is None:
        buckets = torch.zeros(1, 1, 1, length, dtype=torch.int32, device=device)
        if real is not None:
            # padding between real tokens keeps its place
            behind = torch.arange(length, device=device) < real.int().argmax(1, keepdim=True)
    if behind is not None:
        buckets = buckets.masked_fill(behind[:, None, None], torch.iinfo(buckets.dtype).max)
    order = buckets.sort(dim=-1, stable=True).indices
    if real is not None:
        order = torch.where(real[:, None, None].expand_as(order).gather(-1, order), order, -1)
    order = order.expand(batch, heads, *order.shape[2:])
    return torch.nn.functional.pad(order, (0, width - length), value=-1).flatten(2).flatten(0, 1)


def ring_tiles(own: Tensor, rounds: int, tiles: int, left: int, right: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The tiles of each round, and their neighbours in the ring of the `own` `[X]` first tiles of all rounds."""
    rows, device = len(own), own.device
    x = torch.arange(rows, device=device).repeat_interleave(tiles)
    c = torch.arange(tiles, device=device).repeat(rows)
    exists = c < own[x]
    x, c = x[exists], c[exists]
    around = (rounds * own[x])[:, None]
    steps = torch.arange(-left, right + 1, device=device)
    # Transformers moves chunks by slices, which move nothing if they are to move by more than there are
    steps = torch.where(steps.abs() <= around, steps, 0)
    for r in range(rounds):
        seen = (r * own[x] + c)[:, None].add(steps) % around
        columns = seen // own[x, None] * tiles + seen % own[x, None]
        yield x, r * tiles + c, columns


def _drop_empty(found: tuple[Tensor, Tensor, Tensor], places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Without the tiles that hold padding only."""
    x, i, columns = found
    holds = (places.unflatten(1, (-1, size)) >= 0).any(-1)[x, i]
    return x[holds], i[holds], columns[holds]
