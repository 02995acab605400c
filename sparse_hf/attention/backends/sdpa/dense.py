"""Patterns that leave nothing out of a text this short: PyTorch's own dense attention, which is faster where it is the same.

A window spares nothing until the text is longer than it, which is the crossover; from there on dense attention computes other pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....pattern.forms import read_window
from ....plan import AnyPlan, BlockPlan, remembered
from ...scoring import Scoring

# head dims that kernels without n x n scores have
WIDEST = 256
HALVES = (torch.bfloat16, torch.float16)


def suits(
    backend: str, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, dropout: float, wants_lse: bool
) -> bool:  # fmt: skip
    """May a call be computed here, if its pattern allows it? Only "auto" may choose."""
    is_plain = scoring.is_plain and not dropout and not wants_lse
    # other head dims or, on a GPU, dtypes have kernels that make n x n scores
    if backend != "auto" or not is_plain or q.shape[-1] != v.shape[-1] or q.shape[-1] > WIDEST:
        return False
    if q.is_cuda:
        return q.dtype in HALVES
    # the CPU's backward kernel takes 4 times as long as `blockwise` in 16 bits
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return q.device.type == "cpu" and not (learns and q.dtype in HALVES)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AnyPlan, scale: float) -> Tensor | None:
    """Out `[B, H, Q, D]`, differentiable; None where the plan leaves pairs out."""
    is_causal = holds(plan) if isinstance(plan, BlockPlan) and q.numel() else None
    if is_causal is None:
        return None
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@remembered
def holds(plan: BlockPlan) -> bool | None:
    """False if a plan holds all pairs of its queries and keys, true if it holds the causal ones of a whole text, else None."""
    if not plan.is_bare:
        return None
    shape = read_window(plan.patterns[0], plan.kv_len)
    if isinstance(shape, str) or shape.has_globals:
        return None
    left, right = shape.window.left, shape.window.right
    if left is not None or right not in (None, 0):
        return None
    # PyTorch counts a causal mask from the first key
    return None if right == 0 and plan.q_len != plan.kv_len else right == 0
