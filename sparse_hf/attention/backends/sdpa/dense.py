"""Patterns that leave nothing out of a text this short: PyTorch's own dense attention, which is faster where it is the same.

A window spares nothing until the text is longer than it, which is the crossover; from there on dense attention computes
other pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ....pattern import Pattern
from ....pattern.forms import read_window
from ...autograd import AutogradBackend
from ...backend import AttentionCall, Results
from ...devices import HALF_TYPES
from ...merge import NO_LSE

# head dims that have kernels without n x n scores
MAX_HEAD_DIM = 256


class Dense(AutogradBackend):
    """PyTorch's `scaled_dot_product_attention` of all pairs, or of the causal ones."""

    name = "sdpa"

    def why_not(self, call: AttentionCall) -> str | None:
        q = call.q
        if call.wants_lse or call.dropout or not call.scoring.is_plain:
            return "PyTorch's attention gives no lse, and knows no soft cap, bias or dropout of ours"
        if q.shape[-1] != call.v.shape[-1] or q.shape[-1] > MAX_HEAD_DIM:
            return "PyTorch's kernels for these head dims make n x n scores"
        if not (q.dtype in HALF_TYPES if q.is_cuda else q.device.type == "cpu"):
            return f"PyTorch's kernels for {q.dtype} on {q.device.type} make n x n scores"
        pattern = call.lone_pattern
        if pattern is None or not q.numel() or is_causal(pattern, q.shape[2], call.k.shape[2], call.q_offset) is None:
            return "the pattern or the batch leaves pairs out"
        return None

    def is_fastest(self, call: AttentionCall) -> bool:
        """In 16 bits the backward kernel of the CPU takes 4 times as long as `blockwise`."""
        return call.q.is_cuda or call.q.dtype not in HALF_TYPES or not call.trains

    def forward(self, call: AttentionCall) -> Results:
        q, k, v = call.q, call.k, call.v
        pattern = call.lone_pattern
        assert pattern is not None
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=bool(is_causal(pattern, q.shape[2], k.shape[2], call.q_offset)), scale=call.scoring.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out, NO_LSE


@lru_cache(maxsize=256)
def is_causal(pattern: Pattern, q_len: int, kv_len: int, q_offset: int) -> bool | None:
    """False if all pairs are held, true if the causal ones of a whole text are, else None."""
    form = read_window(pattern, kv_len)
    if isinstance(form, str) or form.has_globals or form.window is None:
        return None
    left, right = form.window.left, form.window.right
    if left is not None or right not in (None, 0):
        return None
    # PyTorch counts a causal mask from the first key
    return None if right == 0 and (q_len != kv_len or q_offset) else right == 0
