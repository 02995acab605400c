"""Every "read a pattern as ...": windows with global tokens, strides, marked tokens, pairs by content.

A form says the same pairs as its pattern in numbers that a backend works with; where a pattern has no such form, the reader
gives the reason as text. Readers know the classes of this package by `type(x) is ...`, never by `isinstance`: what derives from
them may hold other pairs, and has no form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import and_, or_
from typing import NamedTuple

from .base import MAX_TERMS, Intersection, Pattern, Union, as_pattern, written_out
from .chosen import Threshold, TopK, TopKBlocks, VerticalSlash
from .complement import Outside
from .content import Content
from .lsh import LSH
from .primitives import First, Marked, MarkedKeys, MarkedQueries, Stride, Window

EVERYTHING = Window(None, None)
# what chooses pairs by content, in any model
CONTENT = (LSH, TopK, TopKBlocks, VerticalSlash, Threshold)
# longer than any text, for forms that must not depend on lengths
ANY_LENGTH = 1 << 30
# forms that are kept: backends ask for every plan, and each decoded token has one
FORMS_KEPT = 256


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
        """Are there global tokens?"""
        return self.marked or self.first > 0

    @property
    def has_rows(self) -> bool:
        """Do global tokens, as queries, see more than global keys?"""
        # with no future, what a global query among the first n sees are global keys: columns hold all of it
        return self.has_globals and not self.keys_only and (self.marked or self.clip.right != 0)


class _Term(NamedTuple):
    """One intersection of a pattern that is written out: the pairs within `window`, all of them or those of global tokens."""

    window: Window
    # its global tokens are the first so many
    first: int | None = None
    # or the marked ones: Marked or MarkedKeys
    marks: type[Pattern] | None = None

    @property
    def is_window(self) -> bool:
        return self.first is None and self.marks is None


@lru_cache(maxsize=FORMS_KEPT)
def read_window(pattern: Pattern, kv_len: int, of_any_reach: bool = False) -> WindowForm | str:
    """The pattern as a `WindowForm` on sequences of at most `kv_len` tokens, or the reason why it is none.

    Global queries see everything, unless they may be `of_any_reach`: then they see what is in `clip`.
    """
    written = written_out(pattern)
    if written is None:
        return f"{pattern} has more than {MAX_TERMS} terms when written out"
    terms = []
    for one in written:
        term = _read_term(one, kv_len)
        if isinstance(term, str):
            return term
        terms.append(term)
    form = _joined_form(terms)
    if isinstance(form, str):
        return form
    if not form.has_globals and form.window is None:
        return f"{pattern} holds no pair"
    if form.has_rows and form.clip != EVERYTHING and not of_any_reach:
        return f"global queries that see {form.clip} only; they must see everything"
    return form


def _read_term(term: tuple[Pattern, ...], kv_len: int) -> _Term | str:
    window = within(_window_of(term), kv_len)
    rest = {part for part in term if type(part) is not Window}
    first = min((part.n for part in rest if type(part) is First), default=None)
    marks = {type(part) for part in rest} - {First}
    if not marks <= {Marked, MarkedKeys} or (first is not None and marks):
        return f"{' & '.join(map(str, sorted(rest, key=str)))} is neither a window nor global tokens"
    # a marked pair of both kinds is one of the narrower
    return _Term(window, first, (MarkedKeys if MarkedKeys in marks else Marked) if marks else None)


def _joined_form(terms: Sequence[_Term]) -> WindowForm | str:
    """The union of terms."""
    windows = [term.window for term in terms if term.is_window]
    # the pairs of the first 0 tokens are none
    of_globals = [term for term in terms if not term.is_window and term.first != 0]
    clips = {term.window for term in of_globals}
    if len(clips) > 1:
        return f"global tokens have different reaches: {', '.join(sorted(map(str, clips)))}"
    window = reduce(Window.widened, windows) if windows else None
    clip = clips.pop() if clips else EVERYTHING
    if window is not None and window.narrowed(clip) == clip:
        # the window holds all that the global tokens would add
        return WindowForm(window, 0, False, EVERYTHING)
    first = max((term.first or 0 for term in of_globals), default=0)
    kinds = {term.marks for term in of_globals if term.marks is not None}
    keys_only = kinds == {MarkedKeys}
    if keys_only and first and clip.right != 0:
        return f"the first {first} tokens are queries that see everything, and marked ones keys only"
    return WindowForm(window, first, bool(kinds), clip, keys_only)


def _window_of(term: tuple[Pattern, ...]) -> Window:
    """The pairs that all windows of a term hold."""
    return reduce(Window.narrowed, (part for part in term if type(part) is Window), EVERYTHING)


def within(window: Window, kv_len: int) -> Window:
    """The window on sequences of at most `kv_len` tokens: sides that reach past all of them have no limit."""
    left, right = (None if side is None or side >= kv_len - 1 else side for side in (window.left, window.right))
    return Window(left, right)


@dataclass(frozen=True)
class StrideForm:
    """`stride(step) & window | rest`: a pattern without lengths."""

    step: int
    window: Window
    rest: Pattern | None = None
    rest_form: WindowForm | None = None

    @property
    def shape(self) -> WindowForm | None:
        return self.rest_form

    @property
    def side_by_side(self) -> Pattern:
        """The strided pairs that the rest does not hold, counted in steps; marked are the rest's global tokens."""
        found, rest = in_steps(self.window, self.step), self.rest_form
        if rest is not None and rest.window is not None:
            found = found & Outside(in_steps(rest.window, self.step))
        if rest is not None and rest.has_globals:
            found = found & Outside(MarkedKeys() if rest.keys_only else Marked())
        return found


