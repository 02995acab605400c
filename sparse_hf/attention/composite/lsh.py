"""Attention by patterns with `lsh(...)`: pairs of hashes in hash order.

Legend: B batch, H query heads, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...pattern import LSH, Pattern
from ...pattern.forms import CutContent
from ...plan import BlockPlan
from ...plan.hash_order import HashedPlan
from ...plan.lsh import Held, hashed_plan
from ..backend import AttentionCall
from ..hashed.hash_order import HashOrder
from .content import ContentPlan, Kind


@dataclass(frozen=True, eq=False)
class LSHPlan(ContentPlan):
    """The pairs that positions say, and those that hashes add."""

    chosen: HashedPlan
    holds: Held

    def chosen_mask(self, call: AttentionCall, queries: Tensor) -> Tensor:
        q, keys = call.q, torch.arange(call.k.shape[2], device=queries.device)
        x = torch.arange(q.shape[0] * q.shape[1], device=q.device)[:, None, None]
        return self.holds(x, queries[:, None], keys).view(*q.shape[:2], len(queries), len(keys))


def _make_plan(call: AttentionCall, chosen: tuple[CutContent, ...], positions: BlockPlan) -> LSHPlan:
    hashes: list[tuple[LSH, Pattern | None]] = []
    for content, cut in chosen:
        assert isinstance(content, LSH)
        hashes.append((content, cut))
    return LSHPlan(positions, *hashed_plan(call.q, call.k, hashes, positions))


def _why_not(call: AttentionCall) -> str | None:
    for name, value in (("softcap", call.scoring.softcap), ("relative_bias", call.scoring.bias)):
        if value is not None:
            return f"lsh(...) does not go with {name}; use patterns of positions in such models"
    return None


HASHES = Kind("lsh", ("auto", "blockwise", "reference"), _make_plan, HashOrder(), _why_not)
