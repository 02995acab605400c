"""Rows of marked tokens, written into what attention gave for all tokens.

Legend: B batch, N tokens, H heads, D head dim, E = H * D, M most marked tokens of any batch row, T marked tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.autograd import refuse_second_derivative
from .tokens import MarkedRows

# what is said to have no second derivative
WHAT = "attention of marked tokens"


def write_rows(out: Tensor, rows: Tensor, marked: Tensor) -> Tensor:
    """`out` `[B, N, E]` with `rows` `[T, E]` for the `marked` tokens of all batch rows, in its memory.

    Attention keeps `out` for its backward pass, where it is multiplied by its gradient only, which is 0 in those rows: what
    stands there then may be anything, and a copy would be one more tensor of all tokens in every layer. Nothing else may
    hold `out`.
    """
    return _Written.apply(out, rows, marked)


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, rows, marked):
        ctx.save_for_backward(marked)
        return written(out, rows, marked)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative(WHAT)
        (marked,) = ctx.saved_tensors
        return *split_gradient(grad, marked), None


def written(out: Tensor, rows: Tensor, marked: Tensor) -> Tensor:
    """What `write_rows` does, without its gradient."""
    # another tensor to autograd, which would refuse to go back to one that was written to
    found = out.data
    found.view(-1, found.shape[-1]).index_copy_(0, marked, rows)
    return found


def split_gradient(grad: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `out`, and that of the rows that were written into it."""
    grad_out = grad.clone(memory_format=torch.contiguous_format)
    by_token = grad_out.view(-1, grad.shape[-1])
    of_rows = by_token.index_select(0, marked)
    by_token.index_fill_(0, marked, 0)
    return grad_out, of_rows


def marked_only(rows: Tensor, where: MarkedRows) -> Tensor:
    """`[T, E]` of the rows `[B * M, E]`, without those of tokens that are not marked."""
    return rows if where.slots is None else rows.index_select(0, where.slots)


def taken(states: Tensor, index: Tensor) -> Tensor:
    """The states `[B, M, E]` of the tokens `index` `[B, M]`."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def replaced_rows(out: Tensor, rows: Tensor, index: Tensor, is_marked: Tensor | None) -> Tensor:
    """`out` `[B, H, N, D]` with `rows` `[B, H, M, D]` for the tokens `index` `[B, M]`, where they are marked (None: all are).

    A batch row with fewer marked tokens than others keeps what it has.
    """
    at = index[:, None, :, None].expand_as(rows)
    if is_marked is not None:
        rows = torch.where(is_marked[:, None, :, None], rows, out.gather(2, at))
    return out.scatter(2, at, rows)
