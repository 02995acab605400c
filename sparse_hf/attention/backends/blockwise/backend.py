"""Block-sparse attention in plain PyTorch: any device and dtype, forward and backward, O(listed blocks).

Each query block walks its runs of neighbouring key blocks as slices of K and V (no gathers, no copies) and merges them by
online softmax (Milakov and Gimelshein, arXiv:1805.02867); the backward pass recomputes the weights from lse, as
FlashAttention does (Dao et al., arXiv:2205.14135). Query blocks are independent, so a row with many key blocks, a global
row, costs what it needs and pads no other. Marked tokens are gathered side by side first (`plan/gathered.py`).

Legend: G key heads, R query heads per key head, Q queries, K keys, D head dim; m queries and n keys of a tile. The batch
is a loop: slices of K and V are then operands of a product as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....plan import stages
from ...backend import AttentionCall, Backend, Given, Gradients, Results
from ...strides import like
from . import cpu_sdpa
from .tiles import AnyTile, Change, Piece, Source, keys_index, keys_of, put_at, shares, take


class Blockwise(Backend):
    """Query block by query block, on any device and in any dtype."""

    name = "blockwise"

    def why_not(self, call: AttentionCall) -> str | None:
        return None

    def forward(self, call: AttentionCall) -> Results:
        q = call.q
        first, *others = stages(call.blocks)
        out, lse = _forward(call, q, first.pieces)
        for of_rows in others:
            assert of_rows.queries is not None
            row_out, row_lse = _forward(call, take(q, of_rows.queries), of_rows.pieces)
            put_at(out, of_rows.queries, row_out)
            put_at(lse, of_rows.queries, row_lse)
        return out, lse

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        out, lse, grad_out, grad_lse = given.out, given.lse, given.some_grad_out, given.some_grad_lse
        q, k, v, bias = call.q, call.k, call.v, call.scoring.bias
        grads = Totals(
            *(torch.zeros_like(t, dtype=lse.dtype, memory_format=torch.contiguous_format) for t in (q, k, v))
        )
        grads.bias = None if bias is None else torch.zeros_like(bias, dtype=lse.dtype)
        first, *others = stages(call.blocks)
        # what the first call found for the queries of another came to nothing
        own = grad_out, grad_lse
        for of_rows in others:
            assert of_rows.queries is not None
            own = own[0].clone(), own[1].clone()
            for t in own:
                put_at(t, of_rows.queries, torch.zeros_like(take(t, of_rows.queries)))
        _backward(call, _Queries(q, out, lse, *own), first.pieces, grads)
        for of_rows in others:
            assert of_rows.queries is not None
            taken = [take(t, of_rows.queries) for t in (q, out, lse, grad_out, grad_lse)]
            exists = (of_rows.queries >= 0)[:, None]
            taken[3:] = taken[3].where(exists[..., None], 0), taken[4].where(exists, 0)
            row_grads = replace(grads, q=torch.zeros_like(taken[0], dtype=lse.dtype))
            _backward(call, _Queries(*taken), of_rows.pieces, row_grads)
            put_at(grads.q, of_rows.queries, row_grads.q)
        of_bias = None if bias is None or grads.bias is None else grads.bias.to(bias.dtype)
        return grads.q.to(q.dtype), grads.k.to(k.dtype), grads.v.to(v.dtype), of_bias


@dataclass
class Totals:
    """Gradients that are summed up, in the dtype of lse."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Queries:
    """What the backward pass starts from, for some queries `[B, H, Q, ...]`."""

    q: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return self.q, self.out, self.lse, self.grad_out, self.grad_lse


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


def _forward(call: AttentionCall, q: Tensor, pieces: tuple[Piece, ...]) -> Results:
    """Out and lse of the queries `q` of a call over some pieces of its plan."""
    plan, scoring, dropout = call.blocks, call.scoring, call.dropout
    out = like(q, call.v.shape[-1]).zero_()
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    sources = [(keys_of(piece, call.k), keys_of(piece, call.v)) for piece in pieces]
    scratch, on_sdpa = _Scratch(), cpu_sdpa.can_run(q, sources[0][1], scoring, dropout)
    for share in shares(plan, pieces, q, sources[0][0].shape[1], scoring):
        share_q = share.queries(q)
        share_sources = [(share.keys(keys), share.keys(values)) for keys, values in sources]
        for rows, tiles in share.rows(pieces):
            if on_sdpa:
                found = cpu_sdpa.attend_rows(share_q[..., rows, :], tiles, share_sources, scoring.scale)
                if found is not None:
                    share.put(out, rows, found[0])
                    share.put(lse, rows, found[1])
                continue
            query = share_q[..., rows, :].to(lse.dtype) * scoring.scale  # [G, R, m, D]
            state = None
            for tile in tiles:
                keys, values = (tile.of_keys(t).to(lse.dtype) for t in share_sources[tile.piece])
                change = Change(scoring, plan, share, pieces[tile.piece], rows, tile)
                factor = change.drop(dropout) if dropout else None
                state = _absorb(state, tile, query, (keys, values), change, factor, scratch)
            if state is not None:
                top, total, weighted = state
                share.put(out, rows, weighted / total.where(total > 0, 1))
                share.put(lse, rows, (top + total.log()).squeeze(-1))
    return out, lse


