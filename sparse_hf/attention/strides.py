"""How tensors `[B, H, L, D]` lie in memory: heads after tokens, as models join them next."""

from __future__ import annotations

from torch import Tensor


def readable(t: Tensor) -> Tensor:
    """Numbers of a token side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def like(t: Tensor, dim: int | None = None) -> Tensor:
    """A new tensor of the same shape, or with `dim` numbers a head, heads after tokens."""
    batch, heads, length, own = t.shape
    dim = own if dim is None else dim
    return t.new_empty_strided((batch, heads, length, dim), (length * heads * dim, dim, heads * dim, 1))


def heads_last(t: Tensor) -> Tensor:
    """The same numbers, heads after tokens."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)
