"""Block-sparse attention in plain PyTorch: any device and dtype, forward and backward, O(listed blocks).

Each query block walks its runs of neighbouring key blocks as slices of K and V (no gathers, no copies) and merges them by
online softmax (Milakov and Gimelshein, arXiv:1805.02867); the backward pass recomputes the weights from lse, as
FlashAttention does (Dao et al., arXiv:2205.14135). Query blocks are independent, so a row with many key blocks, a global
row, costs what it needs and pads no other. Marked tokens are gathered side by side first (`plan/gathered.py`).

Legend: G key heads, R query heads per key head, Q queries, K keys, D head dim; m queries and n keys of a tile. The batch
is a loop: slices of K and V are then operands of a product as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....plan import BlockPlan, calls
from ...scoring import Scoring
from ...strides import like
from . import cpu_sdpa as fused
from .tiles import Change, Tile, keys_of, parts, put_at, take


def refuses(q: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float) -> str | None:
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scoring: Scoring, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]` in the dtype of q and lse `[B, H, Q]` in float32 (float64 for float64), differentiable."""
    return _Blockwise.apply(q, k, v, scoring.bias, plan, scoring, dropout, seed)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, plan, scoring, dropout, seed):
        out, lse = forward(q, k, v, plan, scoring, dropout, seed)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        # the bias is kept above, where autograd watches it
        ctx.rest = plan, replace(scoring, bias=None), dropout, seed
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        *tensors, bias = ctx.saved_tensors
        plan, scoring, *rest = ctx.rest
        grads = backward(*tensors, grad_out, grad_lse, plan, replace(scoring, bias=bias), *rest)
        return *grads, None, None, None, None


class _Scratch:
    """Memory that tile after tile writes its products to: fresh memory costs more than the products themselves."""

    def __init__(self):
        self.held: dict[str, Tensor] = {}

    def product(self, name: str, rows: Tensor, columns: Tensor) -> Tensor:
        """`[G, x, y] @ [G, y, z]`, valid until the next product of this name."""
        shape = rows.shape[0], rows.shape[1], columns.shape[2]
        size = shape[0] * shape[1] * shape[2]
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = rows.new_empty(size)
        return torch.bmm(rows, columns, out=self.held[name][:size].view(shape))


