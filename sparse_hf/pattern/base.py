"""What a pattern is: a set of (query position, key position) pairs, and what its methods owe each other.

Legend: q, k positions within a sequence; q0..q1 and k0..k1 inclusive corners of a rectangle of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache, partial, reduce
from itertools import chain, product
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .parse import parse
from .words import edition, register, snake_case

# the state of a rectangle of pairs; PARTIAL is always a permitted answer
EMPTY, PARTIAL, FULL = 0, 1, 2
# a pattern whose written-out form has more terms than this is not read as one
MAX_TERMS = 64
# texts whose patterns are kept
PARSED_KEPT = 256


class Marks(NamedTuple):
    """What a batch adds to positions: which tokens are marked, and how long the sequence is that they belong to.

    Marks are bool per element for `allows`, the state of the range for `blocks`: 0 none of its positions is marked, 1 some,
    2 all. None: nobody says, which means that no token is marked, and that the sequence goes on.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    length: Tensor | int | None = None


class Pattern:
    """A set of (query position, key position) pairs: a frozen value without length, batch or device.

    `|` is union, `&` is intersection, and nothing else joins patterns. A pattern of your own is a frozen dataclass that
    defines `allows`, `blocks` and `reachable`. It then runs on every backend, in every model, and reads and writes as text. With
    `joint` and `state` of this module:

        @dataclass(frozen=True)
        class EveryNth(Pattern):
            # keys whose position is `offset` modulo `n`
            n: int
            offset: int = 0

            def allows(self, q, k, marks=None):
                return joint(q, k) & (k % self.n == self.offset)

            def blocks(self, q0, q1, k0, k1, marks=None):
                first = k0 + (self.offset - k0) % self.n
                only = (first == k1) & (k0 == k1) | (self.n == 1)
                return state(joint(q0, k0) & (first > k1), joint(q0, k0) & only)

            def reachable(self, k, q):
                return self.allows(q, k)

    `allows` decides; what all others say follows from it. Each may say less than is true in its own safe direction, which
    costs time and never pairs:

    - `blocks`: PARTIAL is always permitted. A pattern that says nothing else is computed, at n x n cost.
    - `signature`: None, the default, has squares compared pair by pair.
    - `reachable`: a superset is sound. A cache then keeps keys that no query sees.
    - `grain`: 1, the default, promises nothing.
    - `marks_add`: False is always sound.

    Three must be said where they hold, or the answer is wrong: `marked_sides` by a pattern that reads `marks.q` or
    `marks.k`, `uses_length` by one that reads `marks.length`, and then `unending`.

    Class attributes and keywords:

    - `word`: the word of the text form; by default the name of the class in snake_case. Words are entered when a class is
      defined, so that a saved model is read once the module that defines its patterns is imported. The text form is
      `word(field, field, ...)`; fields are whole numbers, bools, text, None, tuples of these, or patterns.
    - `pattern_fields`: names of the fields that are patterns.
    - `fraction_fields`: names of the fields that are numbers and need not be whole.
    - `class Base(Pattern, has_word=False)` is a base of others, and no pattern by itself.

    Equality and hash are those of the class and its fields. A subclass of another pattern is another pattern: what is known
    of `Window`, say, is assumed of no subclass, and one that redefines `allows` redefines what else speaks of its pairs.

    Examples:
        >>> pattern = Pattern.parse("window(256, 256) | first(1)")
        >>> bool(pattern.allows(torch.tensor(9), torch.tensor(300))), str(pattern & Pattern.parse("causal()"))
        (False, '(window(256, 256) | first(1)) & window(None, 0)')
    """

    word: ClassVar[str] = ""
    pattern_fields: ClassVar[tuple[str, ...]] = ()
    fraction_fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, has_word: bool = True, **options):
        super().__init_subclass__(**options)
        if not has_word:
            return
        missing = [name for name in REQUIRED if getattr(cls, name) is getattr(Pattern, name)]
        if missing:
            raise TypeError(
                f"{cls.__name__} does not define {', '.join(missing)}; a pattern defines {', '.join(REQUIRED)}, and "
                "sparse_hf.Pattern says what they owe each other"
            )
        stale = _stale(cls)
        if stale:
            name, parent = stale[0]
            raise TypeError(
                f"{cls.__name__} has pairs of its own, and {', '.join(name for name, _ in stale)} of {parent.__name__}, which "
                f"speak of others: define them too, or write `{name} = {parent.__name__}.{name}` where that still holds"
            )
        if "word" not in vars(cls):
            cls.word = snake_case(cls.__name__)
        if "__repr__" not in vars(cls):
            # a dataclass would write one of its own, and the text form is what a pattern is read from
            cls.__repr__ = cls.__repr__
        register(cls.word, cls)

    def allows(self, q: Tensor, k: Tensor, marks: Marks | None = None) -> Tensor:
        """Element by element: does the pattern hold the pair (q, k)? Bool, of the joint shape of q and k.

        Positions are never negative, and may lie beyond the end of any sequence. Plain tensor arithmetic without a look at
        values, so that kernels can trace it; the same answer for one pair as for all of them.
        """
        raise NotImplementedError(f"{type(self).__name__}.allows")

    def blocks(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, marks: Marks | None = None) -> Tensor:
        """EMPTY, PARTIAL or FULL for rectangles given by their corners, of their joint shape: int8.

        EMPTY only where `allows` holds no pair of the rectangle, FULL only where it holds all of them.
        """
        raise NotImplementedError(f"{type(self).__name__}.blocks")

    def reachable(self, k: Tensor, q: Tensor) -> Tensor:
        """Can any query at or after q still see key k, whatever is marked? Bool, of the joint shape; a superset is sound."""
        raise NotImplementedError(f"{type(self).__name__}.reachable")

    def signature(self, q0: Tensor, k0: Tensor, side: int, marks: Marks | None = None) -> list[Tensor] | None:
        """Numbers that tell squares of `side` x `side` pairs apart, given their first corners `[T]`: `[T]` each.

        Squares with the same numbers hold the same pairs, counted from the corner, if the same of their tokens are marked. Of
        `marks` only the length counts. None: squares have to be compared pair by pair.
        """
        return None

    @property
    def grain(self) -> int:
        """Side of aligned blocks that are full or empty, but for the diagonal and marks; 0: of any, 1: of none."""
        return 1

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
        """Do marks only add pairs: those of a marked query or key, beside those that are there without any mark?"""
        return not self.uses_marks

    @property
    def uses_length(self) -> bool:
        """Does it ask how long the sequence is?"""
        return False

    def unending(self) -> Pattern | None:
        """The pattern in a sequence that goes on, as any text does for a causal model: nothing is last. None: no pairs."""
        if self.uses_length:
            raise TypeError(
                f"{type(self).__name__} asks how long the sequence is and does not define unending, which causal models need: "
                "the pattern of a text that goes on, or None"
            )
        return self

    def on(self, device: torch.device | str) -> Pattern:
        """An equal pattern whose lookup tables, if it has any, are on `device`, where a kernel can trace them."""
        return self

    @property
    def heads(self) -> tuple[Pattern, ...] | None:
        """One pattern per head, or None if all heads share this one. `per_head` alone has some."""
        return None

    @property
    def uses_content(self) -> bool:
        """Are its pairs chosen from queries and keys at run time? `lsh`, `topk` and their kin do so."""
        return False

    @property
    def uses_indexer(self) -> bool:
        """Are pairs chosen by scores that an indexer of the layer makes?"""
        return False

    @property
    def most_keys(self) -> int:
        """How many keys a query may get that are chosen at run time."""
        return 0

    def least_chosen(self, length: int) -> int:
        """How many of the keys that the rest of a pattern leaves out of such a text a query surely gets, if there are so many."""
        return 0

    def without_content(self) -> Pattern | None:
        """The pairs that are not chosen at run time, None if there are none."""
        return self

    def with_all_content(self) -> Pattern:
        """The pattern with all pairs that may be chosen at run time."""
        return self

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read the text form; `Pattern.parse(str(p)) == p`. Recipes may be called by name."""
        return parse(text)

    def __or__(self, other: Pattern) -> Pattern:
        return _join(Union, self, other)

    def __and__(self, other: Pattern) -> Pattern:
        return _join(Intersection, self, other)

    def __bool__(self) -> bool:
        raise TypeError("a pattern has no truth value; write | for union and & for intersection, not `or` and `and`")

    def __repr__(self) -> str:
        check_class(type(self))
        return f"{self.word}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        """The fields, as the text form writes them."""
        # `check_class` knows that it is a dataclass
        own = [field for field in fields(self) if field.init]  # pyright: ignore[reportArgumentType]
        written = [(field, repr(getattr(self, field.name))) for field in own]
        return [f"{field.name}={text}" if field.kw_only else text for field, text in written]


# what a pattern has to define, and what else speaks of its pairs
REQUIRED = ("allows", "blocks", "reachable")
ABOUT_PAIRS = ("blocks", "reachable", "signature", "grain")


def _stale(kind: type[Pattern]) -> list[tuple[str, type[Pattern]]]:
    """What a class inherits from behind the class that says its pairs, and from whom."""

    def says(name: str) -> type:
        return next(one for one in kind.__mro__ if name in vars(one))

    order = {one: i for i, one in enumerate(kind.__mro__)}
    found = [(name, says(name)) for name in ABOUT_PAIRS if order[says(name)] > order[says("allows")]]
    # the defaults are true of any pairs
    return [(name, one) for name, one in found if one is not Pattern]


@cache
def check_class(kind: type[Pattern]) -> None:
    """Is a class of patterns one of values, which are equal if their fields are?

    Raises:
        TypeError: it is not, with the remedy.
    """
    parameters = getattr(kind, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen or not parameters.eq:
        raise TypeError(f"{kind.__name__} is no value; write @dataclass(frozen=True) above the class")
    if "word" in getattr(kind, "__dataclass_fields__", {}):
        raise TypeError(f"{kind.__name__}: word is a field; write it without a type, `word = {kind.word!r}`")


def as_pattern(pattern: Pattern | str) -> Pattern:
    """A pattern, or the one that a text says.

    Raises:
        TypeError: neither of them, or a pattern that is no value.
        PatternError: a text that is no pattern.
    """
    if isinstance(pattern, Pattern):
        check_class(type(pattern))
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(f"pattern is a {type(pattern).__name__}; give a Pattern or its text, like 'window(255, 0)'")
    return _parsed(pattern, edition())


@lru_cache(maxsize=PARSED_KEPT)
def _parsed(text: str, edition: int) -> Pattern:
    return parse(text)


@dataclass(frozen=True)
class _Joined(Pattern, has_word=False):
    """Patterns that are joined by `symbol`, its parts."""

    parts: tuple[Pattern, ...]
    symbol: ClassVar[str] = ""

    def __repr__(self) -> str:
        # & binds tighter than |, so only a union inside an intersection needs parentheses
        loose = isinstance(self, Intersection)
        texts = (f"({part})" if loose and isinstance(part, Union) else str(part) for part in self.parts)
        return f" {self.symbol} ".join(texts)

    def on(self, device):
        return type(self)(tuple(part.on(device) for part in self.parts))

    def signature(self, q0, k0, side, marks=None):
        found = []
        for part in self.parts:
            numbers = part.signature(q0, k0, side, marks)
            if numbers is None:
                return None
            found += numbers
        return found

    @property
    def marked_sides(self) -> tuple[bool, bool]:
        return either_side(self.parts)

    @property
    def marks_add(self) -> bool:
        return all(part.marks_add for part in self.parts)

    @property
    def uses_length(self) -> bool:
        return any(part.uses_length for part in self.parts)

    @property
    def uses_content(self) -> bool:
        return any(part.uses_content for part in self.parts)

    @property
    def uses_indexer(self) -> bool:
        return any(part.uses_indexer for part in self.parts)

    def without_content(self) -> Pattern | None:
        return self._rejoined([part.without_content() for part in self.parts])

    def with_all_content(self) -> Pattern:
        return reduce(partial(_join, type(self)), [part.with_all_content() for part in self.parts])

    @property
    def grain(self) -> int:
        return math.gcd(*(part.grain for part in self.parts))

    def unending(self) -> Pattern | None:
        return self._rejoined([part.unending() for part in self.parts])

    def _rejoined(self, parts: Sequence[Pattern | None]) -> Pattern | None:
        kept = [part for part in parts if part is not None]
        if not kept or (len(kept) < len(parts) and isinstance(self, Intersection)):
            return None
        return reduce(partial(_join, type(self)), kept)


class Union(_Joined, has_word=False):
    """The pairs that any of the parts holds."""

    symbol = "|"

    @property
    def most_keys(self) -> int:
        return sum(part.most_keys for part in self.parts)

    def least_chosen(self, length: int) -> int:
        return sum(part.least_chosen(length) for part in self.parts)

    def allows(self, q, k, marks=None):
        return reduce(torch.Tensor.__or__, [part.allows(q, k, marks) for part in self.parts])

    def blocks(self, q0, q1, k0, k1, marks=None):
        return reduce(torch.maximum, [part.blocks(q0, q1, k0, k1, marks) for part in self.parts])

    def reachable(self, k, q):
        return reduce(torch.Tensor.__or__, [part.reachable(k, q) for part in self.parts])


class Intersection(_Joined, has_word=False):
    """The pairs that all of the parts hold."""

    symbol = "&"

    @property
    def most_keys(self) -> int:
        return min((part.most_keys for part in self.parts if part.uses_content), default=0)

    def least_chosen(self, length: int) -> int:
        return min((part.least_chosen(length) for part in self.parts if part.uses_content), default=0)

    def allows(self, q, k, marks=None):
        return reduce(torch.Tensor.__and__, [part.allows(q, k, marks) for part in self.parts])

    def blocks(self, q0, q1, k0, k1, marks=None):
        return reduce(torch.minimum, [part.blocks(q0, q1, k0, k1, marks) for part in self.parts])

    def reachable(self, k, q):
        return reduce(torch.Tensor.__and__, [part.reachable(k, q) for part in self.parts])


def _join(kind: type[_Joined], left: Pattern, right: Any) -> Any:
    if not isinstance(right, Pattern):
        return NotImplemented
    for side in (left, right):
        check_class(type(side))
        if side.heads is not None:
            raise TypeError(f"per_head stands outermost; put {kind.symbol} inside it, head by head")
    return kind(tuple(part for side in (left, right) for part in (side.parts if type(side) is kind else (side,))))


def either_side(patterns: Sequence[Pattern]) -> tuple[bool, bool]:
    """Does any of the patterns ask which queries are marked, and which keys?"""
    sides = [pattern.marked_sides for pattern in patterns]
    return any(queries for queries, _ in sides), any(keys for _, keys in sides)


def written_out(pattern: Pattern) -> list[tuple[Pattern, ...]] | None:
    """The pattern written out as a union of intersections; None if they are more than `MAX_TERMS`."""
    if not isinstance(pattern, (Union, Intersection)):
        return [(pattern,)]
    choices: list[list[tuple[Pattern, ...]]] = []
    for part in pattern.parts:
        terms = written_out(part)
        if terms is None:
            return None
        choices.append(terms)
    if isinstance(pattern, Union):
        found = list(chain.from_iterable(choices))
    elif math.prod(map(len, choices)) <= MAX_TERMS:
        found = [tuple(chain.from_iterable(choice)) for choice in product(*choices)]
    else:
        return None
    return found if len(found) <= MAX_TERMS else None


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
