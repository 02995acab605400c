"""The backend of attention over chosen keys: kernels where they can run, else gathered pieces in plain PyTorch.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; C heads of the choice, N chosen keys of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..backend import AttentionCall, Backend, Given, Gradients, Results
from . import gathers, pieces


@dataclass(frozen=True, eq=False)
class ChosenKeys:
    """The keys of each query, `[B or 1, C, Q, N]` with C one of 1, G and H; below 0 is none."""

    index: Tensor

    @property
    def heads(self) -> tuple[int, ...]:
        return ()

    @property
    def batch_rows(self) -> int:
        return self.index.shape[0]


class GatheredKeys(Backend):
    """Each query's keys, gathered side by side."""

    name = "chosen"

    def why_not(self, call: AttentionCall) -> str | None:
        return None if call.scoring.bias is None else "keys that are chosen have no relative bias"

    def forward(self, call: AttentionCall) -> Results:
        return (pieces if gathers.why_not(call) else gathers).forward(call)

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        return (pieces if gathers.why_not(call) else gathers).backward(call, given)
