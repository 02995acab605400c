"""Where tokens of a text without end stand among slots whose number does not change.

Legend: B batch, K slots; a position counts the tokens of its own row, padding left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ring(NamedTuple):
    """Position p stands in slot p if it is among the first, else in slot `first + (p - first) % length`."""

    first: int
    length: int

    def __bool__(self) -> bool:
        return self.length > 0

    @property
    def slots(self) -> int:
        return self.first + self.length


NO_RING = Ring(0, 0)


def slots_of(ring: Ring, positions: Tensor) -> Tensor:
    """The slots of positions, of the same shape."""
    return torch.where(positions < ring.first, positions, ring.first + (positions - ring.first) % ring.length)


def positions_in(ring: Ring, count: Tensor) -> Tensor:
    """The last position that each slot has held, `[B, K]`, of rows with `count` `[B]` tokens; -1 where there was none."""
    slots, last = torch.arange(ring.slots, device=count.device), count[:, None] - 1
    turns = torch.div(last - slots, ring.length, rounding_mode="floor")
    found = torch.where(slots < ring.first, slots, slots + turns * ring.length)
    return torch.where((found <= last) & ((slots < ring.first) | (found >= ring.first)), found, -1)


def held_places(ring: Ring, own: Tensor, oldest: Tensor | None) -> Tensor:
    """The positions that slots hold, `[B or 1, K]`, once new tokens at `own` `[B or 1, Q]` are in; -1 for none.

    Args:
        oldest: `[B or 1]`, the position behind the first tokens from which on a slot is read; None where all are.
    """
    found = positions_in(ring, own[:, -1] + 1)
    return found if oldest is None else found.where((found < ring.first) | (found >= oldest[:, None]), -1)
