"""The distances of which a bias is made that depends on nothing else, and those of them that a pass has.

Legend: H heads, Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distances_of(queries: int, keys: int, past: int | Tensor, device: torch.device | str | None) -> Tensor:
    """The distances (key - query) of a pass, ascending: `[F + K]` from `-F` to `K - 1`, where F is the place of the last query.

    Args:
        queries: how many there are.
        keys: how many there are, of a static cache all slots.
        past: how many tokens came before. A tensor, which a graph cannot read, stands for any number of them: `[2 K - 1]` from
            `1 - K`.
        device: where they are to be.
    """
    if isinstance(past, Tensor) and torch.compiler.is_compiling():
        return torch.arange(1 - keys, keys, device=device)
    return torch.arange(1 - int(past) - queries, keys, device=device)
