"""One pattern per head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .base import Pattern, check_class, either_side


@dataclass(frozen=True, init=False)
class PerHead(Pattern):
    """One pattern per head; outermost only.

    Examples:
        >>> from sparse_hf import Pattern
        >>> Pattern.parse("per_head(window(64, 0), stride(64))").heads[1]
        stride(64)
    """

    patterns: tuple[Pattern, ...]
    word = "per_head"
    pattern_fields = ("patterns",)

    def __init__(self, *patterns: Pattern):
        if not patterns:
            raise ValueError("per_head needs one pattern per head, and got none")
        for pattern in patterns:
            if not isinstance(pattern, Pattern):
                raise TypeError(f"per_head: {pattern!r} is not a pattern")
            check_class(type(pattern))
            if pattern.heads is not None:
                raise TypeError("per_head stands outermost and does not nest")
            if pattern.uses_content:
                raise ValueError(f"per_head holds {pattern}, which chooses pairs for each head by itself; use it alone")
        object.__setattr__(self, "patterns", patterns)

    @property
    def heads(self) -> tuple[Pattern, ...]:
        return self.patterns

    @property
    def marked_sides(self) -> tuple[bool, bool]:
        return either_side(self.patterns)

    @property
    def marks_add(self) -> bool:
        return all(pattern.marks_add for pattern in self.patterns)

    @property
    def uses_length(self) -> bool:
        return any(pattern.uses_length for pattern in self.patterns)

    @property
    def grain(self) -> int:
        return math.gcd(*(pattern.grain for pattern in self.patterns))

    def on(self, device):
        return PerHead(*(pattern.on(device) for pattern in self.patterns))

    def unending(self) -> Pattern:
        raise TypeError("per_head is one pattern per head; ask those in .heads")

    def allows(self, q, k, marks=None):
        raise TypeError("per_head is one pattern per head; ask those in .heads")

    def blocks(self, q0, q1, k0, k1, marks=None):
        raise TypeError("per_head is one pattern per head; ask those in .heads")

    def reachable(self, k, q):
        seen = [pattern.reachable(k, q) for pattern in self.patterns]
        return torch.stack(torch.broadcast_tensors(*seen)).any(0)

    def _arguments(self) -> list[str]:
        return list(map(str, self.patterns))
