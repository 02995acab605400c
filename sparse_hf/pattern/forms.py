"""Every "read a pattern as ...": windows with global tokens, strides, marked tokens, hashes.

A form says the same pairs as its pattern in numbers that a backend works with; where a pattern has no such form, the reader
returns the reason as text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, reduce

from .base import MAX_TERMS, Intersection, Pattern, Union, written_out
from .complement import Outside
from .lsh import LSH
from .primitives import First, Marked, MarkedKeys, MarkedQueries, Stride, Window


@dataclass(frozen=True)
class WindowForm:
    """`window | clip & (first(first) | marked())`: a pattern without lengths. `window` None holds no pair.

    With `keys_only` it is `marked_keys()` instead of `marked()`, and there is no `first`.
    """

    window: Window | None
    first: int
    marked: bool
    clip: Window
    keys_only: bool = False

    @property
    def has_globals(self) -> bool:
        return self.marked or self.first > 0

    @property
    def has_rows(self) -> bool:
        # with no future, what a global query among the first n sees are global keys: columns hold all of it
        return self.has_globals and not self.keys_only and (self.marked or self.clip.right != 0)


# backends ask for every plan, and each decoded token has one
@lru_cache(maxsize=256)
def read_window(pattern: Pattern, kv_len: int, of_any_reach: bool = False) -> WindowForm | str:
    """The pattern as a `WindowForm` on sequences of at most `kv_len` tokens, or the reason why it is none.

    Global queries see everything, unless they may be `of_any_reach`: then they see what is in `clip`.
    """
    hash_terms = written_out(pattern)
    if hash_terms is None:
        return f"{pattern} has more than {MAX_TERMS} hash_terms when written out"
    windows, clips, first, marks = [], set(), 0, set()
    for term in hash_terms:
        window = reduce(Window.narrowed, (part for part in term if type(part) is Window), Window(None, None))
        window = within(window, kv_len)
        rest = {part for part in term if type(part) is not Window}
        if not rest:
            windows.append(window)
            continue
        count = min((part.n for part in rest if type(part) is First), default=None)
        # by type itself: what derives from these holds other pairs
        marked = {type(part) for part in rest} - {First}
        if not marked <= {Marked, MarkedKeys} or (count is not None and marked):
            return f"{' & '.join(map(str, sorted(rest, key=str)))} is neither a window nor global tokens"
        if count != 0:
            clips.add(window)
            # a marked pair of both kinds is one of the narrower
            marks |= {MarkedKeys if MarkedKeys in marked else Marked} if marked else set()
            first = max(first, count or 0)
    if len(clips) > 1:
        return f"global tokens have different reaches: {', '.join(sorted(map(str, clips)))}"
    window = reduce(Window.widened, windows) if windows else None
    clip = clips.pop() if clips else Window(None, None)
    if window is not None and (not (first or marks) or window.narrowed(clip) == clip):
        # the window holds all that the global tokens would add
        return WindowForm(window, 0, False, Window(None, None))
    keys_only = MarkedKeys in marks and (Marked not in marks)
    if keys_only and first and clip.right != 0:
        return f"the first {first} tokens are queries that see everything, and marked ones keys only"
    shape = WindowForm(window, first, bool(marks), clip, keys_only)
    if not shape.has_globals:
        return f"{pattern} holds no pair"
    if shape.has_rows and clip != Window(None, None) and not of_any_reach:
        return f"global queries that see {clip} only; they must see everything"
    return shape


def within(window: Window, kv_len: int) -> Window:
    return Window(*(None if side is None or side >= kv_len - 1 else side for side in (window.left, window.right)))


@dataclass(frozen=True)
class StrideForm:
    """`stride(step) & window | rest`: a pattern without lengths."""

    step: int
    window: Window
    rest: Pattern | None = None
    shape: WindowForm | None = None  # of the rest

    @property
    def side_by_side(self) -> Pattern:
        """The strided pairs that the rest does not hold, counted in steps; marked are the rest's global tokens."""
        found = in_steps(self.window, self.step)
        if self.shape is not None and self.shape.window is not None:
            found = found & Outside(in_steps(self.shape.window, self.step))
        if self.shape is not None and self.shape.has_globals:
            found = found & Outside(MarkedKeys() if self.shape.keys_only else Marked())
        return found


