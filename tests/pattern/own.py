"""Patterns as a user writes them, in a module of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_hf import First, Marked, Pattern, RandomBlocks, Stride, Window
from sparse_hf.pattern.base import PARTIAL, joint, state


@dataclass(frozen=True)
class EveryNth(Pattern):
    """Keys whose position is `offset` modulo `n`: the least that a pattern defines."""

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


@dataclass(frozen=True)
class Unmarked(Pattern):
    """Keys that are not marked: marks take pairs away."""

    def allows(self, q, k, marks=None):
        return joint(q, k) if marks is None or marks.k is None else joint(q, k) & ~marks.k

    def blocks(self, q0, q1, k0, k1, marks=None):
        if marks is None or marks.k is None:
            return state(~joint(q0, k0), joint(q0, k0))
        return state(joint(q0, k0) & (marks.k == 2), joint(q0, k0) & (marks.k == 0))

    def reachable(self, k, q):
        return joint(q, k)

    @property
    def marked_sides(self):
        return False, True


@dataclass(frozen=True)
class LastKeys(Pattern):
    """The last `n` keys of a sequence, which a text that goes on does not have."""

    n: int
    word = "last_keys"

    def allows(self, q, k, marks=None):
        if marks is None or marks.length is None:
            return ~joint(q, k)
        return joint(q, k) & (k >= marks.length - self.n)

    def blocks(self, q0, q1, k0, k1, marks=None):
        if marks is None or marks.length is None:
            return state(joint(q0, k0), ~joint(q0, k0))
        begin = marks.length - self.n
        return state(joint(q0, k0) & (k1 < begin), joint(q0, k0) & (k0 >= begin))

    def reachable(self, k, q):
        return joint(q, k)

    @property
    def uses_length(self):
        return True

    def unending(self):
        return None


@dataclass(frozen=True)
class Mirrored(Pattern):
    """A pattern with queries and keys exchanged, and no more than `far` apart."""

    pattern: Pattern
    far: int
    pattern_fields = ("pattern",)

    def allows(self, q, k, marks=None):
        return self.pattern.allows(k, q) & ((q - k).abs() <= self.far)

    def blocks(self, q0, q1, k0, k1, marks=None):
        far, inner = Window(self.far, self.far), self.pattern.blocks(k0, k1, q0, q1)
        return torch.minimum(far.blocks(q0, q1, k0, k1), inner)

    def reachable(self, k, q):
        return Window(self.far, self.far).reachable(k, q)


class _Odd:
    """Only pairs at an odd distance of what the class beside it holds, which other code must not take it for."""

    def allows(self, q, k, marks=None):
        return super().allows(q, k, marks) & ((q - k) % 2 == 1)

    def blocks(self, q0, q1, k0, k1, marks=None):
        return super().blocks(q0, q1, k0, k1, marks).clamp(max=PARTIAL)

    def reachable(self, k, q):
        return super().reachable(k, q)

    signature, grain = Pattern.signature, Pattern.grain


class OddWindow(_Odd, Window):
    pass


class OddFirst(_Odd, First):
    pass


class OddMarked(_Odd, Marked):
    pass


class OddStride(_Odd, Stride):
    pass


class OddRandomBlocks(_Odd, RandomBlocks):
    pass
