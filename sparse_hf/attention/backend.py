"""The contracts of this floor: what a call is, what a backend does with it, what either may ask of a plan.

Legend: B batch, H query heads, G key heads (G divides H), Q queries, K keys, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..pattern import Pattern
from ..plan import BatchInfo, BlockPlan, PlanKey, find_plan
from .dropout import NO_DROPOUT, Dropout
from .scoring import Scoring

# out `[B, H, Q, D]` in the dtype of q, and lse `[B, H, Q]` in float32 (float64 for float64)
Results = tuple[Tensor, Tensor]
# of q, k, v and the bias (None without one)
Gradients = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


@dataclass(frozen=True, eq=False)
class Given:
    """What a backward pass starts from: out and lse, and their gradients (None is a gradient of zero).

    `out` and `lse` may be those of a whole of which a call computes disjoint pairs: weights are exp(score - lse), so that the
    gradients of such parts add up to those of the whole. A row with infinite lse has no weight at all.

    `into` is memory for the gradients of q, k and v, for backends that say `writes_into`.
    """

    out: Tensor
    lse: Tensor
    grad_out: Tensor | None
    grad_lse: Tensor | None
    into: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def some_grad_out(self) -> Tensor:
        """The gradient of out, zeros where there is none."""
        return torch.zeros_like(self.out) if self.grad_out is None else self.grad_out

    @property
    def some_grad_lse(self) -> Tensor:
        """The gradient of lse, zeros where there is none."""
        return torch.zeros_like(self.lse) if self.grad_lse is None else self.grad_lse


class PlanLike(Protocol):
    """What everybody may ask of a plan, whatever it is made of."""

    @property
    def heads(self) -> tuple[int, ...]:
        """The pattern of each head; empty where all heads share one."""
        ...

    @property
    def batch_rows(self) -> int:
        """Rows of the batch that are told apart; 1 where all are alike."""
        ...


@dataclass(eq=False)
class AttentionCall:
    """One call of attention: tensors, pairs, scores. Backends read it and write to nothing of it.

    Args:
        q: `[B, H, Q, D]`.
        k, v: `[B, G, K, D]`; v may have another head dim.
        pattern: the pairs, as text until they are asked for; None where only a plan says them.
        q_offset: key index of the first query.
        scoring: what happens to a score.
        dropout: of attention weights.
        batch: padding, packed documents and marks.
        wants_lse: must the log-sum-exp be given too?
        recorded: may a CUDA graph record the call, so that nothing may depend on the content of the batch?
        chosen_plan: the plan, where somebody has made it already; else it is made when it is first asked for.
        indexed: the scores that the layer's indexer makes; None without one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern | str | None
    q_offset: int
    scoring: Scoring
    # no defaults, which torch 2.11 cannot trace the making of
    dropout: Dropout
    batch: BatchInfo
    wants_lse: bool = True
    recorded: bool = False
    chosen_plan: Any = None
    indexed: Any = None

    @property
    def plan(self) -> Any:
        """The plan, typed by the backend that made or asked for it; of a pattern, a `BlockPlan`."""
        if self.chosen_plan is None:
            self.chosen_plan = find_plan(self.plan_key, self.batch)
        return self.chosen_plan

    @property
    def blocks(self) -> BlockPlan:
        """The plan in blocks."""
        return self.plan

    @property
    def plan_key(self) -> PlanKey:
        """What a plan of this call depends on beside the batch."""
        assert isinstance(self.pattern, Pattern)
        return PlanKey(self.pattern, self.q.shape[2], self.k.shape[2], self.q_offset, self.q.device)

    @property
    def lone_pattern(self) -> Pattern | None:
        """The pattern that all heads share, where the batch says nothing beside lengths but perhaps marks; else None."""
        if isinstance(self.chosen_plan, BlockPlan):
            return self.chosen_plan.patterns[0] if self.chosen_plan.is_bare else None
        pattern, batch = self.pattern, self.batch
        if (
            not isinstance(pattern, Pattern)
            or not batch.is_empty
            and (batch.segments is not None or batch.without_ones().padding is not None)
        ):
            return None
        if pattern.heads is None:
            return pattern
        return pattern.heads[0] if len(set(pattern.heads)) == 1 else None

    @property
    def trains(self) -> bool:
        """Will gradients be asked for?"""
        if not torch.is_grad_enabled():
            return False
        bias = self.scoring.bias
        return self.q.requires_grad or self.k.requires_grad or self.v.requires_grad or (
            bias is not None and bias.requires_grad
        )  # fmt: skip

    def part(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, dropout: Dropout = NO_DROPOUT) -> AttentionCall:
        """A call over a plan of its own, of which this one is made."""
        return AttentionCall(
            q, k, v, None, self.q_offset, self.scoring, dropout, self.batch, recorded=self.recorded, chosen_plan=plan
        )

    def on(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> AttentionCall:
        """The same call on other tensors."""
        scoring = self.scoring if bias is self.scoring.bias else replace(self.scoring, bias=bias)
        return replace(self, q=q, k=k, v=v, scoring=scoring)


class Backend(Protocol):
    """How a call is computed. One file holds one; `dispatch.BACKENDS` lists those that have a name for users.

    `name` is what a user says. `uses_autograd` says that `forward` is made of operations that autograd can differentiate, and
    `writes_into` that `backward` writes to the memory that it is given for gradients.
    `forward` and `backward` write to nothing but what they give. All backends agree with
    `reference` in out, lse and gradients; the exactness tests take in whatever is registered. A row that may see nothing
    gives 0 and lse -inf, with zero gradient and no NaN.
    """

    name: str
    # a base class would have to be asked for, and a protocol is slow to say what is one of it
    uses_autograd: ClassVar[bool] = False
    writes_into: ClassVar[bool] = False

    def why_not(self, call: AttentionCall) -> str | None:
        """Why the backend cannot run a call, with the remedy; None if it can. Must not run anything."""
        ...

    def is_fastest(self, call: AttentionCall) -> bool:
        """Should "auto" take it for a call that it can run, before those after it in the ladder?"""
        return True

    def tables(self, call: AttentionCall) -> Any:
        """What a recorded CUDA graph of a call goes on to read; it must live as long as the graph."""
        return call.chosen_plan

    def forward(self, call: AttentionCall) -> Results:
        """Out `[B, H, Q, D]` and lse `[B, H, Q]` (anything, where the call does not want it)."""
        ...

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        """Gradients of a call, or of its share where `given` is of a whole of which the call is a part."""
        ...
