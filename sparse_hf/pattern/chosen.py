"""Patterns that choose the best keys of each query by score, at run time (`attention/composite/chosen.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from .base import whole
from .content import Content

KEY_SCORES, BLOCK_SCORES = ("dot", "indexer"), ("mean", "bounds", "antidiagonal")
# who chooses blocks: each query head, or those of a key head together
CHOOSERS = ("head", "group")
# sides of the squares whose antidiagonals are summed
ANTIDIAGONAL = 16
# what sides of tiles are a multiple of, and more keys than any text has
TILE_STEP, EVERY_KEY = 16, 1 << 30


@dataclass(frozen=True)
class TopK(Content):
    """The `count` keys that score highest for the query, of those that the rest of the pattern does not hold.

    Each query of each head chooses for itself, within whatever causality, padding, documents and `&` allow: `window(127, 0) |
    first(4) | topk(2048)`. What it sees of its past depends on its past alone, so that decoding with a cache is exact. Of equal
    scores the earlier key is taken. A query with fewer keys to choose from gets them all.

    `scores` says what a key is worth:

    - "dot": the product with the query.
    - "indexer": what a small module that each such layer of a model gets has learned (DeepSeek-V3.2, arXiv:2512.02556); all
      heads share the choice.

    All keys are scored, in pieces: time grows with the square of the length, at the price of a product, and memory by `count`
    for each query. Choices have no gradient; what is attended to has.

    Examples:
        >>> str(TopK(2048)), TopK(2048).most_keys
        ('topk(2048)', 2048)
    """

    count: int
    scores: str = "dot"
    word = "topk"

    def __post_init__(self):
        whole(f"{self.word}: count", self.count, 1)
        _known(self.word, "scores", self.scores, KEY_SCORES)

    def __str__(self) -> str:
        return super().__str__() if self.scores != KEY_SCORES[0] else f"{self.word}({self.count})"

    @property
    def uses_indexer(self) -> bool:
        return self.scores == "indexer"

    @property
    def most_keys(self) -> int:
        return self.count

    def least_chosen(self, length: int) -> int:
        return self.count


@dataclass(frozen=True)
class TopKBlocks(Content):
    """The `count` blocks of `size` keys that score highest for the query, one of which is the query's own block.

    Blocks are counted from the first token of a sequence. Each query of each head chooses among blocks that the rest of the
    pattern does not hold in full; a causal model chooses among those that end before the query's block. Of equal scores the
    earlier block is taken.

    `scores` says what a block is worth:

    - "mean": the product with the mean of its keys (MoBA, arXiv:2502.13189).
    - "bounds": the largest product that a key within the smallest and largest number of each dimension could have (Quest,
      arXiv:2406.10774), which is never below the product of any of its keys.
    - "antidiagonal": queries and keys are cut into squares of 16 x 16 pairs, of which the products on the antidiagonal are summed
      and averaged (XAttention, arXiv:2503.16428). Each row of squares has one softmax over the blocks to choose from; a block has
      the sum of the weights in it. It is for groups of queries.

    With `queries` above 1, so many neighbouring queries, counted from the first token of a sequence, choose together: a block has
    the mean of their scores, those are chosen from that are over before the first of them, and the blocks that they stand in are
    among the `count`. It is far faster on a GPU. What a query sees then depends on the queries of its group up to its end; a token
    that is decoded alone chooses for itself.

    `per` says who chooses: each query "head", or the "group" of those that share a key head, by the mean of their scores (NSA,
    arXiv:2502.11089), so that a key that is read serves all of them.

    Examples:
        >>> TopKBlocks(count=8, size=64).most_keys
        512
        >>> str(TopKBlocks(16, 128, "bounds", queries=128))
        "topk_blocks(16, 128, 'bounds', 128)"
        >>> str(TopKBlocks(16, 64, per="group"))
        "topk_blocks(16, 64, 'mean', 1, 'group')"
    """

    count: int
    size: int
    scores: str = "mean"
    queries: int = 1
    per: str = CHOOSERS[0]
    word = "topk_blocks"

    def __post_init__(self):
        for name in ("count", "size", "queries"):
            whole(f"{self.word}: {name}", getattr(self, name), 1)
        if self.size % self.queries and self.queries % self.size:
            raise ValueError(
                f"{self.word}: {self.queries} queries choose blocks of {self.size} keys together; one must be a multiple of the other"
            )
        _known(self.word, "scores", self.scores, BLOCK_SCORES)
        _known(self.word, "per", self.per, CHOOSERS)
        if self.scores == "antidiagonal" and (self.size % ANTIDIAGONAL or self.queries % ANTIDIAGONAL):
            raise ValueError(
                f"{self.word}: blocks of {self.size} keys and groups of {self.queries} queries; for antidiagonals both are multiples of "
                f"{ANTIDIAGONAL}"
            )

    def _arguments(self) -> list[str]:
        # as texts had it before groups of heads could choose
        return super()._arguments()[: 4 if self.per == CHOOSERS[0] else 5]

    @property
    def shares_heads(self) -> bool:
        return self.per == "group"

    @property
    def own_blocks(self) -> int:
        """How many blocks the queries of a group reach into."""
        return max(1, self.queries // self.size)

    @property
    def most_keys(self) -> int:
        return max(self.count, self.own_blocks) * self.size

    def least_chosen(self, length: int) -> int:
        # what the rest of a pattern holds of a block counts, too
        return length if self.count * self.size >= length else 0


@dataclass(frozen=True)
class VerticalSlash(Content):
    """The keys that stand in the `columns` and on the `diagonals` which the last queries of a text weigh most (MInference,
    arXiv:2407.02490).

    The attention of the last `queries` of each sequence in a call is computed; a column is worth the sum of their weights on a
    key, a diagonal the sum of those at one distance. Each query of each head then sees the best columns and the best distances of
    its own past, of what the rest of the pattern does not hold. Of equal ones the earlier key is taken. It is for reading prompts:
    what a query sees depends on the queries at the end, and a token that is decoded alone goes by its own weights.

    Examples:
        >>> VerticalSlash(columns=1000, diagonals=200).most_keys
        1200
    """

    columns: int
    diagonals: int
    queries: int = 64
    word = "vertical_slash"

    def __post_init__(self):
        for name in ("columns", "diagonals", "queries"):
            whole(f"{self.word}: {name}", getattr(self, name), 1)

    @property
    def most_keys(self) -> int:
        return self.columns + self.diagonals

    def least_chosen(self, length: int) -> int:
        return self.columns


@dataclass(frozen=True)
class Threshold(Content):
    """Tiles of `queries` x `size` pairs, without those that cannot matter: a tile is kept if one of its keys has at least `share`
    of the weight that some query of the tile gives to its heaviest key (BLASST, arXiv:2512.12087).

    The heaviest key is that of all which the pattern could hold, wherever it stands: a tile is judged by the final maximum of the
    softmax, not by the one so far, so that the choice depends on no order in which a kernel goes over keys. Tiles are counted
    from the first token of a sequence. Weights that are left out are told: `sparse_hf.mass_left_out`.

    With `queries` 1 each query judges blocks of keys for itself, and decoding with a cache is exact. With more, what a query sees
    depends on the queries of its tile, up to its end; a token that is decoded alone judges for itself.

    Examples:
        >>> str(Threshold(0.001))
        'threshold(0.001, 64, 64)'
    """

    share: float
    size: int = 64
    queries: int = 64
    word = "threshold"
    fraction_fields = ("share",)

    def __post_init__(self):
        if isinstance(self.share, bool) or not isinstance(self.share, Real) or not 0 < self.share <= 1:
            raise ValueError(f"{self.word}: share is {self.share!r}; it must be a number above 0, and 1 at most")
        if not isinstance(self.share, int):
            # numbers of other libraries are written in their own way
            object.__setattr__(self, "share", float(self.share))
        for name in ("size", "queries"):
            whole(f"{self.word}: {name}", getattr(self, name), 1)
        if self.size % TILE_STEP:
            raise ValueError(f"{self.word}: size is {self.size}; it must be a multiple of {TILE_STEP}")

    @property
    def most_keys(self) -> int:
        return EVERY_KEY


def _known(word: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{word}: {name} is {value!r}; the known ones are {', '.join(map(repr, known))}")
