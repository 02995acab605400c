"""What happens to a score between `q @ k` and the softmax: scale, soft cap, relative position bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """score = cap(q @ k * scale) + bias, with cap(x) = softcap * tanh(x / softcap) if there is a soft cap (Gemma 2).

    `bias` is `[H, F + K]` or None: entry `k - q + F` of a head is added to the pair (q, k), in key coordinates, where F is the
    position of the last query, so that the first entry is of the farthest key in the past (T5).
    """

    scale: float
    softcap: float | None = None
    bias: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Is a score nothing but the scaled product?"""
        return self.softcap is None and self.bias is None

    def check(self, num_heads: int, last_query: int, kv_len: int) -> None:
        """Raise ValueError if a value does not fit the tensors."""
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}; it must be positive, or None")
        wanted = (num_heads, last_query + kv_len)
        if self.bias is not None and tuple(self.bias.shape) != wanted:
            raise ValueError(
                f"relative_bias has shape {tuple(self.bias.shape)}; it must be {wanted}: [query heads, distances], from key 0 "
                f"seen by the last query ({-last_query}) to the last key seen from position 0 ({kv_len - 1})"
            )

    def tile(self, heads: Tensor, q: int, m: int, k: int, n: int, last_query: int) -> Tensor:
        """The bias `[*heads, m, n]` of queries q .. q + m - 1 and keys k .. k + n - 1, in key coordinates."""
        assert self.bias is not None
        first = k - q - (m - 1) + last_query
        # a row of the tile is the row below it, one distance further
        return self.bias[heads, first : first + m + n - 1].unfold(-1, n, 1).flip(-2)

    def add_gradient(self, total: Tensor, heads: Tensor, grad: Tensor, q: int, k: int, last_query: int) -> None:
        """Add the gradient `[*heads, m, n]` of a tile's scores to that of the bias, `total` `[H, F + K]`."""
        m, n = grad.shape[-2:]
        first = k - q - (m - 1) + last_query
        # rows as long as the number of distances plus one: read in rows one shorter, each moves on by one
        shifted = torch.nn.functional.pad(grad.flip(-2), (0, m)).flatten(-2)[..., : m * (m + n - 1)]
        sums = shifted.unflatten(-1, (m, m + n - 1)).sum(-2)
        total[heads.flatten(), first : first + m + n - 1] += sums.flatten(0, -2).to(total.dtype)

    def tile_at(self, heads: Tensor, index: Tensor) -> Tensor:
        """The bias `[*heads, m, n]` of pairs whose entries in it are `index` `[m, n]`."""
        assert self.bias is not None
        return self.bias[heads[..., None, None], index]

    def add_gradient_at(self, total: Tensor, heads: Tensor, grad: Tensor, index: Tensor) -> None:
        """`add_gradient` for pairs whose entries in the bias are `index` `[m, n]`."""
        grad = grad.flatten(0, -3).flatten(1).to(total.dtype)
        total[heads.flatten()] += torch.zeros_like(total[heads.flatten()]).index_add_(1, index.flatten(), grad)
