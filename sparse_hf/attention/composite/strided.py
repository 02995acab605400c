"""StrideForm by regrouping: a window on tokens that lie `step` apart, the rest as it is, merged by log-sum-exp.

Every attention that this is made of is another backend's; `plan/regroup.py` says which pairs are in which. The backward pass
hands each part the merged out and lse, so that gradients add up.

Legend: B batch, H query heads, G key heads, K tokens, D head dim; s the step, N = ceil(K / s), f residues that stand in the
heads' dimension, the others in that of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...plan import AnyPlan, BlockPlan, ByHeads, Regrouped, remembered, strided_plan
from ..autograd import part_gradients
from ..merge import merge
from ..scoring import Scoring

# numbers of the scores that a backend may hold for one batch row
AT_ONCE = 1 << 20
# queries and keys of one product of `blockwise`
TILE = (128, 2048)


def may_regroup(backend: str, scoring: Scoring, dropout: float) -> bool:
    """Dropout and bias are of places in the text, which regrouped tokens have no more; the reference stays as it is."""
    return backend != "reference" and not dropout and scoring.bias is None


@dataclass(frozen=True)
class Composition:
    """Stands where a backend stands; `pick(q, v, plan)` is the backend of each part."""

    pick: Callable[[Tensor, Tensor, BlockPlan], ModuleType]
    # `backward` takes None for a gradient of zero
    NONE_IS_ZERO = True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan, scoring: Scoring, dropout: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Out `[B, H, K, D]` in the dtype of q and lse `[B, H, K]`, differentiable."""
        assert not dropout and scoring.bias is None
        return _Composed.apply(q, k, v, self, plan, scoring)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan, scoring: Scoring) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for group in _groups(plan, q, k):
            own, found = [group.queries(q), group.keys(k), group.keys(v)], []
            for part in group.parts:
                taken = [part.take(t) for t in own]
                results = self.pick(taken[0], taken[2], part.plan).attend(*taken, part.plan, scoring, 0.0, None)
                found.append(tuple(part.put(t, own[0]) for t in results))
            merged = found[0] if len(found) == 1 else merge(found)
            out[:, group.heads], lse[:, group.heads] = merged
        return out, lse

    def backward(
        self, q, k, v, out, lse, grad_out, grad_lse, plan: AnyPlan, scoring: Scoring, dropout: float, seed
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k, v and no bias, given those of out and lse (None: zero)."""
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        totals = [torch.zeros_like(t, dtype=lse.dtype) for t in (q, k, v)]
        for group in _groups(plan, q, k):
            own = [group.queries(q), group.keys(k), group.keys(v)]
            results = [None if t is None else group.queries(t) for t in (out, lse, grad_out, grad_lse)]
            for part in group.parts:
                taken, of_results = ([None if t is None else part.take(t) for t in some] for some in (own, results))
                backend = self.pick(taken[0], taken[2], part.plan)
                grads = part_gradients(backend, taken, *of_results, part.plan, scoring)
                for add, total, grad, like in zip(
                    (group.add_queries, group.add_keys, group.add_keys), totals, grads, own, strict=True
                ):
                    add(total, part.put(grad, like))
        return *(total.to(t.dtype) for total, t in zip(totals, (q, k, v), strict=True)), None


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, composition, plan, scoring):
        out, lse = composition.forward(q, k, v, plan, scoring)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = composition, plan, scoring
        # a gradient of lse that nobody asked for must not cost a pass
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        composition, plan, scoring = ctx.rest
        grads = composition.backward(*ctx.saved_tensors, grad_out, grad_lse, plan, scoring, 0.0, None)
        return *grads[:3], None, None, None


@dataclass(frozen=True)
class _Part:
    """A plan, and how the tokens of which it speaks stand: every `step`-th side by side, or (1) all as they are."""

    plan: BlockPlan
    step: int = 1
    fold: int = 1

    def take(self, t: Tensor) -> Tensor:
        """`[B, H, K, ...]` as `[B * s / f, f * H, N, ...]`."""
        if self.step == 1:
            return t
        short = -t.shape[2] % self.step
        t = torch.nn.functional.pad(t, (*(0, 0) * (t.ndim - 3), 0, short)).unflatten(2, (-1, self.step))
        t = t.movedim(3, 1).unflatten(1, (-1, self.fold))  # [B, s / f, f, H, N, ...]
        return t.flatten(2, 3).flatten(0, 1).contiguous()

    def put(self, t: Tensor, like: Tensor) -> Tensor:
        """The way back, to the batch, heads and tokens of `like`."""
        if self.step == 1:
            return t
        t = t.reshape(like.shape[0], self.step, like.shape[1], *t.shape[2:])  # [B, s, H, N, ...]
        return t.movedim(1, 3).flatten(2, 3)[:, :, : like.shape[2]]


@dataclass(frozen=True)
class _Group:
    """Heads that share a pattern: all of them, or some, which then have a key head each."""

    parts: tuple[_Part, ...]
    heads: Tensor | slice = field(default_factory=lambda: slice(None))
    key_heads: Tensor | slice = field(default_factory=lambda: slice(None))

    def queries(self, t: Tensor) -> Tensor:
        return t[:, self.heads]

    def keys(self, t: Tensor) -> Tensor:
        return t[:, self.key_heads]

    def add_queries(self, total: Tensor, grad: Tensor) -> None:
        total[:, self.heads] += grad

    def add_keys(self, total: Tensor, grad: Tensor) -> None:
        if isinstance(self.key_heads, slice):
            total += grad
        else:
            # a key head may stand here for several heads
            total.index_add_(1, self.key_heads, grad.to(total.dtype))


def _groups(plan: AnyPlan, q: Tensor, k: Tensor) -> Iterator[_Group]:
    if not isinstance(plan, ByHeads):
        yield _Group(_parts(plan, *q.shape[:2]))
        return
    for one, heads in zip(plan.plans, _heads(plan, q.device), strict=True):
        yield _Group(_parts(one, q.shape[0], len(heads)), heads, heads // (q.shape[1] // k.shape[1]))


@remembered
def _heads(plan: ByHeads, device: torch.device) -> list[Tensor]:
    """The heads of each pattern."""
    which = torch.tensor(plan.heads)
    return [(which == p).nonzero().flatten().to(device) for p in range(len(plan.plans))]


def _parts(plan: BlockPlan | Regrouped, batch: int, heads: int) -> tuple[_Part, ...]:
    if isinstance(plan, BlockPlan):
        return (_Part(plan),)
    strided = strided_plan(plan, batch)
    near = () if plan.rest is None else (_Part(plan.rest),)
    return *near, _Part(strided, plan.step, _fold(plan.step, heads, strided))


def _fold(step: int, heads: int, strided: BlockPlan) -> int:
    """How many residues stand side by side as heads: rows that are alike are cheaper together, until memory is short."""
    if strided.batch_rows > 1:
        return 1
    scores = heads * min(TILE[0], strided.q_len) * min(TILE[1], strided.kv_len)
    return max((f for f in range(1, step + 1) if step % f == 0 and f * scores <= AT_ONCE), default=1)
