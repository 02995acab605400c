"""A pattern as a window and what marked tokens add, for any length and whatever is marked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..pattern import MarkedQueries, Pattern, Window
from .split import read_pattern

# longer than any text: what a window is must not depend on lengths here
LONGEST = 1 << 30
EVERYTHING = Window(None, None)


@dataclass(frozen=True)
class MarkedParts:
    """A window (None: no pair), whether all queries see the marked keys, and whether marked queries see everything."""

    window: Window | None
    keys: bool
    rows: bool


@lru_cache(maxsize=256)
def read_marked(text: str) -> MarkedParts | None:
    """The parts of a pattern, or None if it is more than these, or speaks of no marks."""
    if text == str(MarkedQueries()):
        return MarkedParts(None, False, True)
    shape = read_pattern(Pattern.parse(text), LONGEST)
    if isinstance(shape, str) or not shape.marked or shape.first or shape.clip != EVERYTHING:
        return None
    return MarkedParts(shape.window, True, not shape.keys_only)
