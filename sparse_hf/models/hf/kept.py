"""What a layer has to keep of a text without end, read off its pattern: the first tokens, the last ones, and some between them.

Legend: a token's position counts from the first of its row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ...pattern import Pattern
from ...pattern.base import Intersection, Union, as_pattern
from ...pattern.complement import Outside
from ...pattern.forms import WindowForm, read_window
from ...pattern.primitives import Chunk, First, Fixed, Marked, MarkedKeys, MarkedQueries, Stride, Summary, Window

# no side of a window is taken for endless, however long the text
ANY_LENGTH = 1 << 62


class Pinned(NamedTuple):
    """Tokens that are kept wherever they stand: marked ones, and the last `count` of each block.

    Attributes:
        marks: does the pattern ask which tokens are marked?
        keys: are marked tokens seen from any distance?
        queries: do marked tokens see all tokens before them?
        summaries: blocks, and the number of their last tokens.
    """

    marks: bool = False
    keys: bool = False
    queries: bool = False
    summaries: tuple[tuple[int, int], ...] = ()

    def holds(self, positions: Tensor, marks: Tensor | None) -> Tensor:
        """Which tokens are kept: bool of the shape of their positions, and of their marks."""
        found = positions < 0 if marks is None or not self.keys else marks
        for block, count in self.summaries:
            found = found | (positions % block >= block - count)
        return found

    def most(self, length: int) -> int:
        """Tokens that are kept of so many, but for marked ones, at most."""
        return sum(-(-length // block) * count for block, count in self.summaries)


class Kept(NamedTuple):
    """A query sees no key but the first `sinks`, the last `left` before itself, and `pinned` ones.

    Where keys between them are left out, a multiple of `period` at a time, the pattern holds the same pairs of those that are left
    as if they were a text of their own. `left` None: every key may be seen again.
    """

    sinks: int
    left: int | None
    period: int = 1
    pinned: Pinned | None = None


@lru_cache(maxsize=256)
def read_kept(text: str) -> Kept | str:
    """What the layer of a causal pattern keeps, or the reason why nobody knows that it could ever drop a key."""
    pattern = as_pattern(text)
    if pattern.uses_content:
        return "its keys are chosen by what they hold"
    found = []
    for head in pattern.heads or (pattern,):
        kept = _of_head(head)
        if isinstance(kept, str):
            return kept
        found.append(kept)
    return joined(found)


def joined(found: Iterable[Kept]) -> Kept:
    """What is enough for all."""
    found = list(found)
    lefts = [one.left for one in found]
    left = None if None in lefts else max(one for one in lefts if one is not None)
    pinned = [one.pinned for one in found if one.pinned is not None]
    summaries = dict.fromkeys(pair for one in pinned for pair in one.summaries)
    flags = any(one.marks for one in pinned), any(one.keys for one in pinned), any(one.queries for one in pinned)
    return Kept(
        max(one.sinks for one in found),
        left,
        math.lcm(*(one.period for one in found)),
        # where one head sees all, there is nothing between
        Pinned(*flags, tuple(summaries)) if pinned and left is not None else None,
    )


def _of_head(pattern: Pattern) -> Kept | str:
    form = read_window(pattern, ANY_LENGTH, of_any_reach=True)
    if isinstance(form, WindowForm) and (not form.marked or form.window is not None and form.window.left is None):
        return _of_window(form)
    parts = list(_parts(pattern))
    unknown = next((part for part in parts if _period(part) is None), None)
    if unknown is not None:
        return f"{unknown} does not repeat"
    if pattern.uses_marks and not pattern.marks_add:
        return "marks take pairs away"
    found = _bound(pattern)
    if found is None or found.left is None:
        return f"{_endless(pattern)} looks back without end"
    # nobody else may come to stand where a pattern looks for first tokens
    sinks, left = max([0, *(part.n for part in parts if type(part) is First)]), found.left
    if sinks:
        # distances to them are shorter among what is left: they must still be beyond all that the pattern tells apart
        left = max([left, *(_extent(part) for part in parts)])
    pinned = found.pinned or (Pinned(marks=True) if pattern.uses_marks else None)
    return Kept(sinks, left, math.lcm(*(_period(part) or 1 for part in parts)), pinned)


def _endless(pattern: Pattern) -> Pattern:
    """The part of a pattern by which it has no end."""
    if isinstance(pattern, Union):
        return _endless(next(part for part in pattern.parts if _bound(part) is None))
    if isinstance(pattern, Intersection):
        return _endless(next((part for part in pattern.parts if type(part) is not Window), pattern.parts[0]))
    return pattern


def _of_window(form: WindowForm) -> Kept:
    if form.window is not None and form.window.left is None:
        return Kept(0, None)
    left = 0 if form.window is None else form.window.left
    assert left is not None
    if form.first and form.clip.left is not None:
        # first tokens that are seen from some distance only, as in `window(255, 0) | (first(4) & window(4095, 0))`: where they
        # have left the longer window, they are behind it among what is kept too
        left = max(left, form.clip.left)
    return Kept(form.first, left)


def _parts(pattern: Pattern) -> Iterator[Pattern]:
    """What a pattern is joined of."""
    if isinstance(pattern, (Union, Intersection)):
        for part in pattern.parts:
            yield from _parts(part)
    elif type(pattern) is Outside:
        yield from _parts(pattern.pattern)
    else:
        yield pattern


def _period(part: Pattern) -> int | None:
    """After how many positions a pattern begins anew; None if nobody knows."""
    if type(part) in (Window, First, Marked, MarkedKeys, MarkedQueries):
        return 1
    if type(part) is Stride:
        return part.step
    if type(part) is Chunk:
        return part.size
    return part.block if type(part) is Fixed or type(part) is Summary else None


def _extent(part: Pattern) -> int:
    """How far a pattern looks back at most, if it has an end."""
    found = _bound(part)
    return 0 if found is None else found.left or 0


def _bound(pattern: Pattern) -> Kept | None:
    """The first tokens, the distances and the pinned tokens that hold all pairs; None if none do."""
    if isinstance(pattern, Union):
        bounds = [_bound(part) for part in pattern.parts]
        found = [one for one in bounds if one is not None]
        return None if len(found) < len(bounds) else joined(found)
    if isinstance(pattern, Intersection):
        # each part alone is an end
        found = (one for one in map(_bound, pattern.parts) if one is not None)
        return min(found, key=lambda one: (one.pinned is not None, one.sinks + (one.left or 0)), default=None)
    return _bound_of_one(pattern)


def _bound_of_one(part: Pattern) -> Kept | None:
    if isinstance(part, Marked) and type(part) in (Marked, MarkedKeys, MarkedQueries):
        queries, keys = part.marked_sides
        return Kept(0, 0, pinned=Pinned(True, keys, queries))
    if type(part) is Window:
        return None if part.left is None else Kept(0, part.left)
    if type(part) is First:
        return Kept(part.n, 0)
    if type(part) is Chunk:
        return Kept(0, (part.left + 1) * part.size - 1)
    if type(part) is Summary:
        return Kept(0, 0, pinned=Pinned(summaries=((part.block, part.count),)))
    if type(part) is Fixed:
        pinned = Pinned(summaries=((part.block, part.summary),)) if part.summary else None
        return Kept(0, part.block - 1, pinned=pinned)
    return None
