"""The pairs that a pattern does not hold: what keeps parts of one attention from counting a pair twice."""

from __future__ import annotations

from dataclasses import dataclass

from .base import EMPTY, FULL, Pattern, joint
from .primitives import full


@dataclass(frozen=True)
class Outside(Pattern):
    """The pairs of a sequence that `pattern` does not hold: `window(99, 0) & outside(window(9, 0))` is 10 to 99 back.

    Examples:
        >>> far = Pattern.parse("window(9, 0) & outside(window(4, 0))")
        >>> torch.where(far.allows(torch.tensor(9), torch.arange(10)))[0].tolist()
        [0, 1, 2, 3, 4]
    """

    pattern: Pattern
    word = "outside"
    pattern_fields = ("pattern",)

    def __post_init__(self):
        if not isinstance(self.pattern, Pattern):
            raise TypeError(f"outside: {self.pattern!r} is not a pattern")
        if self.pattern.heads is not None:
            raise TypeError("per_head stands outermost; put outside inside it, head by head")
        if self.pattern.uses_content:
            raise ValueError(
                f"outside: {self.pattern} chooses pairs from queries and keys; give a pattern of positions"
            )

    def allows(self, q, k, marks=None):
        return joint(q, k) & ~self.pattern.allows(q, k, marks)

    def blocks(self, q0, q1, k0, k1, marks=None):
        # full is empty, empty is full, and partial stays
        return EMPTY + FULL - self.pattern.blocks(q0, q1, k0, k1, marks)

    def signature(self, q0, k0, side, marks=None):
        return self.pattern.signature(q0, k0, side, marks)

    def reachable(self, k, q):
        return joint(q, k)

    def on(self, device):
        return Outside(self.pattern.on(device))

    @property
    def marked_sides(self) -> tuple[bool, bool]:
        return self.pattern.marked_sides

    @property
    def uses_length(self) -> bool:
        return self.pattern.uses_length

    @property
    def grain(self) -> int:
        return self.pattern.grain

    def unending(self) -> Pattern | None:
        inner = self.pattern.unending()
        return full() if inner is None else Outside(inner)
