"""What a choice is made from: pairs that the rest of a pattern leaves out.

Legend: B batch, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ...pattern import Pattern
from ...pattern.forms import EVERYTHING
from ...plan import BlockPlan
from ...plan.cache import kept
from ...plan.lsh import leaves_out_future, sequence_bounds
from ..chosen.best_keys import Limits

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