def forward(q, k, v, plan: BlockPlan, scoring: Scoring, dropout: float, seed) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, Dv]` and lse `[B, H, Q]`."""
    work = torch.promote_types(q.dtype, torch.float32)
    out = lse = None
    for call in calls(plan):
        call_q = q if call.queries is None else take(q, call.queries)
        call_out = like(call_q, v.shape[-1]).zero_()
        call_lse = torch.full(call_q.shape[:-1], -torch.inf, dtype=work, device=q.device)
        sources = [(keys_of(piece, k), keys_of(piece, v)) for piece in call.pieces]
        _forward(call_q, sources, call.pieces, call_out, call_lse, plan, scoring, dropout, seed)
        if call.queries is None:
            out, lse = call_out, call_lse
        else:
            put_at(out, call.queries, call_out)
            put_at(lse, call.queries, call_lse)
    return out, lse


def _forward(q, sources, pieces, out, lse, plan: BlockPlan, scoring: Scoring, dropout: float, seed) -> None:
    """Fill `out` and `lse` of the queries of a call; `sources` holds keys and values for each of its pieces."""
    scratch, is_fused = _Scratch(), fused.suits(q, sources[0][1], scoring, dropout)
    for part in parts(plan, pieces, q, sources[0][0].shape[1], scoring):
        part_q = part.queries(q)
        part_sources = [tuple(map(part.keys, source)) for source in sources]
        for rows, tiles in part.rows(pieces):
            if is_fused:
                found = fused.attend_rows(part_q[..., rows, :], tiles, part_sources, scoring.scale)
                if found is not None:
                    part.put(out, rows, found[0])
                    part.put(lse, rows, found[1])
                continue
            query = part_q[..., rows, :].to(lse.dtype) * scoring.scale  # [G, R, m, D]
            state = None
            for tile in tiles:
                keys, values = (tile.of_keys(t).to(lse.dtype) for t in part_sources[tile.piece])
                factor = part.drop(seed, pieces[tile.piece], rows, tile, dropout) if dropout else None
                change = Change(scoring, plan, part, pieces[tile.piece], rows, tile)
                state = _absorb(state, tile, query, keys, values, change, factor, scratch)
            if state is not None:
                top, total, weighted = state
                part.put(out, rows, weighted / total.where(total > 0, 1))
                part.put(lse, rows, (top + total.log()).squeeze(-1))


def _absorb(state, tile: Tile, query, keys: Tensor, values: Tensor, change: Change, factor, scratch: _Scratch):
    """Merge one tile into the running (top `[G, R, m, 1]`, total alike, weighted `[G, R, m, Dv]`)."""
    tile_q = query[..., tile.queries, :]
    shape = *tile_q.shape[:-1], keys.shape[1]
    scores = tile.cover(change.apply(scratch.product("scores", tile_q.flatten(1, 2), keys.mT).view(shape)))
    if state is None:
        nothing = query.new_zeros(*query.shape[:-1], 1)
        state = nothing - torch.inf, nothing, query.new_zeros(*query.shape[:-1], values.shape[-1])
    old_top, old_total, old_weighted = (t[..., tile.queries, :] for t in state)
    top = torch.maximum(scores.amax(-1, keepdim=True), old_top)
    # a row that has seen nothing yet has top -inf, and -inf - -inf is NaN
    finite = top.where(top > -torch.inf, 0)
    weights = scores.sub_(finite).exp_()
    shrink = (old_top - finite).exp_()
    old_total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
    if factor is not None:
        weights = weights.mul_(factor)
    weighted = scratch.product("weighted", weights.flatten(1, 2), values)
    old_weighted.mul_(shrink).add_(weighted.view(old_weighted.shape))
    old_top.copy_(top)
    return state


def backward(
    q, k, v, out, lse, grad_out, grad_lse, plan: BlockPlan, scoring: Scoring, dropout: float, seed
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias (None without one), given those of out and lse."""
    work = lse.dtype
    totals = [torch.zeros_like(t, dtype=work, memory_format=torch.contiguous_format) for t in (q, k, v)]
    grad_bias = None if scoring.bias is None else torch.zeros_like(scoring.bias, dtype=work)
    rest = grad_bias, plan, scoring, dropout, seed
    first, *others = calls(plan)
    # what the first call found for the queries of another came to nothing
    heard = [grad_out, grad_lse]
    for call in others:
        heard = [t.clone() for t in heard]
        for t in heard:
            put_at(t, call.queries, torch.zeros_like(take(t, call.queries)))
    _backward(q, k, v, out, lse, *heard, first.pieces, totals, *rest)
    for call in others:
        taken = [take(t, call.queries) for t in (q, out, lse, grad_out, grad_lse)]
        exists = (call.queries >= 0)[:, None]
        taken[3:] = taken[3].where(exists[..., None], 0), taken[4].where(exists, 0)
        grad_q = torch.zeros_like(taken[0], dtype=work)
        _backward(taken[0], k, v, *taken[1:], call.pieces, (grad_q, *totals[1:]), *rest)
        put_at(totals[0], call.queries, grad_q)
    grad_bias = None if grad_bias is None else grad_bias.to(scoring.bias.dtype)
    return *(total.to(t.dtype) for total, t in zip(totals, (q, k, v), strict=True)), grad_bias


def _backward(q, k, v, out, lse, grad_out, grad_lse, pieces, totals, grad_bias, plan, scoring, dropout, seed) -> None:
    """Write the gradient of a call's queries to the first of `totals`, and add those of keys and values to the others."""
    work, scratch = lse.dtype, _Scratch()
    sources = [(keys_of(piece, k), keys_of(piece, v)) for piece in pieces]
    sums = [totals[1:] if source[0] is k else [torch.zeros_like(t, dtype=work) for t in source] for source in sources]
    for part in parts(plan, pieces, q, k.shape[1], scoring):
        part_q, part_out, part_grad, part_lse, part_grad_lse = (
            part.queries(t) for t in (q, out, grad_out, lse, grad_lse)
        )
        part_sources = [tuple(map(part.keys, source)) for source in sources]
        for rows, tiles in part.rows(pieces):
            query = part_q[..., rows, :].to(work) * scoring.scale  # [G, R, m, D]
            grad = part_grad[..., rows, :].to(work)
            # d loss / d score = weight * (d loss / d weight - delta)
            delta = (grad * part_out[..., rows, :]).sum(-1, keepdim=True) - part_grad_lse[..., rows, None].to(work)
            row_lse = part_lse[..., rows, None]
            sees = row_lse > -torch.inf
            row_lse, delta = row_lse.where(sees, 0), delta.where(sees, 0)
            grad_query = torch.zeros_like(query)
            for tile in tiles:
                piece = pieces[tile.piece]
                keys, values = (tile.of_keys(t).to(work) for t in part_sources[tile.piece])
                factor = part.drop(seed, piece, rows, tile, dropout) if dropout else None
                of_rows = (t[..., tile.queries, :] for t in (query, grad, row_lse, delta))
                change = Change(scoring, plan, part, piece, rows, tile)
                tile_q, *tile_kv = _tile_gradients(tile, *of_rows, keys, values, change, grad_bias, factor, scratch)
                into = grad_query[..., tile.queries, :]
                into.add_(tile_q.view(into.shape))
                for total, of_tile in zip(sums[tile.piece], tile_kv, strict=True):
                    tile.add(total[part.b], part.chosen, of_tile)
            part.put(totals[0], rows, grad_query.mul_(scoring.scale))
    for piece, of_piece in zip(pieces, sums, strict=True):
        for total, gathered in zip(totals[1:], of_piece, strict=True):
            if gathered is not total:
                put_at(total, piece.keys, gathered, add=True)


def _tile_gradients(
    tile: Tile, query: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, keys: Tensor, values: Tensor, change, grad_bias,
    factor, scratch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a tile adds to the gradients of its queries `[G, R * m, D]` and of its keys and values `[G, n, D]`.

    What it adds to the gradient of the bias is added to `grad_bias`.
    """
    shape = *query.shape[:-1], keys.shape[1]
    query, grad = query.flatten(1, 2), grad.flatten(1, 2)
    scores = change.apply(scratch.product("scores", query, keys.mT).view(shape))
    slope = change.slope(scores)
    weights = tile.cover(scores).sub_(lse).exp_()
    grad_weights = scratch.product("grad_weights", grad, values.mT).view(shape)
    dropped = weights
    if factor is not None:
        dropped = weights * factor
        grad_weights.mul_(factor)
    grad_values = scratch.product("grad_values", dropped.flatten(1, 2).mT, grad)
    grad_scores = grad_weights.sub_(delta).mul_(weights)
    change.add_gradient(grad_bias, grad_scores)
    if slope is not None:
        grad_scores.mul_(slope)
    grad_scores = grad_scores.flatten(1, 2)
    grad_keys = scratch.product("grad_keys", grad_scores.mT, query)
    return scratch.product("grad_query", grad_scores, keys), grad_keys, grad_values
