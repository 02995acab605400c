"""Packed documents: where the positions of a row begin anew.

Legend: B batch, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def number_documents(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """The number of each token's document from 0, `[B, N]`: one begins where positions of real tokens stop growing.

    Args:
        position_ids: `[B or 1, N]`.
        real: `[B, N]` bool, true on real tokens; None if all are.
    """
    if real is None:
        begins = position_ids[:, 1:] <= position_ids[:, :-1]
        return pad(begins.long().cumsum(1), (1, 0))
    position_ids = position_ids.expand_as(real)
    # padding repeats positions, so that the last real token before counts, if there is one
    index = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last_real = torch.where(real, index, -1).cummax(1).values[:, :-1]
    previous = position_ids.gather(1, last_real.clamp(min=0))
    begins = (position_ids[:, 1:] <= previous) & real[:, 1:] & (last_real >= 0)
    return pad(begins.long().cumsum(1), (1, 0))
