"""Patterns whose pairs are chosen from queries and keys at run time.

They have no closed form in positions: `sparse_attention` plans them when it has the tensors.
"""

from __future__ import annotations

import torch

from .base import PARTIAL, Pattern, joint
from .primitives import Window


class Content(Pattern, has_word=False):
    """What all of them share: they cannot be asked about positions alone."""

    @property
    def uses_content(self) -> bool:
        return True

    def allows(self, q, k, marks=None):
        raise ValueError(f"{self} chooses its pairs from queries and keys; no plan can be made of positions alone")

    def blocks(self, q0, q1, k0, k1, marks=None):
        # a pair may be anywhere
        return torch.full_like(q0 + k0, PARTIAL).to(torch.int8)

    def without_content(self):
        return None

    def with_all_content(self):
        return Window(None, None)

    def reachable(self, k, q):
        return joint(q, k)
