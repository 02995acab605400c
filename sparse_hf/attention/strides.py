"""How tensors `[B, H, L, D]` lie in memory.

Two layouts matter: heads before tokens, as models hand them over, and tokens before heads, as models join heads next and
as FlashAttention wants them. `with_tokens_first` changes the memory and keeps the shape; `as_tokens_first` changes the shape.
"""

from __future__ import annotations

from torch import Tensor


def readable(t: Tensor) -> Tensor:
    """The same tensor with the numbers of a token side by side, copied only where they are not."""
    return t if t.stride(-1) == 1 else t.contiguous()


def like(t: Tensor, dim: int | None = None) -> Tensor:
    """A new tensor of the shape of `t`, or with `dim` numbers a head, in memory with tokens before heads."""
    batch, heads, length, own = t.shape
    dim = own if dim is None else dim
    return t.new_empty_strided((batch, heads, length, dim), (length * heads * dim, dim, heads * dim, 1))


def with_tokens_first(t: Tensor) -> Tensor:
    """The same `[B, H, L, D]`, in memory with tokens before heads."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def as_tokens_first(t: Tensor) -> Tensor:
    """`[B, H, L, D]` as `[B, L, H, D]`, with numbers side by side and nothing expanded."""
    t = t.transpose(1, 2)
    return t if t.stride(-1) == 1 and 0 not in t.stride() else t.contiguous()


def folded(t: Tensor, groups: int) -> Tensor:
    """`[B, G, R * Q, ...]` of `[B, H, Q, ...]`: the query heads of a key head as queries of it, whose keys are not repeated."""
    # one step for the host, which a decoded token waits for
    return t.reshape(t.shape[0], groups, t.shape[1] // groups * t.shape[2], *t.shape[3:])
