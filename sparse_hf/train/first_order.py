"""Autograd functions of our own that compute first derivatives alone, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from ..attention.autograd import refuse_second_derivative


def first_order(backward: Callable) -> Callable:
    """A `backward` that refuses to be differentiated itself, instead of leaving its part out."""

    @wraps(backward)
    def checked(ctx, *grads):
        refuse_second_derivative("long_text", "call remove() of what it returned for create_graph=True")
        return backward(ctx, *grads)

    return checked
