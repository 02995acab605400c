"""Attention: how the pairs of a plan are computed, (q, k, v, plan) -> (out, lse)."""

from .api import attention, sparse_attention, uses_hashes
from .autograd import attend
from .backends.reference import with_weights
from .composite.lsh import hashed_weights
from .dispatch import BACKENDS, route
from .merge import merge

__all__ = [
    "BACKENDS",
    "attend",
    "attention",
    "hashed_weights",
    "merge",
    "route",
    "sparse_attention",
    "uses_hashes",
    "with_weights",
]
