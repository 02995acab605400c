"""What "auto" takes and says, and how little it plans."""

from __future__ import annotations

import logging

import pytest

from sparse_hf import sparse_attention
from tests.attention.exactness import leaves


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (128, "attention on cpu in torch.float32 runs on backend 'blockwise'"),
        (
            8,
            "attention of fewer than 128 queries on cpu in torch.float32 runs on PyTorch's scaled_dot_product_attention over the "
            "keys that they see",
        ),
    ],
)
def test_auto_says_what_it_chose_once(queries, said, caplog):
    from sparse_hf.attention.api import _say, _say_torch

    _say.cache_clear()
    _say_torch.cache_clear()
    q, k, v = (t.detach() for t in leaves(*[(1, 1, queries, 8)] * 3))
    with caplog.at_level(logging.INFO, logger="sparse_hf"):
        for _ in range(3):
            sparse_attention(q, k, v, "window(1, 0)")
    assert [r.message for r in caplog.records] == [said]
