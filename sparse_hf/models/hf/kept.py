"""What a layer has to keep of a text without end, read off its pattern: the first tokens, and the last ones.

Legend: a token's position counts from the first of its row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ...pattern import Pattern
from ...pattern.base import Intersection, Union, as_pattern
from ...pattern.forms import WindowForm, read_window
from ...pattern.primitives import Chunk, First, Fixed, Stride, Summary, Window

# no side of a window is taken for endless, however long the text
ANY_LENGTH = 1 << 62


class Kept(NamedTuple):
    """A query sees no key but the first `sinks` and the last `left` before itself.

    Where keys between them are left out, a multiple of `period` at a time, the pattern holds the same pairs of those that are left
    as if they were a text of their own. `left` None: every key may be seen again.
    """

    sinks: int
    left: int | None
    period: int = 1


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
    lefts = [one.left for one in found]
    left = None if None in lefts else max(one for one in lefts if one is not None)
    return Kept(max(one.sinks for one in found), left, math.lcm(*(one.period for one in found)))


def _of_head(pattern: Pattern) -> Kept | str:
    form = read_window(pattern, ANY_LENGTH, of_any_reach=True)
    if isinstance(form, WindowForm):
        return _of_window(form)
    periods = [_period(part) for part in _parts(pattern)]
    if None in periods:
        return f"{form}, and does not repeat"
    found = _bound(pattern)
    if found is None:
        return f"{form}, and looks back without end"
    # distances to the first tokens are shorter among what is left: they must still be beyond all that the pattern tells apart
    left = max([found.left or 0, *(_extent(part) for part in _parts(pattern))]) if found.sinks else found.left
    return Kept(found.sinks, left, math.lcm(*(one for one in periods if one is not None)))


def _of_window(form: WindowForm) -> Kept | str:
    if form.marked:
        return "marked tokens may be anywhere"
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
    else:
        yield pattern


def _period(part: Pattern) -> int | None:
    """After how many positions a pattern begins anew; None if nobody knows."""
    if type(part) in (Window, First):
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
    """The first tokens and the distances that hold all pairs; None if none do."""
    if isinstance(pattern, Union):
        bounds = [_bound(part) for part in pattern.parts]
        found = [one for one in bounds if one is not None]
        return None if len(found) < len(bounds) else Kept(max(b.sinks for b in found), max(b.left or 0 for b in found))
    if isinstance(pattern, Intersection):
        found = [one for one in map(_bound, pattern.parts) if one is not None]
        # each part alone is an end
        return min(found, key=lambda one: one.sinks + (one.left or 0), default=None)
    if type(pattern) is Window:
        return None if pattern.left is None else Kept(0, pattern.left)
    if type(pattern) is First:
        return Kept(pattern.n, 0)
    if type(pattern) is Chunk:
        return Kept(0, (pattern.left + 1) * pattern.size - 1)
    return Kept(0, pattern.block - 1) if type(pattern) is Fixed and not pattern.summary else None
