"""The rows of a few global tokens with projections of their own, with no key or value of all tokens ever made.

q @ (W x + b) = (q @ W) x + q @ b, where the last part is the same for all keys and drops out of the softmax; and a mean of
values W x + b is W (mean of x) + b. So M queries are brought to the N states rather than N states to the queries: exact, for
M * N * E work instead of N * E * E. One autograd node, since the host would otherwise launch more slowly than a GPU computes.

Legend: B batch, N tokens, H heads, D head dim, E = H * D, M most marked tokens of any batch row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def replace_rows(
    out: Tensor, states: Tensor, index: Tensor, is_marked: Tensor | None, real: Tensor | None,
    query: nn.Linear, key: nn.Linear, value: nn.Linear,
) -> Tensor:  # fmt: skip
    """`out` `[B, H, N, D]` with the rows of marked tokens replaced, in its memory, by their attention to all real tokens.

    Attention keeps `out` for its backward pass, where it stands beside its gradient only, which is 0 in those rows: what it finds there
    then may be anything, and a copy would be one more tensor of all tokens in every layer.

    Args:
        out: what attention gave, and nothing else holds.
        states: what is projected, `[B, N, E]`.
        index: `[B, M]`, tokens whose rows are replaced, no token twice.
        is_marked: `[B, M]`, false where a row stays as it is; None: nowhere.
        real: `[B, N]`, true on real tokens.
        query, key, value: the projections.
    """
    weights = query.weight, query.bias, key.weight, key.bias, value.weight, value.bias
    kind = out.device.type
    with torch.autocast(kind, enabled=False):
        # the dtype of `out` is what autocast gave the other rows
        states, *weights = (t.to(out.dtype) for t in (states, *weights))
        return _Rows.apply(out, states, index, is_marked, real, *weights)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, states, index, is_marked, real, w_query, b_query, w_key, b_key, w_value, b_value):
        heads, dim = out.shape[1], out.shape[3]
        scale = dim**-0.5
        # [B, M, E] by row, [H, B * M, ...] by head
        marked = taken(states, index).flatten(0, 1)
        q = torch.addmm(b_query, marked, w_query.t(), beta=scale, alpha=scale)
        q = q.view(-1, heads, dim).transpose(0, 1)
        directions = _by_row(q @ w_key.view(heads, dim, -1), index)  # [B, H * M, E]
        scores = directions @ states.mT
        if real is not None:
            scores.masked_fill_(~seen_keys(real)[:, None], -torch.inf)
        weights = scores.softmax(-1)
        means = weights @ states  # [B, H * M, E]
        rows = torch.baddbmm(b_value.view(heads, 1, dim), _by_head(means, heads), w_value.view(heads, dim, -1).mT)
        rows = rows.unflatten(1, index.shape).transpose(0, 1)
        # not the same tensor to autograd, which would refuse to go back to one that was written to
        found = out.data
        place = index[:, None, :, None].expand_as(rows)
        found.scatter_(2, place, rows if is_marked is None else _where_marked(found, place, rows, is_marked))
        ctx.save_for_backward(
            states, index, is_marked, w_query, w_key, b_key, w_value, marked, q, directions, weights, means
        )
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, index, is_marked, w_query, w_key, b_key, w_value, marked, q, directions, weights, means = (
            ctx.saved_tensors
        )
        heads, dim = grad.shape[1], grad.shape[3]
        place = index[:, None, :, None].expand(-1, heads, -1, dim)
        given = grad.gather(2, place)
        if is_marked is None:
            grad_out = grad.scatter(2, place, 0)
        else:
            keeps = is_marked[:, None, :, None]
            grad_out = grad.scatter(2, place, given.masked_fill(keeps, 0))
            given = given.masked_fill(~keeps, 0)
        given = given.transpose(0, 1).flatten(1, 2)  # [H, B * M, D]
        grad_w_value = given.mT @ _by_head(means, heads)
        grad_means = _by_row(given @ w_value.view(heads, dim, -1), index)
        # of the scores
        change = torch._softmax_backward_data(grad_means @ states.mT, weights, -1, weights.dtype)
        grad_states = torch.baddbmm(weights.mT @ grad_means, change.mT, directions)
        grad_directions = _by_head(change @ states, heads)
        grad_w_key = q.mT @ grad_directions
        grad_q = torch.baddbmm(q, grad_directions, w_key.view(heads, dim, -1).mT, beta=0, alpha=dim**-0.5)
        grad_q = grad_q.transpose(0, 1).flatten(1)  # [B * M, E]
        at = index[..., None].expand(-1, -1, states.shape[2])
        of_marked = (grad_q @ w_query).view(at.shape)
        grad_states.scatter_(1, at, grad_states.gather(1, at) + of_marked)
        return (
            grad_out, grad_states, None, None, None, grad_q.t() @ marked, grad_q.sum(0), grad_w_key.view_as(w_key),
            torch.zeros_like(b_key), grad_w_value.view_as(w_value), given.sum(1).flatten(),
        )  # fmt: skip


def taken(states: Tensor, index: Tensor) -> Tensor:
    """The states `[B, M, E]` of the tokens `index` `[B, M]`."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def with_rows(out: Tensor, rows: Tensor, index: Tensor, is_marked: Tensor | None) -> Tensor:
    """`out` `[B, H, N, D]` with `rows` `[B, H, M, D]` for the tokens `index`, where they are marked (None: all are).

    A batch row with fewer marked tokens than others keeps what it has.
    """
    place = index[:, None, :, None].expand_as(rows)
    return out.scatter(2, place, rows if is_marked is None else _where_marked(out, place, rows, is_marked))


def _where_marked(out: Tensor, place: Tensor, rows: Tensor, is_marked: Tensor) -> Tensor:
    return torch.where(is_marked[:, None, :, None], rows, out.gather(2, place))


def seen_keys(real: Tensor) -> Tensor:
    """`real` `[B, N]`, but all keys of a row of padding alone: it must give no NaN, and what it sees is thrown away."""
    return real | ~real.any(-1, keepdim=True)


def _by_row(t: Tensor, index: Tensor) -> Tensor:
    """`[B, H * M, E]` of `[H, B * M, E]`."""
    return t.unflatten(1, index.shape).transpose(0, 1).flatten(1, 2)


def _by_head(t: Tensor, heads: int) -> Tensor:
    """`[H, B * M, E]` of `[B, H * M, E]`."""
    return t.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