def _absorb(
    state, tile: AnyTile, query: Tensor, source: Source, change: Change, factor: Tensor | None, scratch: _Scratch
):
    """Merge one tile into the running (top `[G, R, m, 1]`, total alike, weighted `[G, R, m, Dv]`)."""
    keys, values = source
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


def _backward(call: AttentionCall, of_queries: _Queries, pieces: tuple[Piece, ...], grads: Totals) -> None:
    """Write the gradient of these queries to `grads.q`, and add to the others."""
    plan, scoring, dropout, work, scratch = call.blocks, call.scoring, call.dropout, of_queries.lse.dtype, _Scratch()
    sources = [(keys_of(piece, call.k), keys_of(piece, call.v)) for piece in pieces]
    sums = [
        (grads.k, grads.v) if source[0] is call.k else tuple(torch.zeros_like(t, dtype=work) for t in source)
        for source in sources
    ]
    for share in shares(plan, pieces, of_queries.q, call.k.shape[1], scoring):
        own = _Queries(*(share.queries(t) for t in of_queries.tensors()))
        share_sources = [(share.keys(keys), share.keys(values)) for keys, values in sources]
        for rows, tiles in share.rows(pieces):
            of_rows = _row_state(own, rows, scoring.scale, work)
            grad_query = torch.zeros_like(of_rows.query)
            for tile in tiles:
                keys, values = (tile.of_keys(t).to(work) for t in share_sources[tile.piece])
                change = Change(scoring, plan, share, pieces[tile.piece], rows, tile)
                factor = change.drop(dropout) if dropout else None
                tile_q, *tile_kv = _tile_gradients(
                    tile, of_rows.cut(tile), (keys, values), change, grads.bias, factor, scratch
                )
                into = grad_query[..., tile.queries, :]
                into.add_(tile_q.view(into.shape))
                for total, of_tile in zip(sums[tile.piece], tile_kv, strict=True):
                    tile.add(total[share.b], share.chosen, of_tile)
            share.put(grads.q, rows, grad_query.mul_(scoring.scale))
    for piece, of_piece in zip(pieces, sums, strict=True):
        for total, gathered in zip((grads.k, grads.v), of_piece, strict=True):
            index = keys_index(piece)
            if index is not None:
                put_at(total, index, gathered, add=True)


@dataclass(frozen=True, eq=False)
class _RowState:
    """Of a query block `[G, R, m, ...]`: scaled queries, gradient of out, lse, and delta."""

    query: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor

    def cut(self, tile: AnyTile) -> _RowState:
        """The share of a tile's queries."""
        return _RowState(*(t[..., tile.queries, :] for t in (self.query, self.grad, self.lse, self.delta)))


def _row_state(own: _Queries, rows: slice, scale: float, work: torch.dtype) -> _RowState:
    query = own.q[..., rows, :].to(work) * scale
    grad = own.grad_out[..., rows, :].to(work)
    # d loss / d score = weight * (d loss / d weight - delta)
    delta = (grad * own.out[..., rows, :]).sum(-1, keepdim=True) - own.grad_lse[..., rows, None].to(work)
    lse = own.lse[..., rows, None]
    # a row with infinite lse has weights of 0: it sees nothing, or another part of a whole counts it
    counts = lse.isfinite()
    return _RowState(query, grad, lse.where(counts, torch.inf), delta.where(counts, 0))


def _tile_gradients(
    tile: AnyTile, of_rows: _RowState, source: Source, change: Change, grad_bias: Tensor | None, factor: Tensor | None,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a tile adds to the gradients of its queries `[G, R * m, D]` and of its keys and values `[G, n, D]`.

    What it adds to the gradient of the bias is added to `grad_bias`.
    """
    keys, values = source
    shape = *of_rows.query.shape[:-1], keys.shape[1]
    query, grad = of_rows.query.flatten(1, 2), of_rows.grad.flatten(1, 2)
    scores = change.apply(scratch.product("scores", query, keys.mT).view(shape))
    slope = change.slope(scores)
    weights = tile.cover(scores).sub_(of_rows.lse).exp_()
    grad_weights = scratch.product("grad_weights", grad, values.mT).view(shape)
    dropped = weights
    if factor is not None:
        dropped = weights * factor
        grad_weights.mul_(factor)
    grad_values = scratch.product("grad_values", dropped.flatten(1, 2).mT, grad)
    grad_scores = grad_weights.sub_(of_rows.delta).mul_(weights)
    change.add_gradient(grad_bias, grad_scores)
    if slope is not None:
        grad_scores.mul_(slope)
    grad_scores = grad_scores.flatten(1, 2)
    grad_keys = scratch.product("grad_keys", grad_scores.mT, query)
    return scratch.product("grad_query", grad_scores, keys), grad_keys, grad_values
