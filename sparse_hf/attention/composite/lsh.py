"""Attention by patterns with `lsh(...)`: what positions say on any backend, what hashes add in hash order, merged exactly.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...pattern import Pattern
from ...pattern.forms import read_hashes
from ...plan import BlockPlan, find_plan
from ...plan.hash_order import HashedPlan
from ...plan.lsh import Held, hashed_plan
from ..autograd import AutogradBackend
from ..backend import AttentionCall, Backend, Given, Gradients, Results
from ..backends.reference import with_weights
from ..hashed.hash_order import HashOrder
from ..merge import merge

HASH_ORDER = HashOrder()


@dataclass(frozen=True, eq=False)
class LSHPlan:
    """The pairs that positions say, and those that hashes add: each pair is in one of the two."""

    positions: BlockPlan
    hashed: HashedPlan
    holds: Held

    @property
    def heads(self) -> tuple[int, ...]:
        return self.positions.heads

    @property
    def batch_rows(self) -> int:
        return self.positions.batch_rows

    def to_dense(self, call: AttentionCall) -> Tensor:
        """The mask `[B, H, Q, K]` bool. O(n^2)."""
        q, k = call.q, call.k
        x = torch.arange(q.shape[0] * q.shape[1], device=q.device)[:, None, None]
        queries, keys = (torch.arange(t.shape[2], device=q.device) for t in (q, k))
        mask = self.holds(x, queries[:, None], keys).view(*q.shape[:3], k.shape[2])
        return mask | self.positions.to_dense()


@dataclass(frozen=True)
class HashedPairs(Backend):
    """Pairs of positions on the backend that `pick` chooses, and pairs of hashes in hash order."""

    pick: Callable[[AttentionCall], Backend]
    name = "lsh"

    def why_not(self, call: AttentionCall) -> str | None:
        for name, value in (("softcap", call.scoring.softcap), ("relative_bias", call.scoring.bias)):
            if value is not None:
                return f"lsh(...) does not go with {name}; use patterns of positions in such models"
        return None

    def forward(self, call: AttentionCall) -> Results:
        plan = _planned(call)
        positions, hashed = _calls(call, plan)
        return merge([self.pick(positions).forward(positions), HASH_ORDER.forward(hashed)])

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        plan = _planned(call)
        positions, hashed = _calls(call, plan)
        one = self.pick(positions).backward(positions, given)
        other = HASH_ORDER.backward(hashed, given)
        return one[0] + other[0], one[1] + other[1], one[2] + other[2], None


class DenseHashedPairs(AutogradBackend, HashedPairs):
    """The specification: one dense mask of positions and hashes, differentiated by autograd. O(n^2)."""

    name = "lsh, reference"

    def forward(self, call: AttentionCall) -> Results:
        out, lse, _ = hashed_weights(call)
        return out, lse


def hashed_weights(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse and the weights `[B, H, Q, K]`, from one dense mask. O(n^2)."""
    return with_weights(call, _planned(call).to_dense(call))


def _calls(call: AttentionCall, plan: LSHPlan) -> tuple[AttentionCall, AttentionCall]:
    """The calls over pairs of positions and over pairs of hashes."""
    positions = call.part(call.q, call.k, call.v, plan.positions, call.dropout)
    return positions, call.part(call.q, call.k, call.v, plan.hashed, call.dropout)


def _planned(call: AttentionCall) -> LSHPlan:
    """The plan of a call, which its backward pass finds again."""
    if call.chosen_plan is None:
        assert call.pattern is not None
        plain, hashes = read_hashes(str(call.pattern))
        positions = find_plan(replace(call.plan_key, pattern=Pattern.parse(plain)), call.batch)
        call.chosen_plan = LSHPlan(positions, *hashed_plan(call.q, call.k, hashes, positions))
    return call.chosen_plan
