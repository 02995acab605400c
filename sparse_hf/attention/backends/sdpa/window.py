"""A window over a text so short that its host is what takes time: the sliding FlashAttention-2 that PyTorch carries.

Its gradient is PyTorch's own, so that neither pass has a step in Python. On longer texts other kernels are faster.

Legend: B batch, H query heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ....pattern import Pattern
from ....pattern.forms import read_window
from ...autograd import AutogradBackend
from ...backend import AttentionCall, Results
from ...devices import HALF_TYPES, generation
from ...merge import NO_LSE
from .dense import MAX_HEAD_DIM

# numbers in q up to which a host takes longer to launch kernels than they run
HOST_BOUND_ELEMENTS = 1 << 22
# the kernels' word for no limit
UNLIMITED = -1


class SlidingWindow(AutogradBackend):
    """The kernels under PyTorch's `scaled_dot_product_attention`, which take a window when they are asked by themselves."""

    name = "sdpa"

    def why_not(self, call: AttentionCall) -> str | None:
        q, k = call.q, call.k
        if call.wants_lse or call.dropout or not call.scoring.is_plain:
            return "PyTorch's kernels give no gradient of lse, and know no soft cap, bias or dropout of ours"
        if not q.is_cuda or q.dtype not in HALF_TYPES or generation(q.device) < 8:
            return "PyTorch's kernels with a window compute in 16 bits on GPUs of compute capability 8.0 or higher"
        if q.shape[-1] != call.v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > MAX_HEAD_DIM:
            return f"PyTorch's kernels with a window take one head dim, a multiple of 8 up to {MAX_HEAD_DIM}"
        if not q.numel() or call.q_offset != k.shape[2] - q.shape[2]:
            return "PyTorch's kernels count windows from the last key"
        pattern = call.lone_pattern
        if pattern is None or sides(pattern, k.shape[2]) is None:
            return "the pattern is more than a window, or the batch leaves pairs out"
        return None

    def is_fastest(self, call: AttentionCall) -> bool:
        return call.q.is_cuda and call.q.numel() <= HOST_BOUND_ELEMENTS

    def forward(self, call: AttentionCall) -> Results:
        pattern = call.lone_pattern
        assert pattern is not None
        q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
        left_right = sides(pattern, k.shape[1])
        assert left_right is not None
        left, right = left_right
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, scale=call.scoring.scale,
            window_size_left=left, window_size_right=right,
        )[0]  # fmt: skip
        return out.transpose(1, 2), NO_LSE


@lru_cache(maxsize=256)
def sides(pattern: Pattern, kv_len: int) -> tuple[int, int] | None:
    """Keys to the left and to the right of a query that it sees, as the kernels say them; None if that is not all."""
    form = read_window(pattern, kv_len)
    if isinstance(form, str) or form.has_globals or form.window is None:
        return None
    left, right = form.window.left, form.window.right
    return UNLIMITED if left is None else left, UNLIMITED if right is None else right
