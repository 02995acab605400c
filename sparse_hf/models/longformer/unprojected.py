"""The rows of global tokens, where they are rare, with no key or value of all tokens ever made.

q @ (W x + b) = (q @ W) x + q @ b, where the last term is the same for all keys and drops out of the softmax; and a mean of
values W x + b is W (mean of x) + b. So M queries are brought to the N states rather than N states to the queries: exact, for
M * N * E work instead of N * E * E. One autograd node, since the host would otherwise launch more slowly than a GPU computes.

Legend: B batch, N tokens, H heads, D head dim, E = H * D, M most marked tokens of any batch row, T marked tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...attention.autograd import refuse_second_derivative
from .rows import WHAT, marked_only, split_gradient, written
from .tokens import MarkedRows


def unprojected_rows(
    out: Tensor, states: Tensor, where: MarkedRows, head_dim: int, projections: tuple[nn.Linear, nn.Linear, nn.Linear]
) -> Tensor:
    """`out` with the rows of marked tokens replaced, in its memory, by their attention to the keys that they see.

    Args:
        out: `[B, N, E]`, what attention gave; see `write_rows`.
        states: what is projected, `[B, N, E]`.
        projections: of queries, keys and values, without anything but their weights.
    """
    weights = [t for projection in projections for t in (projection.weight, projection.bias)]
    with torch.autocast(out.device.type, enabled=False):
        # the dtype of `out` is what autocast gave the other rows
        states, *weights = (t.to(out.dtype) for t in (states, *weights))
        return _Rows.apply(out, states, where, head_dim, *weights)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, states: Tensor, where: MarkedRows, head_dim: int, *weights: Tensor):
        w_query, b_query, w_key, _, w_value, b_value = weights
        batch, length, width = states.shape
        heads, scale = w_query.shape[0] // head_dim, head_dim**-0.5
        marked = states.reshape(-1, width).index_select(0, where.index)  # [B * M, E]
        q = torch.addmm(b_query, marked, w_query.t(), beta=scale, alpha=scale)
        q = q.view(-1, heads, head_dim).transpose(0, 1)  # [H, B * M, D]
        directions = _by_row(q @ w_key.view(heads, head_dim, width), batch)  # [B, H * M, E]
        scores = directions @ states.mT
        if where.hidden is not None:
            scores.view(batch, heads, -1, length).masked_fill_(where.hidden[:, None], -torch.inf)
        shares = scores.softmax(-1)
        means = shares @ states  # [B, H * M, E]
        values = w_value.view(heads, head_dim, width).mT
        rows = torch.baddbmm(b_value.view(heads, 1, head_dim), _by_head(means, heads), values)
        rows = rows.transpose(0, 1).flatten(1)  # [B * M, E]
        ctx.save_for_backward(states, w_query, w_key, w_value, marked, q, directions, shares, means)
        ctx.where = where
        return written(out, marked_only(rows, where), where.marked)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative(WHAT)
        states, w_query, w_key, w_value, marked, q, directions, shares, means = ctx.saved_tensors
        where, (heads, _, head_dim), width = ctx.where, q.shape, states.shape[2]
        grad_out, given = split_gradient(grad, where.marked)
        if where.slots is not None:
            given = given.new_zeros(marked.shape[0], given.shape[1]).index_copy_(0, where.slots, given)
        grad_b_value = given.sum(0)
        given = given.view(-1, heads, head_dim).transpose(0, 1)  # [H, B * M, D]
        grad_w_value = given.mT @ _by_head(means, heads)
        grad_means = _by_row(given @ w_value.view(heads, head_dim, width), states.shape[0])
        # of the scores; a type checker finds what is not in torch's list of public names in its operators alone
        change = torch.ops.aten._softmax_backward_data(grad_means @ states.mT, shares, -1, shares.dtype)
        grad_states = torch.baddbmm(shares.mT @ grad_means, change.mT, directions)
        grad_directions = _by_head(change @ states, heads)
        grad_w_key = q.mT @ grad_directions
        grad_q = torch.baddbmm(q, grad_directions, w_key.view(heads, head_dim, width).mT, beta=0, alpha=head_dim**-0.5)
        grad_q = grad_q.transpose(0, 1).flatten(1)  # [B * M, E]
        grad_states.view(-1, width).index_add_(0, where.index, grad_q @ w_query)
        return (
            grad_out, grad_states, None, None, grad_q.t() @ marked, grad_q.sum(0), grad_w_key.view_as(w_key),
            grad_b_value.new_zeros(w_key.shape[0]), grad_w_value.view_as(w_value), grad_b_value,
        )  # fmt: skip


def _by_row(t: Tensor, batch: int) -> Tensor:
    """`[B, H * M, E]` of `[H, B * M, E]`."""
    return t.unflatten(1, (batch, -1)).transpose(0, 1).flatten(1, 2)


def _by_head(t: Tensor, heads: int) -> Tensor:
    """`[H, B * M, E]` of `[B, H * M, E]`."""
    return t.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
