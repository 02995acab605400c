"""The one table that the exactness tests walk: patterns, lengths, and what a batch may bring."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

PATTERNS = [
    "window(None, None)",
    "window(20, 20)",
    "window(40, 0)",
    "window(None, 3)",
    "first(3)",
    "window(16, 16) | first(2)",
    "window(30, 5) | marked()",
    "window(9, 9) | marked_keys()",
    "(window(None, 0) | stride(5)) & marked_queries()",
    "window(60, 60) & stride(3)",
    "stride(7)",
    "window(30, 30) & outside(window(5, 9) | first(2))",
    "fixed(16, 3)",
    "summary(16, 3) | window(0, 0)",
    "chunk(50)",
    "chunk(24, 2, 1)",
    "ring(24, 1, 1)",
    "ring(50, 2)",
    "last(3)",
    "chunk(16, 1, 1) | first(16) | last(1, 16) | marked()",
    "window2d(8, 12, 2, 1) | first(1)",
    "random_blocks(2, 16, 1)",
    "block_table(32, ((0, 1), (1,), (), (0, 2, 3), (4, 1), (5,), (6, 0), (7,)))",
    "per_head(window(9, 9), window(60, 60) & stride(3), window(9, 9), first(4) | window(3, 3))",
    "longformer(attention_window=32)",
    "bigbird(block_size=16)",
    "sparse_transformer(stride=16, mode='strided')",
    "sparse_transformer(stride=16, mode='fixed')",
    "sparse_transformer_heads(num_heads=4, stride=16, mode='fixed')",
    "sliding_window(33)",
    "streaming(window=32, sinks=4)",
]
LENGTHS = [1, 63, 100, 257, 500]
SCENARIOS = ["plain", "last_queries", "left_padding", "right_padding", "packed", "packed_and_padded"]
# (query heads, key heads, head dim): every combination appears many times over the table
SHAPES = [(4, 4, 32), (4, 2, 64), (4, 1, 80), (4, 2, 128), (4, 4, 64), (4, 1, 32), (4, 2, 80), (4, 4, 128)]
CAUSAL = "window(None, 0)"


@cache
def causal_form(pattern: str) -> str:
    """The text of a pattern without its future."""
    from sparse_hf import Pattern, causal

    parsed = Pattern.parse(pattern)
    if parsed.heads:
        return str(type(parsed)(*(p & causal() for p in parsed.heads)))
    return str(parsed & causal())


def scenario(name: str, length: int, batch: int = 2) -> dict[str, Tensor | int | None]:
    """Queries, padding, documents and marks of a batch, drawn from a generator of its own."""
    generator = torch.Generator().manual_seed(length)
    real = documents = None
    if "padd" in name:
        real = torch.ones(batch, length, dtype=torch.bool)
        cut = torch.randint(0, max(1, length // 2), (batch,), generator=generator)
        for b in range(batch):
            if "left" in name:
                real[b, : cut[b]] = False
            else:
                real[b, length - cut[b] :] = False
    if "packed" in name:
        documents = torch.randint(0, 4, (batch, length), generator=generator).sort(1).values
    marks = torch.rand(batch, length, generator=generator) < 0.03
    q_len = max(1, length // 3) if name == "last_queries" else length
    return {"q_len": q_len, "real": real, "documents": documents, "marks": marks}
