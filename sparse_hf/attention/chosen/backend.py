"""The backend of attention over chosen keys: kernels where they can run, else gathered pieces in plain PyTorch."""

from __future__ import annotations

from types import ModuleType

from ..backend import AttentionCall, Backend, Given, Gradients, Results
from . import by_blocks, gathers, pieces


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
