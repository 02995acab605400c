"""Rows of attention compared with dense attention in float64, before any timing.

Legend: H query heads, G key heads, n tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.backend import AttentionCall
from ..attention.composite.content import held_by
from ..attention.dispatch import content_plan
from ..attention.dropout import NO_DROPOUT
from ..attention.scoring import Scoring
from ..pattern import Pattern
from ..plan import NOTHING, build_plan

# random rows of an output that are compared
COMPARED_ROWS = 64


def row_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    out: Tensor,
    grad_out: Tensor,
    grad_q: Tensor | None,
    chosen_by: Tensor | None = None,
) -> tuple[float, float | None]:
    """Largest relative errors of random rows of output and gradient of q.

    They are against dense attention in float64; without `grad_q` there is no second one. Pairs are
    asked for one by one, and no table of a plan is read. Those that are chosen by content are the very ones that were chosen.

    Args:
        q, k, v: `[1, H, n, D]` and `[1, G, n, D]`, of one sequence.
        pattern: which pairs there are.
        out, grad_q: what is compared, like q.
        grad_out: the gradient of `out`.
        chosen_by: the keys by which pairs were chosen; by default `k`.
    """
    chosen = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(0))[:COMPARED_ROWS].sort().values
    chosen = chosen.to(q.device)
    masks = _masks(q, k if chosen_by is None else chosen_by, pattern, chosen)
    repeats, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    found = []
    # head by head, so that the rows of one head are all that exists in float64
    for h in range(q.shape[1]):
        key, value = (t[0, h // repeats].detach().double() for t in (k, v))
        query, grad = (t[0, h, chosen].detach().double() for t in (q, grad_out))
        mask = masks[h]
        # a query without keys gives zeros, as ours do
        weights = (query @ key.T * scale).masked_fill(~mask, -torch.inf).softmax(-1).where(mask, 0.0)
        exact = weights @ value
        errors = [_relative_error(out[0, h, chosen], exact)]
        if grad_q is not None:
            change = weights * (grad @ value.T - (grad * exact).sum(-1, keepdim=True))
            errors.append(_relative_error(grad_q[0, h, chosen], change @ key * scale))
        found.append(errors)
    # torch's maximum is NaN where any is; Python's is not
    worst = [float(torch.stack(errors).max()) for errors in zip(*found, strict=True)]
    return worst[0], None if grad_q is None else worst[1]


def _masks(q: Tensor, k: Tensor, pattern: Pattern, queries: Tensor) -> list[Tensor]:
    """The pairs of queries `[m]`, for each head `[m, n]`."""
    if pattern.uses_content:
        call = plain_call(q.detach(), k.detach(), k.detach(), pattern)
        return list(held_by(content_plan(call), call, queries)[0])
    plan = build_plan(pattern, q.shape[2], device=q.device)
    keys, row = torch.arange(k.shape[2], device=q.device), torch.zeros(1, 1, dtype=torch.long, device=q.device)
    masks = [plan.allows(row, p, queries[:, None], keys) for p in range(len(plan.patterns))]
    return [masks[p] for p in plan.heads or (0,) * q.shape[1]]


def plain_call(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> AttentionCall:
    """A call over a whole text, as a benchmark makes it."""
    return AttentionCall(q, k, v, pattern, 0, Scoring(q.shape[-1] ** -0.5), NO_DROPOUT, NOTHING)


def _relative_error(got: Tensor, exact: Tensor) -> Tensor:
    return (got.detach().double() - exact).norm() / exact.norm()
