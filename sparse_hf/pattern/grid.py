"""The primitive that reads positions as places of a grid: patches of an image, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Pattern, state, whole


class _Piece(NamedTuple):
    """Places of whole rows of a range, or of a part of one row; all ends inclusive."""

    exists: Tensor
    row0: Tensor
    row1: Tensor
    column0: Tensor
    column1: Tensor


@dataclass(frozen=True)
class Window2d(Pattern):
    """Pairs of places of a grid that lie at most `radius` rows and at most `radius` columns apart.

    The grid has `height` rows of `width` places and begins at position `offset`, behind the class token and registers. Tokens
    outside of it are in no pair; `window2d(height, width, radius, offset=n) | first(n)` has those in front see all, and all
    see them. In an image of another size rows would end elsewhere: `height` and `width` are those of the patches that the model
    makes, as 16 x 16 of 224 x 224 pixels in patches of 14.

    Examples:
        >>> torch.where(Window2d(3, 3, 1).allows(torch.tensor(0), torch.arange(9)))[0].tolist()
        [0, 1, 3, 4]
    """

    height: int
    width: int
    radius: int
    offset: int = 0
    word = "window2d"

    def __post_init__(self):
        for name, least in (("height", 1), ("width", 1), ("radius", 0), ("offset", 0)):
            whole(f"window2d: {name}", getattr(self, name), least)

    @property
    def end(self) -> int:
        """The first position behind the grid."""
        return self.offset + self.height * self.width

    def _place(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of positions, and whether they are in the grid."""
        at = (position - self.offset).clamp(0, self.height * self.width - 1)
        return at // self.width, at % self.width, (position >= self.offset) & (position < self.end)

    def allows(self, q, k, marks=None):
        (q_row, q_column, q_inside), (k_row, k_column, k_inside) = self._place(q), self._place(k)
        near = ((q_row - k_row).abs() <= self.radius) & ((q_column - k_column).abs() <= self.radius)
        return near & q_inside & k_inside

    def _pieces(self, first: Tensor, last: Tensor) -> list[_Piece]:
        """A range of positions as rectangles: the rest of its first row, its whole rows, the beginning of its last."""
        (row0, column0, _), (row1, column1, _) = self._place(first), self._place(last)
        some = (last >= self.offset) & (first < self.end)
        left, right = torch.zeros_like(column0), torch.full_like(column0, self.width - 1)
        return [
            _Piece(some, row0, row0, column0, torch.where(row0 == row1, column1, right)),
            _Piece(some & (row1 - row0 > 1), row0 + 1, row1 - 1, left, right),
            _Piece(some & (row1 > row0), row1, row1, left, column1),
        ]

    def blocks(self, q0, q1, k0, k1, marks=None):
        within = (q0 >= self.offset) & (k0 >= self.offset) & (q1 < self.end) & (k1 < self.end)
        empty, full = torch.ones_like(within), within
        for q, k in product(self._pieces(q0, q1), self._pieces(k0, k1)):
            exist = q.exists & k.exists
            least, most = _distances(q.row0, q.row1, k.row0, k.row1)
            nearest, farthest = _distances(q.column0, q.column1, k.column0, k.column1)
            empty = empty & (~exist | (least > self.radius) | (nearest > self.radius))
            full = full & (~exist | ((most <= self.radius) & (farthest <= self.radius)))
        return state(empty, full)

    def signature(self, q0, k0, side, marks=None):
        numbers = []
        for corner in (q0, k0):
            at = corner - self.offset
            # where rows begin, and where the grid does and ends; rows below its first are all alike
            numbers += [at % self.width, at.clamp(max=0), (at - self.height * self.width).clamp(-side, 0)]
        rows = torch.div(k0 - self.offset, self.width, rounding_mode="floor")
        rows = rows - torch.div(q0 - self.offset, self.width, rounding_mode="floor")
        far = self.radius + (side - 1) // self.width + 2
        return [*numbers, rows.clamp(-far, far)]

    def reachable(self, k, q):
        row, column, inside = self._place(k)
        last = (row + self.radius).clamp(max=self.height - 1) * self.width
        last = self.offset + last + (column + self.radius).clamp(max=self.width - 1)
        return inside & (q <= last)


def _distances(a0: Tensor, a1: Tensor, b0: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest distance of numbers of two ranges."""
    least = torch.maximum(b0 - a1, a0 - b1).clamp(min=0)
    return least, torch.maximum(b1 - a0, a1 - b0)
