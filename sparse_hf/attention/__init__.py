"""Attention: how the pairs of a plan are computed, (q, k, v, plan) -> (out, lse)."""

from .api import attention, sparse_attention, uses_content
from .autograd import attend
from .backends.reference import with_weights
from .dispatch import BACKENDS, content_weights, route
from .held import HeldPairs, held_pairs
from .left_out import mass_left_out
from .merge import merge

__all__ = [
    "BACKENDS",
    "HeldPairs",
    "attend",
    "attention",
    "content_weights",
    "held_pairs",
    "mass_left_out",
    "merge",
    "route",
    "sparse_attention",
    "uses_content",
    "with_weights",
]
