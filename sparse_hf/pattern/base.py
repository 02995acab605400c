"""What a pattern is: a set of (query position, key position) pairs, with four closed forms.

Legend: q, k positions within a sequence; q0..q1 and k0..k1 inclusive corners of a rectangle of pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial, reduce
from itertools import product
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

# the state of a rectangle of pairs; PARTIAL is always a permitted answer
EMPTY, PARTIAL, FULL = 0, 1, 2
# a pattern whose written-out form has more terms than this is not looked at
MAX_TERMS = 64


class Marks(NamedTuple):
    """What a batch adds to positions: which tokens are marked, and how long the sequence is of which they are part.

    Marks are bool per element for `allows`, the state of the range for `blocks`.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    length: Tensor | int | None = None


class Pattern:
    """A frozen value without length, batch or device. `|` is union, `&` is intersection; nothing else."""

    # the word of the text form
    word: ClassVar[str] = ""

    def allows(self, q: Tensor, k: Tensor, marks: Marks | None = None) -> Tensor:
        """Element by element: does the pattern hold the pair (q, k)? Bool, of the joint shape of q and k.

        Plain tensor arithmetic, so that kernels can trace it. `marks` says which positions are marked, and the length of
        the sequence; None: none is marked, and the sequence goes on.
        """
        raise NotImplementedError

    def blocks(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, marks: Marks | None = None) -> Tensor:
        """EMPTY, PARTIAL or FULL for rectangles given by their corners: int8.

        `marks` holds a state for each range (0 none of its positions is marked, 1 some, 2 all) and the length.
        """
        raise NotImplementedError

    def signature(self, q0: Tensor, k0: Tensor, side: int, marks: Marks | None = None) -> list[Tensor] | None:
        """Numbers that tell squares of `side` x `side` pairs apart, given their first corners `[T]`: `[T]` each.

        Squares with the same numbers hold the same pairs, counted from the corner, if the same of their tokens are marked. Of
        `marks` only the length counts. None: squares have to be compared pair by pair.
        """
        return None

    def reachable(self, k: Tensor, q: Tensor) -> Tensor:
        """Can any query at or after q still see key k? A superset is sound. Bool."""
        raise NotImplementedError

    def on(self, device) -> Pattern:
        """An equal pattern whose lookup tables, if it has any, are on `device`, where a kernel can trace them."""
        return self

    @property
    def heads(self) -> tuple[Pattern, ...] | None:
        """One pattern per head, or None if all heads share this one."""
        return None

    @property
    def marked_sides(self) -> tuple[bool, bool]:
        """Does it ask which queries are marked, and which keys?"""
        return False, False

    @property
    def uses_marks(self) -> bool:
        """Does it ask which tokens are marked?"""
        return any(self.marked_sides)

    @property
    def marks_add(self) -> bool:
        """Do marks only add pairs?"""
        return True

    @property
    def uses_length(self) -> bool:
        """Does it ask how long the sequence is?"""
        return False

    @property
    def uses_content(self) -> bool:
        """Are its pairs chosen from queries and keys at run time?"""
        return False

    @property
    def most_keys(self) -> int:
        """How many keys a query may get that are chosen at run time."""
        return 0

    def without_content(self) -> Pattern | None:
        """The pairs that are not chosen at run time, None if there are none."""
        return self

    @property
    def grain(self) -> int:
        """Side of aligned blocks that are full or empty, but for the diagonal and marks; 0: of any, 1: of none."""
        return 1

    def unending(self) -> Pattern | None:
        """The pattern in a sequence that goes on, as any text does for a causal model: nothing is last. None: no pairs."""
        return self

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read the text form; `Pattern.parse(str(p)) == p`. Recipes may be called by name."""
        from .parse import parse

        return parse(text)

    def __or__(self, other: Pattern) -> Pattern:
        return _join(Union, self, other)

    def __and__(self, other: Pattern) -> Pattern:
        return _join(Intersection, self, other)

    def __bool__(self) -> bool:
        raise TypeError("a pattern has no truth value; write | for union and & for intersection, not `or` and `and`")

    def __repr__(self) -> str:
        values = (getattr(self, field.name) for field in fields(self))
        return f"{self.word}({', '.join(map(repr, values))})"


@dataclass(frozen=True, repr=False)
class _Joined(Pattern):
    parts: tuple[Pattern, ...]
    symbol: ClassVar[str] = ""

    def __repr__(self) -> str:
        # & binds tighter than |, so only a union inside an intersection needs parentheses
        loose = isinstance(self, Intersection)
        texts = (f"({part})" if loose and isinstance(part, Union) else str(part) for part in self.parts)
        return f" {self.symbol} ".join(texts)

    def on(self, device) -> Pattern:
        return type(self)(tuple(part.on(device) for part in self.parts))

    def signature(self, q0, k0, side, marks=None):
        found = [part.signature(q0, k0, side, marks) for part in self.parts]
        return None if None in found else sum(found, [])

    @property
    def marked_sides(self) -> tuple[bool, bool]:
        return tuple(map(any, zip(*(part.marked_sides for part in self.parts), strict=True)))

    @property
    def marks_add(self) -> bool:
        return all(part.marks_add for part in self.parts)

    @property
    def uses_length(self) -> bool:
        return any(part.uses_length for part in self.parts)

    @property
    def uses_content(self) -> bool:
        return any(part.uses_content for part in self.parts)

    def without_content(self) -> Pattern | None:
        return self._rejoined([part.without_content() for part in self.parts])

    @property
    def grain(self) -> int:
        return math.gcd(*(part.grain for part in self.parts))

    def unending(self) -> Pattern | None:
        return self._rejoined([part.unending() for part in self.parts])

    def _rejoined(self, parts: list[Pattern | None]) -> Pattern | None:
        kept = [part for part in parts if part is not None]
        if not kept or (len(kept) < len(parts) and isinstance(self, Intersection)):
            return None
        return reduce(partial(_join, type(self)), kept)


class Union(_Joined):
    symbol = "|"

    @property
    def most_keys(self) -> int:
        return sum(part.most_keys for part in self.parts)

    def allows(self, q, k, marks=None):
        return reduce(torch.Tensor.__or__, [part.allows(q, k, marks) for part in self.parts])

    def blocks(self, q0, q1, k0, k1, marks=None):
        return reduce(torch.maximum, [part.blocks(q0, q1, k0, k1, marks) for part in self.parts])

    def reachable(self, k, q):
        return reduce(torch.Tensor.__or__, [part.reachable(k, q) for part in self.parts])


class Intersection(_Joined):
    symbol = "&"

    @property
    def most_keys(self) -> int:
        return min((part.most_keys for part in self.parts if part.uses_content), default=0)

    def allows(self, q, k, marks=None):
        return reduce(torch.Tensor.__and__, [part.allows(q, k, marks) for part in self.parts])

    def blocks(self, q0, q1, k0, k1, marks=None):
        return reduce(torch.minimum, [part.blocks(q0, q1, k0, k1, marks) for part in self.parts])

    def reachable(self, k, q):
        return reduce(torch.Tensor.__and__, [part.reachable(k, q) for part in self.parts])


def _join(kind: type[_Joined], left: Pattern, right: Pattern) -> Pattern:
    if not isinstance(right, Pattern):
        return NotImplemented
    for side in (left, right):
        if side.heads is not None:
            raise TypeError(f"per_head stands outermost; put {kind.symbol} inside it, head by head")
    parts = (p for side in (left, right) for p in (side.parts if type(side) is kind else (side,)))
    return kind(tuple(parts))


def written_out(pattern: Pattern) -> list[tuple[Pattern, ...]] | None:
    """The pattern written out as a union of intersections; None if they are more than `MAX_TERMS`."""
    if isinstance(pattern, Union):
        found = [written_out(part) for part in pattern.parts]
        out = None if None in found else [term for terms in found for term in terms]
    elif isinstance(pattern, Intersection):
        found = [written_out(part) for part in pattern.parts]
        if None in found or reduce(lambda n, terms: n * len(terms), found, 1) > MAX_TERMS:
            return None
        out = [sum(choice, ()) for choice in product(*found)]
    else:
        out = [(pattern,)]
    return out if out is not None and len(out) <= MAX_TERMS else None


def whole(name: str, value, least: int) -> int:
    """`value` if it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return value


def joint(q: Tensor, k: Tensor) -> Tensor:
    """True everywhere, in the joint shape: positions are never negative."""
    return (q >= 0) & (k >= 0)


def state(empty: Tensor, full: Tensor) -> Tensor:
    """FULL where `full`, else EMPTY where `empty`, else PARTIAL: int8."""
    return torch.where(full, FULL, torch.where(empty, EMPTY, PARTIAL)).to(torch.int8)