def read_stride(pattern: Pattern, kv_len: int) -> StrideForm | str:
    """The pattern as `StrideForm` on sequences of at most `kv_len` tokens, or the reason why it is none."""
    hash_terms = written_out(pattern)
    if hash_terms is None:
        return f"{pattern} has too many hash_terms when written out"
    strided, rest = [], []
    for term in hash_terms:
        (strided if any(type(part) is Stride for part in term) else rest).append(term)
    steps = {math.lcm(*(part.step for part in term if type(part) is Stride)) for term in strided}
    if len(steps) != 1 or steps == {1}:
        return f"{pattern} has no stride, or several"
    for term in strided:
        for part in term:
            if type(part) not in (Stride, Window):
                return f"{part} is part of a stride"
    window = within(reduce(Window.widened, map(_window_of, strided)), kv_len)
    if not rest:
        return StrideForm(steps.pop(), window)
    joined = [term[0] if len(term) == 1 else Intersection(term) for term in rest]
    joined = joined[0] if len(joined) == 1 else Union(tuple(joined))
    shape = read_window(joined, kv_len, of_any_reach=True)
    if isinstance(shape, str):
        return f"beside the stride: {shape}"
    if shape.has_globals and window.narrowed(shape.clip) != window:
        return f"the stride reaches further than the global tokens, {shape.clip}"
    if shape.window is not None and shape.window.narrowed(window) == window:
        return f"{shape.window} holds all strided pairs"
    return StrideForm(steps.pop(), window, joined, shape)


def _window_of(term: tuple[Pattern, ...]) -> Window:
    return reduce(Window.narrowed, (part for part in term if type(part) is Window), Window(None, None))


def in_steps(window: Window, step: int) -> Window:
    return Window(*(None if side is None else side // step for side in (window.left, window.right)))


# longer than any text: what a window is must not depend on lengths here
LONGEST = 1 << 30
EVERYTHING = Window(None, None)


@dataclass(frozen=True)
class MarkedForm:
    """A window (None: no pair), whether all queries see the marked keys, and whether marked queries see everything."""

    window: Window | None
    keys: bool
    rows: bool


@lru_cache(maxsize=256)
def read_marked(text: str) -> MarkedForm | None:
    """The parts of a pattern, or None if it is more than these, or speaks of no marks."""
    if text == str(MarkedQueries()):
        return MarkedForm(None, False, True)
    shape = read_window(Pattern.parse(text), LONGEST)
    if isinstance(shape, str) or not shape.marked or shape.first or shape.clip != EVERYTHING:
        return None
    return MarkedForm(shape.window, True, not shape.keys_only)


# a hash, and the pattern of positions to which its pairs are cut
Hashes = list[tuple[LSH, Pattern | None]]


@lru_cache(maxsize=256)
def read_hashes(text: str) -> tuple[str, Hashes]:
    """Split a pattern into what positions say, as text, and what hashes add (nothing: a pattern of positions)."""
    pattern = Pattern.parse(text)
    if not pattern.uses_content:
        return text, []
    found = hash_terms(pattern)
    plain = reduce(Pattern.__or__, [cut for lsh, cut in found if lsh is None] or [First(0)])
    hashes = [(lsh, cut) for lsh, cut in found if lsh is not None]
    if any(cut is not None and cut.uses_marks for _, cut in hashes):
        # no pairs, but the plan keeps the marks
        plain = plain | First(0) & Marked()
    return str(plain), hashes


def hash_terms(pattern: Pattern) -> list[tuple[LSH | None, Pattern | None]]:
    """A pattern as the union of hash_terms: pairs of positions, or hashed pairs cut to those of positions (None: uncut).

    Raises:
        ValueError: an intersection of two hashes, or `lsh_chunks(...)`, which is no set of pairs.
    """
    if not pattern.uses_content:
        return [(None, pattern)]
    if isinstance(pattern, LSH):
        return [(pattern, None)]
    if isinstance(pattern, Union):
        return [term for part in pattern.parts for term in hash_terms(part)]
    if not isinstance(pattern, Intersection):
        raise ValueError(f"{pattern} belongs to hashed layers of sparse_reformer alone; other models take lsh(...)")
    found: list[tuple[LSH | None, Pattern | None]] = [(None, None)]
    for part in pattern.parts:
        found = [_both(one, other) for one in found for other in hash_terms(part)]
    return found


def _both(one: tuple, other: tuple) -> tuple[LSH | None, Pattern | None]:
    hashes = [side[0] for side in (one, other) if side[0] is not None]
    if len(hashes) > 1:
        raise ValueError(f"{hashes[0]} & {hashes[1]}: two hashes cannot be intersected; more buckets make one stricter")
    cuts = [side[1] for side in (one, other) if side[1] is not None]
    return hashes[0] if hashes else None, reduce(Pattern.__and__, cuts) if cuts else None
