"""Dropout of attention weights as a pure function of (seed, batch, head, query, key).

A counter-based generator draws the same mask whatever the order of blocks, so that the backward pass, activation
checkpointing and every backend see one and the same mask (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Dropout:
    """Probability with which a weight is dropped, and the seed `[]` int64 of the mask; None without dropout."""

    p: float = 0.0
    seed: Tensor | None = None

    def __bool__(self) -> bool:
        return self.p > 0

    @staticmethod
    def draw(p: float) -> Dropout:
        """Dropout with a fresh mask, or none for a probability of 0."""
        return Dropout(p, draw_seed()) if p else NO_DROPOUT


NO_DROPOUT = Dropout()


def draw_seed() -> Tensor:
    """A fresh seed from torch's CPU generator, which activation checkpointing restores: `[]` int64."""
    return torch.randint(0, _WORD, (), dtype=torch.int64)


def kept(seed: Tensor, weights: Tensor, dropout: float) -> Tensor:
    """Which of `weights` `[batch, heads, queries, keys]` survive, bool."""
    (batch, heads, queries, keys), device = weights.shape, weights.device
    return kept_at(
        seed.to(device),
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(heads, device=device)[:, None, None],
        torch.arange(queries, device=device)[:, None],
        torch.arange(keys, device=device),
        dropout,
    )


def kept_at(seed: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """`kept` at broadcastable int64 index tensors."""
    rows = _mix(_mix(_mix(seed ^ b) ^ h) ^ q)
    return _mix(rows ^ _mix(k + 0x9E3779B9)) >= threshold(dropout)


def threshold(dropout: float) -> int:
    """The least 32-bit number whose weight survives."""
    return int(dropout * (_WORD + 1))


def _mix(x: Tensor) -> Tensor:
    # a 32-bit finaliser in int64; multipliers below 2^31, so that no product overflows
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x31848BAB) & _WORD
    return x ^ (x >> 16)
