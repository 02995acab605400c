"""Autograd functions of our own that compute first derivatives alone, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch


def first_order(backward: Callable) -> Callable:
    """A `backward` that refuses to be differentiated itself, instead of leaving its part out."""

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "long_text computes first derivatives alone; call remove() of what it returned for create_graph=True"
            )
        return backward(ctx, *grads)

    return checked
