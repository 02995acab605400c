"""The pairs of a pattern, evaluated one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from ...pattern import Pattern
from ...pattern.base import Marks


def pairs_by_head(pattern: Pattern, q: Tensor, k: Tensor, marks: Marks, there: Tensor) -> Tensor:
    """`[B or 1, H or 1, Q, K]` bool, of places `[B or 1, Q, 1]` and `[B or 1, 1, K]`, where `there` says that keys are."""
    found = [one.allows(q, k, marks) & there for one in pattern.heads or (pattern,)]
    return torch.stack(torch.broadcast_tensors(*found), 1)
