"""What queries and keys are compared by.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; a piece has m queries and n keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DotScores:
    """Products of queries `[B, H, Q, D]` and keys `[B, G, K, D]`: `[B, H, m, n]`."""

    query: Tensor
    key: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def numbers_per_score(self) -> int:
        return 2 * self.query.shape[0] * self.query.shape[1]

    def scores(self, queries: slice, keys: slice) -> Tensor:
        query = _wide(self.query[:, :, queries]).unflatten(1, (self.key.shape[1], -1))  # [B, G, R, m, D]
        return (query @ _wide(self.key[:, :, None, keys]).mT).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class IndexerScores:
    """Scores of a learned indexer with small heads of its own (DeepSeek-V3.2): `[B, 1, m, n]`.

    A score is the sum over index heads of `weight * relu(query @ key * scale)`.

    Args:
        query: `[B, Q, I, D]` of I index heads.
        key: `[B, K, D]`, which all index heads share.
        weights: `[B, Q, I]`.
        scale: what multiplies `query @ key`; by default 1.
    """

    query: Tensor
    key: Tensor
    weights: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.query.shape[0], 1, self.query.shape[1], self.key.shape[1]

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def numbers_per_score(self) -> int:
        return 2 * self.query.shape[0] * self.query.shape[2]

    def scores(self, queries: slice, keys: slice) -> Tensor:
        """Differentiable."""
        query, key = _wide(self.query[:, queries]), _wide(self.key[:, keys])
        # one product of matrices a row
        products = query.flatten(1, 2) @ key.mT  # [B, m * I, n]
        products = (products * self.scale).relu().unflatten(1, query.shape[1:3])  # [B, m, I, n]
        return (_wide(self.weights[:, queries, None]) @ products).transpose(1, 2)


def _wide(t: Tensor) -> Tensor:
    """In 32 bits at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
