"""Where the marked tokens of a batch stand, found without the host waiting for how many they are.

Legend: B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.flash.window_kernels import Packed


@dataclass(frozen=True)
class Places:
    """Where the marked tokens of each row stand."""

    marks: Tensor  # [B, N] bool
    rank: Tensor  # [B, N] int64: of a marked token, how many stand before it
    index: Tensor  # [B, N] int32: the marked tokens in order, then -1
    counts: Tensor  # [B] int32

    def take(self, t: Tensor) -> Tensor:
        """Of `[B, heads, N, ...]` the marked tokens and then anything, packed: `[B * N, heads, ...]`."""
        return t.transpose(1, 2).flatten(0, 1)[self._flat(self.index.clamp(min=0))]

    def put(self, t: Tensor, like: Tensor) -> Tensor:
        """The way back: `[B, heads, N, ...]`, anything where nothing is marked."""
        return t[self._flat(self.rank)].unflatten(0, self.marks.shape).transpose(1, 2).to(like.dtype)

    def _flat(self, index: Tensor) -> Tensor:
        batch, length = index.shape
        return (index + torch.arange(batch, device=index.device)[:, None] * length).flatten()

    def packed(self) -> Packed:
        """Marked tokens of a row against all its keys; what follows them sees none."""
        batch, length = self.marks.shape
        queries = torch.stack((self.counts, length - self.counts), 1).flatten()
        keys = torch.where(torch.arange(2 * batch, device=queries.device) % 2 == 0, length, 0)
        cu_q, cu_k = (torch.nn.functional.pad(t.cumsum(0, dtype=torch.int32), (1, 0)) for t in (queries, keys))
        return Packed(cu_q, cu_k, length, length)


def find(marks: Tensor) -> Places:
    """Look up the marked tokens without waiting for them."""
    marks = marks.bool()
    batch, length = marks.shape
    upto = marks.cumsum(1)
    rank = (upto - 1).clamp(min=0)
    index = torch.full((batch, length + 1), -1, dtype=torch.int32, device=marks.device)
    # what is not marked is written to a column that is cut off
    tokens = torch.arange(length, device=marks.device, dtype=torch.int32).expand(batch, -1)
    index.scatter_(1, torch.where(marks, rank, length), tokens)
    return Places(marks, rank, index[:, :length].contiguous(), upto[:, -1].int())