def read_stride(pattern: Pattern, kv_len: int) -> StrideForm | str:
    """The pattern as a `StrideForm` on sequences of at most `kv_len` tokens, or the reason why it is none."""
    written = written_out(pattern)
    if written is None:
        return f"{pattern} has more than {MAX_TERMS} terms when written out"
    strided = [term for term in written if any(type(part) is Stride for part in term)]
    steps = {math.lcm(*(part.step for part in term if type(part) is Stride)) for term in strided}
    if len(steps) != 1 or steps == {1}:
        return f"{pattern} has no stride, or several"
    others = [part for term in strided for part in term if type(part) not in (Stride, Window)]
    if others:
        return f"{others[0]} is part of a stride"
    (step,) = steps
    window = within(reduce(Window.widened, map(_window_of, strided)), kv_len)
    rest = [reduce(and_, term) for term in written if term not in strided]
    return _stride_beside(step, window, reduce(or_, rest), kv_len) if rest else StrideForm(step, window)


def _stride_beside(step: int, window: Window, rest: Pattern, kv_len: int) -> StrideForm | str:
    form = read_window(rest, kv_len, of_any_reach=True)
    if isinstance(form, str):
        return f"beside the stride: {form}"
    if form.has_globals and window.narrowed(form.clip) != window:
        return f"the stride reaches further than the global tokens, {form.clip}"
    if form.window is not None and form.window.narrowed(window) == window:
        return f"{form.window} holds all strided pairs"
    return StrideForm(step, window, rest, form)


def in_steps(window: Window, step: int) -> Window:
    """The window that a strided one is among tokens of one residue."""
    left, right = (None if side is None else side // step for side in (window.left, window.right))
    return Window(left, right)


@dataclass(frozen=True)
class MarkedForm:
    """A window (None: no pair), whether all queries see the marked keys, and whether marked queries see everything."""

    window: Window | None
    keys: bool
    rows: bool


def read_marked(pattern: Pattern | str) -> MarkedForm | None:
    """The pattern as a `MarkedForm`; None if it is more than that, or asks for no marks."""
    return _read_marked(as_pattern(pattern))


@lru_cache(maxsize=FORMS_KEPT)
def _read_marked(pattern: Pattern) -> MarkedForm | None:
    if pattern == MarkedQueries():
        return MarkedForm(None, False, True)
    form = read_window(pattern, ANY_LENGTH)
    if isinstance(form, str) or not form.marked or form.first or form.clip != EVERYTHING:
        return None
    return MarkedForm(form.window, True, not form.keys_only)


class CutContent(NamedTuple):
    """What chooses pairs by content, and the pattern of positions to which these are cut (None: uncut)."""

    content: Content
    cut: Pattern | None


class ContentForm(NamedTuple):
    """A pattern as what positions say, and what is added by content."""

    positions: Pattern
    chosen: tuple[CutContent, ...]


class ContentTerm(NamedTuple):
    """Pairs of positions (`content` None), or chosen pairs cut to those of positions (`cut` None: uncut)."""

    content: Content | None
    cut: Pattern | None


def read_content(pattern: Pattern | str) -> ContentForm:
    """Split a pattern into what positions say and what is added by content (nothing: a pattern of positions).

    Raises:
        ValueError: an intersection of two that choose by content, or `lsh_chunks(...)`, which is no set of pairs.
    """
    return _read_content(as_pattern(pattern))


@lru_cache(maxsize=FORMS_KEPT)
def _read_content(pattern: Pattern) -> ContentForm:
    if not pattern.uses_content:
        return ContentForm(pattern, ())
    terms = content_terms(pattern)
    positions = reduce(or_, [term.cut for term in terms if term.content is None and term.cut is not None] or [First(0)])
    chosen = tuple(CutContent(term.content, term.cut) for term in terms if term.content is not None)
    if any(one.cut is not None and one.cut.uses_marks for one in chosen):
        # no pairs, but the plan keeps the marks
        positions = positions | First(0) & Marked()
    return ContentForm(positions, chosen)


def content_terms(pattern: Pattern) -> list[ContentTerm]:
    """A pattern as the union of terms.

    Raises:
        ValueError: an intersection of two that choose by content, or `lsh_chunks(...)`, which is no set of pairs.
    """
    if not pattern.uses_content:
        return [ContentTerm(None, pattern)]
    if isinstance(pattern, Content) and type(pattern) in CONTENT:
        return [ContentTerm(pattern, None)]
    if isinstance(pattern, Union):
        return [term for part in pattern.parts for term in content_terms(part)]
    if not isinstance(pattern, Intersection):
        raise ValueError(f"{pattern} belongs to hashed layers of sparse_reformer alone; other models take lsh(...)")
    found = [ContentTerm(None, None)]
    for part in pattern.parts:
        found = [_both(one, other) for one in found for other in content_terms(part)]
    return found


def _both(one: ContentTerm, other: ContentTerm) -> ContentTerm:
    if one.content is not None and other.content is not None:
        raise ValueError(
            f"{one.content} & {other.content}: two hashes or choices cannot be intersected; make one of them stricter"
        )
    cuts = [term.cut for term in (one, other) if term.cut is not None]
    return ContentTerm(other.content if one.content is None else one.content, reduce(and_, cuts) if cuts else None)
