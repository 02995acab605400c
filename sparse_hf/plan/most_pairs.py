"""How many keys a query gets, of patterns that choose some of them from queries and keys as many as there may be.

Legend: B batch, P distinct patterns of the heads, Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern
from ..pattern.base import as_pattern
from .api import BLOCK_SIZE, build_plan


def most_row_counts(
    pattern: Pattern | str,
    length: int,
    *,
    marks: Tensor | None = None,
    block_size: int = BLOCK_SIZE,
    chosen: int | None = None,
) -> Tensor:
    """Keys per query of a text, `[B, P, Q]` int64.

    What is chosen at run time comes on top of the pairs of positions, within whatever `&` and the text leave to choose from.

    Args:
        marks, block_size: as of `build_plan`.
        chosen: how many keys are chosen, by default as many as may be.

    Examples:
        >>> most_row_counts("(window(1, 0) | topk(2)) & window(None, 0)", 6)[0, 0].tolist()
        [1, 2, 3, 4, 4, 4]
    """

    def counted(one: Pattern) -> Tensor:
        return build_plan(one, length, marks=marks, block_size=block_size).row_counts()

    pattern = as_pattern(pattern)
    if not pattern.uses_content:
        return counted(pattern)
    most, known = counted(pattern.with_all_content()), pattern.without_content()
    own = torch.zeros_like(most) if known is None else counted(known)
    return torch.minimum(most, own + (pattern.most_keys if chosen is None else chosen))
