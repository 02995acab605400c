"""Causal windows with first tokens, whose visible slots are known by numbers alone."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ...pattern import Pattern
from ...pattern.forms import read_window


class Reach(NamedTuple):
    """The pairs of a causal window with first tokens: query x sees keys 0 .. first - 1 and x - left .. x."""

    left: int
    first: int


@lru_cache(maxsize=256)
def read_reach(pattern: Pattern, slots: int) -> Reach | None:
    """A pattern as a causal window with first tokens, over so many slots; None if it is none."""
    form = read_window(pattern, slots)
    if isinstance(form, str) or form.marked or form.window is None or form.window.right != 0:
        return None
    if form.has_globals and (form.clip.left is not None or form.clip.right != 0):
        return None
    return Reach(slots if form.window.left is None else form.window.left, form.first)
