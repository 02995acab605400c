"""Chunks that stand in a ring."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Marks, Pattern, joint
from .primitives import Chunk


@dataclass(frozen=True)
class Ring(Pattern):
    """`chunk(size, left, right)` closed to a ring: before the first chunk stands the last one, and after it the first.

    What Reformer's local layers are (Transformers' `_look_adjacent`). Where the ring closes depends on the length, so that
    a causal model, whose text goes on, has the chunks alone.

    Examples:
        >>> torch.where(Ring(2, left=1).allows(torch.tensor(0), torch.arange(6), Marks(length=6)))[0].tolist()
        [0, 1, 4, 5]
    """

    size: int
    left: int = 1
    right: int = 0
    word = "ring"

    def __post_init__(self):
        try:
            _ = self.chunk
        except ValueError as error:
            raise ValueError(str(error).replace(Chunk.word, self.word, 1)) from None

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.size, self.left, self.right)

    def _shifts(self, marks: Marks | None) -> tuple:
        """How far keys are moved, in positions, to stand beside the queries that see them."""
        length = None if marks is None else marks.length
        if length is None:
            return (0,)
        around = (length + self.size - 1) // self.size * self.size
        return 0, around, -around

    def allows(self, q, k, marks=None):
        allowed = ~joint(q, k)
        for shift in self._shifts(marks):
            apart = torch.div(k + shift, self.size, rounding_mode="floor") - q // self.size
            allowed = allowed | (apart >= -self.left) & (apart <= self.right)
        return allowed

    def blocks(self, q0, q1, k0, k1, marks=None):
        states = []
        for shift in self._shifts(marks):
            c0, c1 = (torch.div(k + shift, self.size, rounding_mode="floor") * self.size for k in (k0, k1))
            states.append(self.chunk.blocks(q0, q1, c0, c1))
        return torch.stack(torch.broadcast_tensors(*states)).amax(0)

    def reachable(self, k, q):
        return joint(q, k)

    @property
    def uses_length(self) -> bool:
        return True

    def unending(self) -> Pattern:
        return self.chunk

    @property
    def grain(self) -> int:
        return self.size
