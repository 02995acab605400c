"""StrideForm by regrouping: a window on tokens that lie `step` apart, the rest as it is, merged by log-sum-exp.

Every attention that this is made of is another backend's; `plan/strided.py` says which pairs are in which. The backward pass
hands each part the merged out and lse, so that gradients add up.

Legend: B batch, H query heads, G key heads, K tokens, D head dim; s the step, N = ceil(K / s), f residues that stand in the
heads' dimension, the others in that of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...plan import AnyPlan, BlockPlan, ByHeads, Regrouped, remembered, strided_plan
from ..backend import AttentionCall, Backend, Given, Gradients, Results
from ..merge import merge

# numbers of the scores that a backend may hold for one batch row
MAX_SCORES = 1 << 20
# queries and keys of one product of `blockwise`
TILE = (128, 2048)


@dataclass(frozen=True)
class Strided(Backend):
    """Tokens of a stride side by side, and the rest of the pattern, on the backends that `pick` chooses for their calls."""

    pick: Callable[[AttentionCall], Backend]
    name = "strided"

    def why_not(self, call: AttentionCall) -> str | None:
        # dropout and bias are of places in the text, which regrouped tokens have no more
        if call.dropout:
            return "dropout is of places in the text, which regrouped tokens have no more"
        if call.scoring.bias is not None:
            return "a relative bias is of places in the text, which regrouped tokens have no more"
        return None

    def forward(self, call: AttentionCall) -> Results:
        q, k, v = call.q, call.k, call.v
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for heads in _head_groups(call.plan, q, k):
            own, found = (heads.queries(q), heads.keys(k), heads.keys(v)), []
            for tokens in heads.orders:
                part = call.part(tokens.take(own[0]), tokens.take(own[1]), tokens.take(own[2]), tokens.plan)
                found.append(tuple(tokens.put(t, own[0]) for t in self.pick(part).forward(part)))
            merged = found[0] if len(found) == 1 else merge(found)
            out[:, heads.heads], lse[:, heads.heads] = merged
        return out, lse

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        q, k, v = call.q, call.k, call.v
        totals = [torch.zeros_like(t, dtype=given.lse.dtype) for t in (q, k, v)]
        for heads in _head_groups(call.plan, q, k):
            own = heads.queries(q), heads.keys(k), heads.keys(v)
            out, lse, grad_out = (heads.queries(t) for t in (given.out, given.lse, given.some_grad_out))
            grad_lse = None if given.grad_lse is None else heads.queries(given.grad_lse)
            for tokens in heads.orders:
                part = call.part(tokens.take(own[0]), tokens.take(own[1]), tokens.take(own[2]), tokens.plan)
                of_part = Given(
                    tokens.take(out), tokens.take(lse), tokens.take(grad_out),
                    None if grad_lse is None else tokens.take(grad_lse),
                )  # fmt: skip
                grads = self.pick(part).backward(part, of_part)[:3]
                adders = heads.add_queries, heads.add_keys, heads.add_keys
                for add, total, grad, like in zip(adders, totals, grads, own, strict=True):
                    add(total, tokens.put(grad, like))
        grad_q, grad_k, grad_v = (total.to(t.dtype) for total, t in zip(totals, (q, k, v), strict=True))
        return grad_q, grad_k, grad_v, None


@dataclass(frozen=True)
class _Order:
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
class _Heads:
    """Heads that share a pattern: all of them, or some, which then have a key head each."""

    orders: tuple[_Order, ...]
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


def _head_groups(plan: AnyPlan, q: Tensor, k: Tensor) -> Iterator[_Heads]:
    if not isinstance(plan, ByHeads):
        yield _Heads(_orders(plan, *q.shape[:2]))
        return
    for one, heads in zip(plan.plans, _heads(plan, q.device), strict=True):
        yield _Heads(_orders(one, q.shape[0], len(heads)), heads, heads // (q.shape[1] // k.shape[1]))


@remembered
def _heads(plan: ByHeads, device: torch.device) -> list[Tensor]:
    """The heads of each pattern."""
    which = torch.tensor(plan.heads)
    return [(which == p).nonzero().flatten().to(device) for p in range(len(plan.plans))]


def _orders(plan: BlockPlan | Regrouped, batch: int, heads: int) -> tuple[_Order, ...]:
    if isinstance(plan, BlockPlan):
        return (_Order(plan),)
    strided = strided_plan(plan, batch)
    near = () if plan.rest is None else (_Order(plan.rest),)
    return *near, _Order(strided, plan.step, _fold(plan.step, heads, strided))


def _fold(step: int, heads: int, strided: BlockPlan) -> int:
    """How many residues stand side by side as heads: rows that are alike are cheaper together, until memory is short."""
    if strided.batch_rows > 1:
        return 1
    scores = heads * min(TILE[0], strided.q_len) * min(TILE[1], strided.kv_len)
    return max((f for f in range(1, step + 1) if step % f == 0 and f * scores <= MAX_SCORES), default=1)
