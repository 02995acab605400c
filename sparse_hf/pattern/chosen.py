"""Patterns that choose the best keys of each query by score, at run time (`attention/composite/chosen.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import whole
from .content import Content

KEY_SCORES, BLOCK_SCORES = ("dot", "indexer"), ("mean", "bounds")


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
        _known(self.word, self.scores, KEY_SCORES)

    def __str__(self) -> str:
        return super().__str__() if self.scores != KEY_SCORES[0] else f"{self.word}({self.count})"

    @property
    def uses_indexer(self) -> bool:
        return self.scores == "indexer"

    @property
    def most_keys(self) -> int:
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

    Examples:
        >>> TopKBlocks(count=8, size=64).most_keys
        512
    """

    count: int
    size: int
    scores: str = "mean"
    word = "topk_blocks"

    def __post_init__(self):
        for name in ("count", "size"):
            whole(f"{self.word}: {name}", getattr(self, name), 1)
        _known(self.word, self.scores, BLOCK_SCORES)

    @property
    def most_keys(self) -> int:
        return self.count * self.size


def _known(word: str, scores: str, known: tuple[str, ...]) -> None:
    if scores not in known:
        raise ValueError(f"{word}: scores is {scores!r}; the known ones are {', '.join(map(repr, known))}")
