"""Blocks that are drawn at random, and tables."""

from __future__ import annotations

import pytest
import torch

from sparse_hf import RandomBlocks


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (3, 0), (3, 7), (5, 2**40)])
def test_random_blocks_draw_distinct_blocks_whatever_the_length(count, seed):
    pattern = RandomBlocks(count, 4, seed)
    blocks = torch.arange(0, 4 * 128, 4)
    drawn = pattern.allows(blocks[:, None], blocks[None, :])
    # all of the range is in view for the blocks below a power of two
    expected = torch.tensor([min(count, 1 << b.bit_length() if b else 1) for b in range(64)])
    assert torch.equal(drawn[:64].sum(1), expected)
    assert torch.equal(RandomBlocks(count, 4, seed).allows(blocks[:64, None], blocks[None, :64]), drawn[:64, :64])
    if count < 5:
        assert not torch.equal(RandomBlocks(count, 4, seed + 1).allows(blocks[:, None], blocks[None, :]), drawn)
