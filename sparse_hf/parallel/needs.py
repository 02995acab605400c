"""What the queries of each rank see beyond its part, as their pattern says it.

A rank lays the keys that it asks for before and behind its own, in order and without the gaps. A pattern counts positions, and
these are other ones then. So whether its pairs are the same is checked: keys of one run move together, and the pattern
has to be the same for squares of pairs that move so far; of single keys far away (first or marked tokens) all queries have to
see all or none, where they stand and where they are laid.

Some queries see nearly everything: marked ones, and the first of an encoder. They are wide. Every rank gets them, computes
them over its own keys, and sends back what it found.

Legend: N tokens of the text, R rows that are told apart, S ranks. Positions are counted from the first token of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..pattern import EMPTY, FULL, PARTIAL, Pattern
from ..pattern.base import Marks
from ..plan import NOTHING
from .text import SplitText

# keys that are asked about together before they are asked one by one
KEYS_AT_ONCE = 1024
# queries at an end of a part that may be wide by where they stand
MOST_WIDE = 256
# keys that a wide query has to save
SAVED_BY_WIDE = 8
# squares a side by which a pattern is compared with itself elsewhere, and the least side of one
SQUARES, LEAST_SIDE = 32, 64
# of them those that differ, at most: a strip or two. Of squares half as large there may be twice as many
MOST_CUT = 4 * SQUARES
# a pattern that repeats itself at longer distances counts as one that does not
LONGEST_PERIOD = 1 << 16
# texts without padding, documents and marks whose needs are kept
LENGTHS_KEPT = 128


@dataclass(frozen=True, eq=False)
class Needs:
    """What each rank asks for, indices in the text; -1 stands for none.

    Attributes:
        left, right: of each rank, keys `[R, L]` before its part, padded in front, and `[R, L']` behind it.
        wide: `[R, M]`, queries that all ranks compute together.
        why_not: why the pattern cannot be computed so; None if it can.
    """

    left: list[Tensor]
    right: list[Tensor]
    wide: Tensor
    why_not: str | None = None

    @property
    def most(self) -> int:
        """Tokens that a rank asks for, at most."""
        return max(a.shape[1] + b.shape[1] for a, b in zip(self.left, self.right, strict=True)) + self.wide.shape[1]


def keys_sent(sizes: list[int], pattern: Pattern) -> list[int]:
    """Keys that each rank sends to others in one forward pass of one layer, for a text without padding and documents.

    Each is as many numbers as a token's keys and values have; the backward pass sends as many gradients the other way.

    Raises:
        ValueError: a pattern that goes by heads.

    Example: `keys_sent([4096] * 4, Pattern.parse("(window(1023, 0) | first(4)) & causal()"))` is `[1035, 1023, 1023, 0]`.
    """
    text = SplitText(sizes, 1, NOTHING)
    needs = find_needs(text, pattern)
    if needs.why_not is not None:
        raise ValueError(f"{needs.why_not}, so that it goes by heads")
    ends = torch.tensor(text.bounds[1:])
    asked = torch.cat([torch.cat(both, 1).flatten() for both in zip(needs.left, needs.right, strict=True)])
    return torch.searchsorted(ends, asked[asked >= 0], right=True).bincount(minlength=len(sizes)).tolist()


def find_needs(text: SplitText, pattern: Pattern, everything: bool = False) -> Needs:
    """What the ranks ask for under a pattern; with `everything`, all tokens of the sequences that they hold a part of."""
    if text.batch.is_empty:
        return _of_lengths(tuple(text.sizes), pattern, everything)
    return _found(text, pattern, everything)


@lru_cache(maxsize=LENGTHS_KEPT)
def _of_lengths(sizes: tuple[int, ...], pattern: Pattern, everything: bool) -> Needs:
    return _found(SplitText(list(sizes), 1, NOTHING), pattern, everything)


def _found(text: SplitText, pattern: Pattern, everything: bool) -> Needs:
    patterns = tuple(dict.fromkeys(pattern.heads or (pattern,)))
    rows, ranks = range(text.rows_apart), range(len(text.sizes))
    found = [[_Asked() for _ in rows] for _ in ranks]
    for rank in ranks:
        for row in rows:
            for piece in _pieces(text, rank, row):
                reason = found[rank][row].add(_Finder(patterns, piece), everything)
                if reason is not None:
                    nothing = [torch.empty(len(rows), 0, dtype=torch.int64)] * len(ranks)
                    return Needs(nothing, nothing, nothing[0], f"{pattern} {reason}")
    left = [_joined([asked.left for asked in of_rank], in_front=True) for of_rank in found]
    right = [_joined([asked.right for asked in of_rank]) for of_rank in found]
    wide = _joined([torch.cat([of_rank[row].wide for of_rank in found]) for row in rows])
    return Needs(left, right, wide)


def _joined(rows: list[Tensor], in_front: bool = False) -> Tensor:
    """Indices of rows as one tensor, -1 where a row has fewer."""
    most = max(map(len, rows))
    return torch.stack([pad(row, (most - len(row), 0) if in_front else (0, most - len(row)), value=-1) for row in rows])


@dataclass(frozen=True, eq=False)
class _Piece:
    """The queries `q0..q1` of one rank in a sequence `first..last` that goes on beyond its part; ends inclusive."""

    first: int
    last: int
    q0: int
    q1: int
    marks: Tensor | None  # [N], of the row

    @property
    def sides(self) -> list[tuple[int, int]]:
        """What of the sequence lies before and behind the part."""
        return [(a, z) for a, z in ((self.first, self.q0 - 1), (self.q1 + 1, self.last)) if a <= z]


def _pieces(text: SplitText, rank: int, row: int) -> Iterator[_Piece]:
    begin, end = text.bounds[rank], text.bounds[rank + 1] - 1
    at_begin, at_end = text.sequence_at(row, begin), text.sequence_at(row, end)
    goes_on = [
        (at_begin, at_begin is not None and at_begin[0] < begin <= at_begin[1]),
        (at_end, at_end is not None and at_end[1] > end),
    ]
    for sequence in dict.fromkeys(sequence for sequence, really in goes_on if really):
        assert sequence is not None
        first, last = sequence
        yield _Piece(first, last, max(begin, first), min(end, last), text.marks_of(row))


@dataclass(eq=False)
class _Asked:
    """What a rank asks for in one row."""

    left: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    right: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    wide: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def add(self, finder: _Finder, everything: bool) -> str | None:
        """Add what a piece asks for; or say why that cannot be told."""
        piece = finder.piece
        if everything:
            left, right = torch.arange(piece.first, piece.q0), torch.arange(piece.q1 + 1, piece.last + 1)
        else:
            left, right, wide, reason = finder.find()
            if reason is not None:
                return reason
            self.wide = torch.cat((self.wide, wide))
        # two sequences, one that has begun before and one that goes on behind, or one on both sides
        self.left, self.right = torch.cat((self.left, left)), torch.cat((self.right, right))
        return None


@dataclass(eq=False)
class _Finder:
    """The keys of one piece."""

    patterns: tuple[Pattern, ...]
    piece: _Piece

    @property
    def length(self) -> int:
        return self.piece.last + 1 - self.piece.first

    def find(self) -> tuple[Tensor, Tensor, Tensor, str | None]:
        """Keys before the part, keys behind it, wide queries, and why that does not do."""
        piece = self.piece
        q0, q1, wide = self._narrow()
        if q0 > q1:
            nothing = torch.empty(0, dtype=torch.int64)
            return nothing, nothing, wide, None
        left = self._seen(q0, q1, piece.first, piece.q0 - 1)
        right = self._seen(q0, q1, piece.q1 + 1, piece.last)
        begin, end = _run_down(left, piece.q0), _run_up(right, piece.q1)
        single_right = right[right > end]
        for period, more in product(self._periods(), (0, max(self._numbers(), default=0))):
            start = _aligned(left, max(piece.first, begin - more), piece.first, period)
            laid = _Laid(left[left < start], start, end, single_right)
            if self._is_same(q0, q1, laid):
                left = torch.cat((laid.left, torch.arange(start, piece.q0)))
                return left, right, wide, None
        return left, right, wide, "has other pairs where its keys are laid side by side"

    def _narrow(self) -> tuple[int, int, Tensor]:
        """The queries without those at either end that are wide, and the wide ones."""
        piece = self.piece
        q0, q1 = piece.q0, piece.q1
        marked = torch.empty(0, dtype=torch.int64)
        if piece.marks is not None and any(pattern.marked_sides[0] for pattern in self.patterns):
            marked = piece.marks[q0 : q1 + 1].nonzero().flatten() + q0
        count = min(MOST_WIDE, q1 + 1 - q0)
        front = int(self._are_wide(torch.arange(q0, q0 + count)).int().cumprod(0).sum())
        back = int(self._are_wide(torch.arange(q1, q1 - count, -1)).int().cumprod(0).sum())
        if front + back and q1 + 1 - q0 > front + back:
            whole, rest = (
                sum(len(self._seen(a, z, *side)) for side in piece.sides)
                for a, z in ((q0, q1), (q0 + front, q1 - back))
            )
            if whole - rest >= SAVED_BY_WIDE * (front + back):
                ends = torch.cat((torch.arange(q0, q0 + front), torch.arange(q1 - back + 1, q1 + 1)))
                return q0 + front, q1 - back, torch.cat((marked, ends)).unique()
        return q0, q1, marked

    def _are_wide(self, queries: Tensor) -> Tensor:
        """Which queries see all that lies before the part, or all that lies behind it; bool."""
        found = torch.zeros(len(queries), dtype=torch.bool)
        for k0, k1 in self.piece.sides:
            state = self._state(queries, queries, torch.full_like(queries, k0), torch.full_like(queries, k1))
            found |= (state == FULL).any(0)
        return found

    def _seen(self, q0: int, q1: int, k0: int, k1: int) -> Tensor:
        """Those of the keys `k0..k1` that any of the queries `q0..q1` sees, in order."""
        first = torch.arange(k0, k1 + 1, KEYS_AT_ONCE)
        kept = first[self._see(q0, q1, first, (first + KEYS_AT_ONCE - 1).clamp(max=k1))]
        keys = (kept[:, None] + torch.arange(KEYS_AT_ONCE)).flatten()
        keys = keys[keys <= k1]
        return keys[self._see(q0, q1, keys, keys)]

    def _see(self, q0: int, q1: int, k0: Tensor, k1: Tensor) -> Tensor:
        return (self._state(torch.full_like(k0, q0), torch.full_like(k0, q1), k0, k1) != EMPTY).any(0)

    def _state(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
        """The state of rectangles by each pattern, `[patterns, T]`; no query counts as marked."""
        first = self.piece.first
        marks = self._marks(k0, k1)
        of_each = [pattern.blocks(q0 - first, q1 - first, k0 - first, k1 - first, marks) for pattern in self.patterns]
        return torch.stack([state.expand_as(k0) for state in of_each])

    def _marks(self, k0: Tensor, k1: Tensor) -> Marks:
        marks = self.piece.marks
        if marks is None:
            return Marks(length=self.length)
        running = pad(marks.long().cumsum(0), (1, 0))
        count = running[k1 + 1] - running[k0]
        state = ((count > 0).to(torch.int8) + (count == k1 + 1 - k0)).to(torch.int8)
        return Marks(torch.zeros_like(state), state, self.length)

    def _periods(self) -> list[int]:
        """Distances by which keys might move and the pattern be the same: any, or a multiple of its numbers."""
        numbers = sorted(self._numbers() - {0, 1})
        common = math.lcm(*numbers)
        return [1, *numbers, *([common] if common <= LONGEST_PERIOD else [])]

    def _numbers(self) -> set[int]:
        return {number for pattern in self.patterns for number in _numbers(pattern)}

    def _is_same(self, q0: int, q1: int, laid: _Laid) -> bool:
        """Does the pattern hold the same pairs of these queries and keys once they are laid side by side?"""
        first, shift = self.piece.first, laid.shift(self.piece.first)
        single = torch.cat((laid.left, laid.right))
        if len(single):
            behind = torch.arange(len(laid.right)) + laid.end - first - shift + 1
            laid_at = torch.cat((torch.arange(len(laid.left)), behind))
            queries = torch.full_like(single, q0 - first), torch.full_like(single, q1 - first)
            marks = self._marks(single, single)
            for pattern in self.patterns:
                before = pattern.blocks(*queries, single - first, single - first, marks)
                moved = queries[0] - shift, queries[1] - shift
                after = pattern.blocks(*moved, laid_at, laid_at, marks._replace(length=laid.length))
                if bool((before != after).any()) or bool((before == PARTIAL).any()):
                    return False
        asks_length = any(pattern.uses_length for pattern in self.patterns) and laid.length != self.length
        if not shift and not asks_length:
            return True
        extent = max(q1 + 1 - q0, laid.end + 1 - laid.start)
        side = 1 << max(LEAST_SIDE, -(-extent // SQUARES)).bit_length()
        q, k = (t.flatten() for t in torch.meshgrid(
            torch.arange(q0, q1 + 1, side) - first, torch.arange(laid.start, laid.end + 1, side) - first, indexing="ij"
        ))  # fmt: skip
        return all(
            self._are_same(pattern, (q, k), (q1 - first, laid.end - first), side, laid) for pattern in self.patterns
        )

    def _are_same(
        self, pattern: Pattern, squares: tuple[Tensor, Tensor], ends: tuple[int, int], side: int, laid: _Laid
    ) -> bool:  # fmt: skip
        """Does a pattern hold the same pairs of squares where they are laid?

        Those that are told apart are cut into smaller ones, unless all of their pairs are held, or none.

        Args:
            squares: their first queries and keys, `[T]` each.
            ends: the last query and the last key; what squares hold beyond does not count.
        """
        (q, k), shift, length, most = squares, laid.shift(self.piece.first), laid.length, MOST_CUT
        while len(q):
            before = pattern.signature(q, k, side, Marks(length=self.length))
            after = pattern.signature(q - shift, k - shift, side, Marks(length=length))
            if before is None or after is None:
                return False
            differs = torch.zeros_like(q, dtype=torch.bool)
            for one, other in zip(before, after, strict=True):
                differs |= one != other
            q, k = q[differs], k[differs]
            last = side - 1
            states = [
                pattern.blocks(q - by, q + last - by, k - by, k + last - by, Marks(length=n))
                for by, n in ((0, self.length), (shift, length))
            ]
            differs = (states[0] != states[1]) | (states[0] == PARTIAL)
            q, k = q[differs], k[differs]
            if len(q) > most or (len(q) and side == 1):
                return False
            side, most = side // 2, 2 * most
            q, k = (
                torch.cat([t + side * step for step in steps]) for t, steps in ((q, (0, 0, 1, 1)), (k, (0, 1, 0, 1)))
            )
            counts = (q <= ends[0]) & (k <= ends[1])
            q, k = q[counts], k[counts]
        return True


@dataclass(frozen=True, eq=False)
class _Laid:
    """Keys side by side: single ones, the run `start..end` with the part within it, and single ones behind."""

    left: Tensor
    start: int
    end: int
    right: Tensor

    def shift(self, first: int) -> int:
        """By how much the positions of the run get less."""
        return self.start - first - len(self.left)

    @property
    def length(self) -> int:
        return len(self.left) + self.end + 1 - self.start + len(self.right)


def _run_down(keys: Tensor, begin: int) -> int:
    """Where the run of keys begins that ends before `begin`."""
    expected = torch.arange(begin - len(keys), begin)
    return begin - int((keys == expected).flip(0).int().cumprod(0).sum())


def _run_up(keys: Tensor, end: int) -> int:
    """Where the run of keys ends that begins behind `end`."""
    return end + int((keys == torch.arange(end + 1, end + 1 + len(keys))).int().cumprod(0).sum())


def _aligned(keys: Tensor, begin: int, first: int, period: int) -> int:
    """The last key, at or before `begin`, from which a run moves by a multiple of `period`."""
    if period == 1:
        return begin
    # a step back moves the run by one less, unless it takes in a key
    starts = torch.arange(begin, max(first, begin - period - len(keys)) - 1, -1)
    moved = starts - first - torch.searchsorted(keys, starts)
    return int(starts[(moved % period == 0).int().argmax()])


def _numbers(pattern: Pattern) -> set[int]:
    """The numbers that a pattern's fields hold, and those of its parts."""
    found: set[int] = set()
    for part in getattr(pattern, "parts", (pattern,)):
        if part is not pattern:
            found |= _numbers(part)
            continue
        values = [getattr(part, one.name) for one in fields(part)]  # pyright: ignore[reportArgumentType]
        found |= {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
    return found
