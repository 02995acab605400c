"""What is computed from a plan once, and lives and dies with it."""

from __future__ import annotations

import functools
from collections.abc import Callable


def remembered(function: Callable) -> Callable:
    """Remember what `function` gives for an object (a plan, a split) and further hashable arguments, on that object.

    A cache apart would hold tables of plans that are gone, or drop those that a recorded CUDA graph still reads.
    """

    @functools.wraps(function)
    def remembering(owner, *rest):
        memo = owner.__dict__.setdefault("_memo", {})
        key = (function, *rest)
        if key not in memo:
            memo[key] = function(owner, *rest)
        return memo[key]

    return remembering
