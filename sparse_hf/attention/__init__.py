"""Attention: how the pairs of a plan are computed, (q, k, v, plan) -> (out, lse)."""

from .api import BACKENDS, sparse_attention
from .merge import merge

__all__ = ["BACKENDS", "merge", "sparse_attention"]
