"""Gradients of one part of a merged attention, and autograd where torch has left it behind.

A part is differentiated by handing it the merged out and lse: what the parts give then adds up to the gradients of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..plan import BlockPlan
from .scoring import Scoring


@contextmanager
def recording() -> Iterator[None]:
    """Have torch record operations for autograd, also inside an operator, where turning gradients on is not enough."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        yield


def part_gradients(
    backend, tensors: list[Tensor], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, plan: BlockPlan,
    scoring: Scoring, dropout: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What a part adds to the gradients of `tensors` (q, k, v), given the merged out and lse and their gradients."""
    if grad_lse is None and not getattr(backend, "NONE_IS_ZERO", False):
        grad_lse = torch.zeros_like(lse)
    if hasattr(backend, "backward"):
        return backend.backward(*tensors, out, lse, grad_out, grad_lse, plan, scoring, dropout, seed)[:3]
    # backends that lean on autograd run their forward again, and want gradients of what they themselves gave
    with recording():
        leaves = [t.detach().requires_grad_() for t in tensors]
        results = backend.attend(*leaves, plan, scoring, dropout, seed)
    part_out, part_lse = (t.detach() for t in results)
    share = (part_lse - lse.where(lse > -torch.inf, 0)).exp()
    change = (grad_out.to(lse.dtype) * (part_out.to(lse.dtype) - out)).sum(-1) + grad_lse
    of_results = (share[..., None] * grad_out).to(out.dtype), (share * change).to(part_lse.dtype)
    return torch.autograd.grad(results, leaves, of_results)
