"""Batch data that changes between calls, comes from another mode, or is used by several threads at once."""

from __future__ import annotations

import torch

from sparse_hf import sparse_attention
from tests.attention.exactness import leaves


def test_batch_data_may_change_in_place():
    # plans are remembered by content: the same tensor with other content is another batch
    q, k, v = (t.detach() for t in leaves(*[(1, 2, 50, 8)] * 3))
    real = torch.ones(1, 50, dtype=torch.bool)
    real[0, 40:] = False
    first = sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=real)
    real[0, 30:] = False
    second = sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=real)
    assert (second[:, :, 30:] == 0).all() and not (first[:, :, 30:40] == 0).all()


def test_a_mask_that_is_gone_is_not_the_mask_that_is_not_given():
    q, k, v = (t.detach() for t in leaves(*[(1, 2, 50, 8)] * 3))
    given = (torch.arange(50) < 30)[None]
    sparse_attention(q, k, v, "window(5, 5)", key_padding_mask=given)
    del given
    marks = (torch.arange(50) == 3)[None]
    plain = sparse_attention(q, k, v, "window(5, 5)", marks=marks)
    torch.testing.assert_close(plain, sparse_attention(q, k, v, "window(5, 5)"))


def test_a_mask_that_was_written_to_is_read_again():
    q, k, v = leaves((1, 4, 40, 8), (1, 2, 40, 8), (1, 2, 40, 8))
    real = torch.ones(1, 40, dtype=torch.bool)
    real[:, 30:] = False
    before = sparse_attention(q, k, v, "window(5, 0)", key_padding_mask=real)
    assert torch.equal(sparse_attention(q, k, v, "window(5, 0)", key_padding_mask=real), before)
    real[:, 20:] = False
    after = sparse_attention(q, k, v, "window(5, 0)", key_padding_mask=real)
    torch.testing.assert_close(after[:, :, :20], before[:, :, :20])
    assert (after[:, :, 20:] == 0).all()
    # another tensor in its place
    real = torch.ones(1, 40, dtype=torch.bool)
    assert (sparse_attention(q, k, v, "window(5, 0)", key_padding_mask=real)[:, :, 20:] != 0).any()
