"""A layer's pattern in two halves: the rows of all tokens, and the rows of marked ones, which have their own projections."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ...pattern import FULL, First, Marked, MarkedKeys, MarkedQueries, Pattern
from ...pattern.base import Marks
from ...pattern.per_head import PerHead
from ..hf.joined import Asked
from .tokens import Tokens

# the rows of marked tokens that see everything
ALL_KEYS = str(MarkedQueries())
# longer than any text: what holds on a square of this many tokens holds on all
LONGEST_TEXT = 1 << 30


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def halves(text: str) -> tuple[str, str | None]:
    """The pattern of the rows of tokens that are not marked, and of those that are; None in a layer that asks for none."""
    return _cached_halves(text)


@lru_cache(maxsize=256)
def _cached_halves(text: str) -> tuple[str, str | None]:
    both, keys, queries, nothing = (str(p) for p in (Marked(), MarkedKeys(), MarkedQueries(), First(0)))
    if both not in text and queries not in text:
        return text, None
    local = text.replace(both, keys).replace(queries, nothing)
    pattern = Pattern.parse(text)
    if all(_holds_everything(p) for p in pattern.heads or (pattern,)):
        return local, ALL_KEYS
    if pattern.heads:
        return local, str(type(pattern)(*(p & MarkedQueries() for p in pattern.heads)))
    return local, str(pattern & MarkedQueries())


@lru_cache(maxsize=256)
def both_halves(local: str, rows: str | None, heads: int) -> PerHead | None:
    """One pattern for twice the heads, those of all tokens and then those of marked ones; None where there is none such."""
    if rows is None:
        return None
    both = Pattern.parse(local), Pattern.parse(rows)
    if any(half.uses_content for half in both):
        return None
    return PerHead(*(one for half in both for one in half.heads or (half,) * heads))


@dataclass(frozen=True, eq=False)
class AskedOfHalves(Asked):
    """Attention of twice the heads: those of all tokens, and those of marked ones; each token keeps what its half gave.

    Args:
        tokens: what the batch says of its tokens.
    """

    tokens: Tokens = field(kw_only=True)

    def taken(self, out: Tensor) -> Tensor:
        of_all, of_marked = out.chunk(2, dim=2)
        return torch.where(self.tokens.halves(out.dtype)[0], of_marked, of_all)

    def given_back(self, grad: Tensor) -> Tensor:
        # each half has the gradient of its tokens, and 0 of the others
        return (grad[:, :, None] * self.tokens.halves(grad.dtype)[1]).flatten(2)


def _holds_everything(pattern: Pattern) -> bool:
    """Does a marked query see every key?"""
    first, last, all_marked, none_marked = map(torch.tensor, (0, LONGEST_TEXT, 2, 0))
    marks = Marks(all_marked.to(torch.int8), none_marked.to(torch.int8))
    return pattern.blocks(first, last, first, last, marks).item() == FULL
