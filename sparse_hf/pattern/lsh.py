"""Patterns whose pairs are chosen by locality-sensitive hashing of queries and keys (`plan/lsh.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import whole
from .content import Content


def _buckets(word: str, buckets) -> int | tuple[int, ...] | None:
    """`buckets` as a value that can be compared: an even number, or even factors of one."""
    if buckets is None:
        return None
    factors = tuple(buckets) if isinstance(buckets, (tuple, list)) else (buckets,)
    for factor in factors:
        if whole(f"{word}: buckets", factor, 2) % 2:
            raise ValueError(
                f"{word}: buckets is {buckets!r}; each hash has a bucket for both signs, so it must be even"
            )
    return factors if isinstance(buckets, (tuple, list)) else factors[0]


@dataclass(frozen=True)
class LSHChunks(Content):
    """Reformer's hashed attention (Kitaev et al., arXiv:2001.04451, section 2), as Transformers computes it.

    In each of `rounds`, tokens are sorted by the bucket of their shared query and key, and by position within it; a token
    sees its chunk of `size` places in this order, the `left` chunks before it and the `right` ones after it. The chunks
    of all rounds stand in one ring. A token sees itself only where it sees nothing else, and a key that it meets in
    several rounds counts that often. So this is no set of pairs: layers of sparse_reformer have it by itself, and
    `lsh(...)` is the pattern for other models.

    `buckets` is an even number, its factors, or None: about two buckets per chunk of the text. `seed` None draws new
    rotations in every pass.

    Examples:
        >>> LSHChunks(size=64, rounds=2).most_keys
        256
    """

    size: int
    left: int = 1
    right: int = 0
    rounds: int = 1
    buckets: int | tuple[int, ...] | None = None
    seed: int | None = None
    word = "lsh_chunks"

    @property
    def most_keys(self) -> int:
        return self.rounds * self.size * (self.left + 1 + self.right)

    def __post_init__(self):
        for name, least in (("size", 1), ("left", 0), ("right", 0), ("rounds", 1)):
            whole(f"{self.word}: {name}", getattr(self, name), least)
        if self.seed is not None:
            whole(f"{self.word}: seed", self.seed, 0)
        object.__setattr__(self, "buckets", _buckets(self.word, self.buckets))


@dataclass(frozen=True)
class LSH(Content):
    """Keys that hash like the query: in each of `rounds`, the `size` nearest of its bucket on either side of its position.

    A pair is there or not, however many rounds find it, so that `|` and `&` mean what they mean elsewhere:
    `window(128, 0) | lsh(64, 2)`. What a query sees of its past depends on its past alone, so that a longer text, padding
    and documents beside it change nothing, and decoding with a cache is exact.

    Queries and keys differ in most models, and are hashed asymmetrically, for the largest inner products (Shrivastava and
    Li, arXiv:1405.5869; Neyshabur and Srebro, arXiv:1410.5518): a key k becomes `[k / M, sqrt(1 - |k|^2 / M^2)]`, a query
    q `[q, 0]`, where M is the length of the longest key of its sequence so far. What that loses against Reformer's
    shared queries and keys: two tokens that are alike need not share a bucket, and directions of large inner product are
    found by chance only, more surely with more rounds and fewer buckets; a model trained densely was not told to make up
    for it.

    `buckets` is an even number or its even factors, and `seed` fixes the random directions.

    Examples:
        >>> str(LSH(size=64, rounds=2, buckets=32))
        'lsh(32, 2, 64, 0)'

    """

    buckets: int | tuple[int, ...]
    rounds: int = 1
    size: int = 64
    seed: int = 0
    word = "lsh"

    def __post_init__(self):
        if self.buckets is None:
            raise ValueError("lsh: buckets is None; give their number, like one for every 64 tokens of a text")
        object.__setattr__(self, "buckets", _buckets(self.word, self.buckets))
        for name, least in (("rounds", 1), ("size", 1), ("seed", 0)):
            whole(f"{self.word}: {name}", getattr(self, name), least)

    @property
    def most_keys(self) -> int:
        return 2 * self.rounds * self.size
