"""Which pairs a pattern holds that chooses some of them from queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..pattern.base import as_pattern
from ..plan import of_batch
from .backend import AttentionCall
from .composite.content import ContentPlan, held_by
from .dispatch import content_plan, kind_of
from .dropout import NO_DROPOUT
from .scoring import Scoring


@dataclass(frozen=True, eq=False)
class HeldPairs:
    """The pairs of one call of attention, whose choice is made once."""

    call: AttentionCall
    plan: ContentPlan

    def mask(self, queries: Tensor) -> Tensor:
        """Those of queries `[m]`, `[B, H, m, K]` bool."""
        return held_by(self.plan, self.call, queries)


def held_pairs(
    q: Tensor, k: Tensor, pattern: str, scale: float, softcap: float | None = None, marks: Tensor | None = None
) -> HeldPairs:
    """The pairs that attention of q `[B, H, n, D]` and k `[B, G, n, D]` computes under a pattern that chooses by content.

    Args:
        marks: bool `[1 or B, n]`, of the tokens that `marked()` speaks of.

    Raises:
        NotImplementedError: the pattern asks for more than queries and keys, such as the scores of an indexer.
    """
    scoring, batch = Scoring(scale, softcap), of_batch(None, None, marks)
    call = AttentionCall(q, k, k, as_pattern(pattern), 0, scoring, NO_DROPOUT, batch)
    reason = kind_of(call).why_not(call)
    if reason is not None:
        raise NotImplementedError(f"{pattern}: {reason}")
    return HeldPairs(call, content_plan(call))
