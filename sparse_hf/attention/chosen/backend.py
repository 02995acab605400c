"""The backend of attention over chosen keys: kernels where they can run, else gathered pieces in plain PyTorch.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; C heads of the choice, N chosen keys of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..backend import AttentionCall, Backend, Given, Gradients, Results
from . import by_blocks, gathers, pieces


@dataclass(frozen=True, eq=False)
class ChosenKeys:
    """The keys of each query, `[B or 1, C, Q, N]` with C one of 1, G and H; below 0 is none.

    With `size` above 1, each `size` places side by side are one block of keys, in order, that begins at a multiple of `size`.
    """

    index: Tensor
    size: int = 1

    def as_mask(self, keys: int) -> Tensor:
        """The choice as pairs, `[B or 1, C, Q, K]` bool: n x n, for weights that somebody wants to see."""
        mask = torch.zeros(*self.index.shape[:3], keys + 1, dtype=torch.bool, device=self.index.device)
        return mask.scatter_(-1, torch.where(self.index < 0, keys, self.index).long(), True)[..., :keys]


class GatheredKeys(Backend):
    """Each query's keys, gathered side by side."""

    name = "chosen"

    def why_not(self, call: AttentionCall) -> str | None:
        return None if call.scoring.bias is None else "keys that are chosen have no relative bias"

    def forward(self, call: AttentionCall) -> Results:
        return _way(call).forward(call)

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        return _way(call).backward(call, given)


def _way(call: AttentionCall) -> ModuleType:
    """What computes a call."""
    if gathers.why_not(call):
        return pieces
    return by_blocks if by_blocks.is_better(call) else gathers
