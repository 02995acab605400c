"""The patterns of papers."""

from __future__ import annotations

import pytest

from sparse_hf import Chunk, First, Last, Pattern, RandomBlocks, Stride, Window, causal, recipes


def test_recipes_say_what_their_papers_say():
    assert recipes.longformer(attention_window=512) == Window(256, 256) | First(1)
    assert recipes.longformer(512, 1, dilation=2) == Window(512, 512) & Stride(2) | First(1)
    assert recipes.sliding_window(4096) == Window(4095, 0)
    assert recipes.streaming(window=8, sinks=2) == Window(7, 0) | First(2) & causal()
    assert recipes.sparse_transformer(128, "strided") == (Window(128, 0) | Stride(128)) & causal()
    ends = First(16) | Last(1, 16)
    assert Pattern.parse("bigbird(block_size=16)") == Chunk(16, 1, 1) | ends | RandomBlocks(3, 16, 0)
    with pytest.raises(ValueError, match="'strided' or 'fixed'"):
        recipes.sparse_transformer(mode="x")
