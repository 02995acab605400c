"""`blockwise` alone: no tensor as large as the square of the length, however tokens are marked."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import sparse_attention
from sparse_hf.testing import AllocationInterceptor
from tests.attention.exactness import leaves

# 101 blocks of 128: no other dimension here is near the length or its blocks
LONG = 12_928


@pytest.mark.parametrize(
    "pattern", ["window(511, 0)", "window(256, 256) | first(4)", "window(64, 64) | marked()", "bigbird(block_size=64)",
                "per_head(window(100, 0), window(300, 0) & stride(3))"],
)  # fmt: skip
def test_no_tensor_has_two_lengths(pattern):
    q, k, v = leaves(*[(1, 2, LONG, 16)] * 3)
    marks = torch.arange(LONG)[None] % 5000 == 17
    with AllocationInterceptor(LONG) as seen:
        out, lse = sparse_attention(q, k, v, pattern, marks=marks, backend="blockwise", return_lse=True)
        (out.sum() + lse.sum()).backward()
    assert not seen.quadratic and seen.calls > 1000
    # nor is anything as large as a strip of rows against all keys
    assert seen.largest <= 2 * 128 * LONG


@pytest.mark.parametrize("pattern", ["window(64, 64) | marked()", "(window(64, 0) | marked_keys()) & window(None, 0)"])
def test_marks_all_over_a_text_are_few_tiles(pattern):
    q, k, v = leaves(*[(1, 2, LONG, 16)] * 3)
    marks = torch.arange(LONG)[None] % 100 == 17
    with AllocationInterceptor(LONG) as seen:
        out, lse = sparse_attention(q, k, v, pattern, marks=marks, backend="blockwise", return_lse=True)
        (out.sum() + lse.sum()).backward()
    # a look at every pair of blocks would be 101 * 101 tiles, each some dozens of allocations
    assert not seen.quadratic and seen.calls < 60_000
    assert seen.largest <= 2 * 128 * LONG
