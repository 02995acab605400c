"""What a model that sees its past only computes of a pattern."""

from __future__ import annotations

from .base import Pattern
from .primitives import First, causal


def past_of(pattern: Pattern) -> Pattern:
    """The pairs of a pattern whose key is not after the query, in a text that goes on.

    Examples:
        >>> past_of(First(4))
        first(4) & window(None, 0)
    """
    if pattern.heads:
        return type(pattern)(*map(past_of, pattern.heads))
    # what is last would change with every token, and answers with a cache would not be those without
    lasting = pattern.unending()
    return First(0) if lasting is None else lasting & causal()
