"""Attention by patterns that choose pairs by content: what positions say on any backend, what is chosen on its own, merged exactly.

Legend: B batch, H query heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...pattern import First
from ...pattern.forms import CutContent, read_content
from ...plan import BlockPlan, find_plan
from ..autograd import AutogradBackend
from ..backend import AttentionCall, Backend, Given, Gradients, Results
from ..backends.reference import with_weights
from ..left_out import tell
from ..merge import merge


@dataclass(frozen=True, eq=False)
class ContentPlan:
    """The pairs that positions say, and those that are chosen: each pair is in one of the two.

    Attributes:
        chosen: the plan of the pairs that are chosen, as the kind's backend takes it.
    """

    positions: BlockPlan
    chosen: Any

    @property
    def is_all_chosen(self) -> bool:
        """Do positions alone hold nothing?"""
        return self.positions.patterns == (First(0),)

    @property
    def joined(self) -> BlockPlan | None:
        """One plan of both kinds of pairs, where there is one."""
        return None

    @property
    def backend(self) -> Backend | None:
        """What computes all pairs of this plan, where it is no plan in blocks."""
        return None

    @property
    def is_told(self) -> bool:
        """Is what the choice leaves out to be told?"""
        return False

    @property
    def left_out(self) -> Tensor | None:
        """The share of the weights of each query that the choice leaves out, `[B, H, Q]`, where it is known."""
        return None

    def chosen_mask(self, call: AttentionCall, queries: Tensor) -> Tensor:
        """The pairs of queries `[m]` that are chosen, `[B, H, m, K]` bool."""
        raise NotImplementedError


@dataclass(frozen=True)
class Kind:
    """A way to choose pairs.

    Args:
        name: what logs and tests call it.
        backends: names of backends that may be asked for.
        make_plan: from a call, what chooses, and the plan of positions.
        backend: what computes the pairs that are chosen.
        why_not: why a call cannot be run, None if it can.
        in_tiles: are its plans tables of tiles, which not every backend of "auto" takes?
    """

    name: str
    backends: tuple[str, ...]
    make_plan: Callable[[AttentionCall, tuple[CutContent, ...], BlockPlan], ContentPlan]
    backend: Backend
    why_not: Callable[[AttentionCall], str | None]
    in_tiles: bool = False


@dataclass(frozen=True)
class ContentPairs(Backend):
    """Pairs of positions on the backend that `pick` chooses, and those that are chosen on that of their kind."""

    kind: Kind
    pick: Callable[[AttentionCall], Backend]

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kind.name

    def why_not(self, call: AttentionCall) -> str | None:
        return self.kind.why_not(call)

    def forward(self, call: AttentionCall) -> Results:
        found = [backend.forward(part) for backend, part in self._parts(call)]
        if call.q.numel():
            _tell(planned(call, self.kind), call)
        return merge(found) if len(found) > 1 else found[0]

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        found = [backend.backward(part, given)[:3] for backend, part in self._parts(call)]
        q, k, v = (reduce(torch.add, grads) for grads in zip(*found, strict=True))
        return q, k, v, None

    def _parts(self, call: AttentionCall) -> list[tuple[Backend, AttentionCall]]:
        """The calls over pairs of positions and over those that are chosen, or over both, and what computes them."""
        if not call.q.numel():
            # nobody chooses
            positions = call.part(call.q, call.k, call.v, positions_plan(call), call.dropout)
            return [(self.pick(positions), positions)]
        plan = planned(call, self.kind)
        if plan.backend is not None:
            return [(plan.backend, call.part(call.q, call.k, call.v, plan, call.dropout))]
        if plan.joined is not None:
            joined = call.part(call.q, call.k, call.v, plan.joined, call.dropout)
            return [(self.pick(joined), joined)]
        positions, chosen = (
            call.part(call.q, call.k, call.v, one, call.dropout) for one in (plan.positions, plan.chosen)
        )
        of_choice = self.kind.backend, chosen
        return [of_choice] if plan.is_all_chosen else [(self.pick(positions), positions), of_choice]


class DenseContentPairs(AutogradBackend, ContentPairs):
    """The specification: one dense mask of positions and choices, differentiated by autograd. O(n^2)."""

    def forward(self, call: AttentionCall) -> Results:
        out, lse, _ = dense_weights(call, self.kind)
        return out, lse


def dense_weights(call: AttentionCall, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse and the weights `[B, H, Q, K]`, from one dense mask. O(n^2)."""
    queries, plan = torch.arange(call.q.shape[2], device=call.q.device), planned(call, kind)
    _tell(plan, call)
    return with_weights(call, held_by(plan, call, queries))


def _tell(plan: ContentPlan, call: AttentionCall) -> None:
    if plan.is_told:
        tell(str(call.pattern), plan.left_out)


def held_by(plan: ContentPlan, call: AttentionCall, queries: Tensor) -> Tensor:
    """The pairs of queries `[m]`, of positions and chosen, `[B, H, m, K]` bool."""
    rows, keys = (torch.arange(n, device=queries.device) for n in (call.q.shape[0], call.k.shape[2]))
    positions = plan.positions.allows(rows[:, None, None, None], 0, queries[:, None], keys)
    return plan.chosen_mask(call, queries) | positions


def planned(call: AttentionCall, kind: Kind) -> ContentPlan:
    """The plan of a call, which its backward pass finds again."""
    if call.chosen_plan is None:
        assert call.pattern is not None
        call.chosen_plan = kind.make_plan(call, read_content(call.pattern).chosen, positions_plan(call))
    return call.chosen_plan


def positions_plan(call: AttentionCall) -> BlockPlan:
    """The plan of what positions say."""
    assert call.pattern is not None
    return find_plan(replace(call.plan_key, pattern=read_content(call.pattern).positions), call.batch)
