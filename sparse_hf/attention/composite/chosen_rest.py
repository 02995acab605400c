"""What a choice is made from: pairs that the rest of a pattern leaves out.

Legend: B batch, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ...pattern import First, Pattern
from ...pattern.forms import EVERYTHING, read_window
from ...plan import BlockPlan
from ...plan.cache import kept
from ...plan.lsh import leaves_out_future, sequence_bounds
from ..chosen.best_keys import Limits
from ..chosen.choice import Band

# of so many plans
RESTS_KEPT = 8


@dataclass(frozen=True, eq=False)
class Rest:
    """What a choice is made from: keys of the query's sequence, within the cut, that positions do not hold."""

    positions: BlockPlan
    cut: BlockPlan
    is_causal: bool
    batch: int

    def _rows(self, dims: int) -> Tensor:
        rows = self.batch if self.positions.sequences.rows > 1 else 1
        return torch.arange(rows, device=self.positions.device).view(-1, *(1,) * (dims - 1))

    def holds(self, q: Tensor, k: Tensor) -> Tensor:
        """May query q choose key k, by index? Of their joint shape, with four dimensions; the first is B or 1."""
        b = self._rows(4)
        return self.cut.allows(b, 0, q, k) & ~self.positions.allows(b, 0, q, k)

    @kept
    def band(self) -> Band | None:
        """What queries of a single text may choose, where they choose of the past, by distance and the first keys alone."""
        positions, length = self.positions.patterns[0], self.positions.kv_len
        cut = read_window(self.cut.patterns[0], length)
        if (
            not self.positions.is_bare
            or not self.is_causal
            or isinstance(cut, str)
            or cut.has_globals
            or cut.window is None
        ):
            return None
        most = length if cut.window.left is None else cut.window.left
        if positions == First(0):
            return Band(0, most, 0)
        held = read_window(positions, length, of_any_reach=True)
        if isinstance(held, str) or held.marked or held.clip.left is not None:
            return None
        if held.window is None:
            return Band(0, most, held.first)
        return None if held.window.left is None else Band(held.window.left + 1, most, held.first)

    @property
    def limits(self) -> Limits:
        return Limits(q_offset=self.positions.q_offset if self.is_causal else None, allows=self.holds)

    @kept
    def bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the sequence of each token starts and ends, and whether it is real: `[B or 1, K]`."""
        return sequence_bounds(self.positions, self._rows(1).shape[0], self.positions.device)


@lru_cache(maxsize=RESTS_KEPT)
def find_rest(positions: BlockPlan, cut: Pattern | None, batch: int) -> Rest:
    """What a choice is made from that is cut to `cut`, beside the plan of what positions say, of `batch` rows."""
    within = replace(positions, patterns=(EVERYTHING if cut is None else cut,))
    return Rest(positions, within, leaves_out_future(cut), batch)
