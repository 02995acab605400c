"""The primitives that are plain arithmetic on positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import EMPTY, Marks, Pattern, joint, state, whole
from .words import recipe


@dataclass(frozen=True)
class Window(Pattern):
    """Keys from `left` before the query to `right` after it, both ends inclusive; None is no limit.

    Examples:
        >>> torch.where(Window(2, 1).allows(torch.tensor(5), torch.arange(10)))[0].tolist()
        [3, 4, 5, 6]
    """

    left: int | None
    right: int | None
    word = "window"

    def __post_init__(self):
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                whole(f"window: {name}", getattr(self, name), 0)

    def allows(self, q, k, marks=None):
        allowed = joint(q, k)
        if self.left is not None:
            allowed = allowed & (k >= q - self.left)
        if self.right is not None:
            allowed = allowed & (k <= q + self.right)
        return allowed

    def blocks(self, q0, q1, k0, k1, marks=None):
        full = joint(q0, k0)
        empty = ~full
        if self.left is not None:
            empty, full = empty | (k1 < q0 - self.left), full & (k0 >= q1 - self.left)
        if self.right is not None:
            empty, full = empty | (k0 > q1 + self.right), full & (k1 <= q0 + self.right)
        return state(empty, full)

    def signature(self, q0, k0, side, marks=None):
        ends = [end for end in (None if self.left is None else -self.left, self.right) if end is not None]
        # all distances are alike that lie beyond an end by a side
        return [(k0 - q0).clamp(min(ends) - side, max(ends) + side)] if ends else []

    def reachable(self, k, q):
        return joint(q, k) if self.left is None else q <= k + self.left

    @property
    def grain(self) -> int:
        return 0 if self.left is None and not self.right else 1

    def narrowed(self, other: Window) -> Window:
        """The pairs that both windows hold."""
        sides = ((self.left, other.left), (self.right, other.right))
        left, right = (min((x for x in side if x is not None), default=None) for side in sides)
        return Window(left, right)

    def widened(self, other: Window) -> Window:
        """The pairs that either window holds: each holds the diagonal, so that the union is a window too."""
        sides = ((self.left, other.left), (self.right, other.right))
        left, right = (None if one is None or two is None else max(one, two) for one, two in sides)
        return Window(left, right)


@dataclass(frozen=True)
class First(Pattern):
    """Pairs whose query or key is among the first `n` positions: sinks in a causal model, global tokens in an encoder.

    Examples:
        >>> torch.where(First(2).allows(torch.tensor(5), torch.arange(8)))[0].tolist()
        [0, 1]
    """

    n: int
    word = "first"

    def __post_init__(self):
        whole("first: n", self.n, 0)

    def allows(self, q, k, marks=None):
        return (q < self.n) | (k < self.n)

    def blocks(self, q0, q1, k0, k1, marks=None):
        return state((q0 >= self.n) & (k0 >= self.n), (q1 < self.n) | (k1 < self.n))

    def signature(self, q0, k0, side, marks=None):
        return [q0.clamp(max=self.n), k0.clamp(max=self.n)]

    def reachable(self, k, q):
        return (q < self.n) | (k < self.n)

    @property
    def grain(self) -> int:
        return self.n


@dataclass(frozen=True)
class Marked(Pattern):
    """Pairs whose query or key is marked in this batch: `global_attention_mask`, or token ids named in the configuration.

    Examples:
        >>> str(Window(128, 128) | Marked())
        'window(128, 128) | marked()'
    """

    word = "marked"

    def allows(self, q, k, marks=None):
        return ~joint(q, k) if marks is None or marks.q is None or marks.k is None else marks.q | marks.k

    def blocks(self, q0, q1, k0, k1, marks=None):
        if marks is None or marks.q is None or marks.k is None:
            return torch.full_like(q0 + k0, EMPTY).to(torch.int8)
        return torch.maximum(marks.q, marks.k)

    def signature(self, q0, k0, side, marks=None):
        return []

    def reachable(self, k, q):
        return joint(q, k)

    @property
    def marked_sides(self) -> tuple[bool, bool]:
        return True, True

    @property
    def marks_add(self) -> bool:
        return True

    @property
    def grain(self) -> int:
        return 0


@dataclass(frozen=True)
class MarkedKeys(Marked):
    """Pairs whose key is marked: every token sees the marked ones, which see no more than others.

    The half of `marked()` that is left where marked queries have an attention of their own (Longformer).

    Examples:
        >>> str(Window(128, 128) | MarkedKeys())
        'window(128, 128) | marked_keys()'
    """

    word = "marked_keys"
    signature, reachable, grain = Marked.signature, Marked.reachable, Marked.grain
    # which of the two `marks` counts
    side = 1

    def allows(self, q, k, marks=None):
        if marks is None or marks[self.side] is None:
            return ~joint(q, k)
        return marks[self.side] & joint(q, k)

    def blocks(self, q0, q1, k0, k1, marks=None):
        empty = super().blocks(q0, q1, k0, k1)
        return empty if marks is None or marks[self.side] is None else torch.maximum(empty, marks[self.side])

    @property
    def marked_sides(self) -> tuple[bool, bool]:
        return self.side == 0, self.side == 1


@dataclass(frozen=True)
class MarkedQueries(MarkedKeys):
    """Pairs whose query is marked: the other half of `marked()`.

    Examples:
        >>> str(Window(128, 128) | MarkedQueries())
        'window(128, 128) | marked_queries()'
    """

    word = "marked_queries"
    side = 0


@dataclass(frozen=True)
class Stride(Pattern):
    """Pairs whose distance is a multiple of `step` (Child et al., arXiv:1904.10509, section 4.2).

    `window(a, b) & stride(d)` is a dilated window.

    Examples:
        >>> torch.where(Stride(3).allows(torch.tensor(5), torch.arange(10)))[0].tolist()
        [2, 5, 8]
    """

    step: int
    word = "stride"

    def __post_init__(self):
        whole("stride: step", self.step, 1)

    def allows(self, q, k, marks=None):
        return (q - k) % self.step == 0

    def blocks(self, q0, q1, k0, k1, marks=None):
        # a multiple of step lies between the smallest and the largest distance?
        least, most = q0 - k1, q1 - k0
        none = torch.div(most, self.step, rounding_mode="floor") * self.step < least
        single = (least == most) & ~none
        return state(none, single | (self.step == 1))

    def signature(self, q0, k0, side, marks=None):
        return [(k0 - q0) % self.step]

    def reachable(self, k, q):
        return joint(q, k)


@dataclass(frozen=True)
class Fixed(Pattern):
    """Same block of `block` positions, or the key is one of the last `summary` of its block (arXiv:1904.10509, 4.2).

    Examples:
        >>> torch.where(Fixed(4, summary=1).allows(torch.tensor(9), torch.arange(12)))[0].tolist()
        [3, 7, 8, 9, 10, 11]
    """

    block: int
    summary: int
    word = "fixed"

    def __post_init__(self):
        whole("fixed: block", self.block, 1)
        if whole("fixed: summary", self.summary, 0) > self.block:
            raise ValueError(f"fixed: summary is {self.summary}; it must be at most block, {self.block}")

    def allows(self, q, k, marks=None):
        return (q // self.block == k // self.block) | self._summary(k)

    def _summary(self, k):
        return k % self.block >= self.block - self.summary

    def blocks(self, q0, q1, k0, k1, marks=None):
        same = (q0 // self.block == q1 // self.block) & (k0 // self.block == k1 // self.block)
        same = same & (q0 // self.block == k0 // self.block)
        apart = (q1 // self.block < k0 // self.block) | (k1 // self.block < q0 // self.block)
        # position of the last key in its block, counted from the end: a summary key lies in the range if the range
        # reaches one of its block's last positions, or wraps into the next block
        reaches = self._summary(k1) | (k0 // self.block != k1 // self.block)
        only = self._summary(k0) & self._summary(k1) & (k0 // self.block == k1 // self.block)
        only = only | joint(q0, k0) if self.summary == self.block else only
        return state(apart & ~(reaches & (self.summary > 0)), same | only)

    def signature(self, q0, k0, side, marks=None):
        return Chunk(self.block).signature(q0, k0, side)

    def reachable(self, k, q):
        return (k // self.block >= q // self.block) | self._summary(k)


@dataclass(frozen=True)
class Summary(Pattern):
    """The key is one of the last `count` of its block of `block` positions: the far half of `fixed` (arXiv:1904.10509, 4.2).

    Examples:
        >>> torch.where(Summary(4, count=1).allows(torch.tensor(9), torch.arange(12)))[0].tolist()
        [3, 7, 11]
    """

    block: int
    count: int
    word = "summary"

    def __post_init__(self):
        whole("summary: block", self.block, 1)
        if whole("summary: count", self.count, 1) > self.block:
            raise ValueError(f"summary: count is {self.count}; it must be at most block, {self.block}")

    def _is_summary(self, k):
        return k % self.block >= self.block - self.count

    def allows(self, q, k, marks=None):
        return joint(q, k) & self._is_summary(k)

    def blocks(self, q0, q1, k0, k1, marks=None):
        # keys that reach beyond a block hold its last position
        within = k0 // self.block == k1 // self.block
        only = (within & self._is_summary(k0)) | (self.count == self.block)
        return state(joint(q0, k0) & within & ~self._is_summary(k1), joint(q0, k0) & only)

    def signature(self, q0, k0, side, marks=None):
        return [k0 % self.block]

    def reachable(self, k, q):
        return joint(q, k) & self._is_summary(k)


@dataclass(frozen=True)
class Chunk(Pattern):
    """The key's chunk of `size` positions is the query's, or one of the `left` before it or the `right` after it.

    A window that is aligned to blocks: BigBird's is `chunk(64, 1, 1)`, Reformer's causal one `chunk(64, 1) & causal()`.

    Examples:
        >>> torch.where(Chunk(4, left=1).allows(torch.tensor(5), torch.arange(12)))[0].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    size: int
    left: int = 0
    right: int = 0
    word = "chunk"

    def __post_init__(self):
        whole("chunk: size", self.size, 1)
        whole("chunk: left", self.left, 0)
        whole("chunk: right", self.right, 0)

    def allows(self, q, k, marks=None):
        apart = k // self.size - q // self.size
        return (apart >= -self.left) & (apart <= self.right)

    def blocks(self, q0, q1, k0, k1, marks=None):
        # how many chunks after the query's the key's is, at least and at most
        least, most = k0 // self.size - q1 // self.size, k1 // self.size - q0 // self.size
        return state((most < -self.left) | (least > self.right), (least >= -self.left) & (most <= self.right))

    def signature(self, q0, k0, side, marks=None):
        # chunks that a side reaches into
        most = side // self.size + 2
        apart = (k0 // self.size - q0 // self.size).clamp(-self.left - most, self.right + most)
        return [q0 % self.size, k0 % self.size, apart]

    def reachable(self, k, q):
        return k // self.size >= q // self.size - self.left

    @property
    def grain(self) -> int:
        return self.size


@dataclass(frozen=True)
class Last(Pattern):
    """Pairs whose query or key is in one of the last `n` chunks of `size` positions; the very last chunk may be short.

    Where the last one is depends on the length of the sequence, so that a causal model, whose text goes on, has none.

    Examples:
        >>> str(Last(1, size=64) | Window(64, 64))
        'last(1, 64) | window(64, 64)'
    """

    n: int
    size: int = 1
    word = "last"

    def __post_init__(self):
        whole("last: n", self.n, 0)
        whole("last: size", self.size, 1)

    def _begin(self, marks: Marks | None):
        """The first position that is last, or None if the sequence goes on."""
        length = None if marks is None else marks.length
        return None if length is None else ((length + self.size - 1) // self.size - self.n) * self.size

    def allows(self, q, k, marks=None):
        begin = self._begin(marks)
        return ~joint(q, k) if begin is None else (q >= begin) | (k >= begin)

    def blocks(self, q0, q1, k0, k1, marks=None):
        begin = self._begin(marks)
        if begin is None:
            return torch.full_like(q0 + k0, EMPTY).to(torch.int8)
        return state((q1 < begin) & (k1 < begin), (q0 >= begin) | (k0 >= begin))

    def signature(self, q0, k0, side, marks=None):
        begin = self._begin(marks)
        return [] if begin is None else [(begin - first).clamp(0, side) for first in (q0, k0)]

    def reachable(self, k, q):
        return joint(q, k)

    @property
    def uses_length(self) -> bool:
        return True

    def unending(self) -> Pattern | None:
        return None

    @property
    def grain(self) -> int:
        return self.size


@recipe
def causal() -> Pattern:
    """Every key up to the query.

    Examples:
        >>> str(causal())
        'window(None, 0)'
    """
    return Window(None, 0)


@recipe
def full() -> Pattern:
    """Every pair: dense attention.

    Examples:
        >>> full() == Pattern.parse("dense")
        True
    """
    return Window(None, None)
