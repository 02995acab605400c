"""Block-sparse attention in plain PyTorch: any device and dtype, forward and backward, O(listed blocks).

Each query block walks its runs of neighbouring key blocks as slices of K and V (no gathers, no copies) and merges them by
online softmax (Milakov and Gimelshein, arXiv:1805.02867); the backward pass recomputes the weights from lse, as
FlashAttention does (Dao et al., arXiv:2205.14135). Query blocks are independent, so a row with many key blocks, a global
row, costs what it needs and pads no other.

Legend: G key heads, R query heads per key head, Q queries, K keys, D head dim; m queries and n keys of a tile. The batch
is a loop: slices of K and V are then operands of a product as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..plan import BlockPlan, Run
from .dropout import kept_at
from .scoring import Scoring

# keys per tile: bounds the scores that exist at once, also for rows that see the whole sequence
MAX_KEYS = 2048


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


@dataclass(frozen=True)
class Tile:
    """Queries `q0..q1` (counted from the query block's first) against keys `k0..k1`, ends exclusive.

    `masks` holds (first column, last + 1, mask `[m, n']`) for the parts of the tile that are partial.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    masks: tuple[tuple[int, int, Tensor], ...]

    @property
    def queries(self) -> slice:
        return slice(self.q0, self.q1)

    @property
    def keys(self) -> slice:
        return slice(self.k0, self.k1)

    def cover(self, scores: Tensor) -> Tensor:
        """Put -inf on the pairs of `scores` `[G, R, m, n]` that the plan leaves out, in place."""
        for first, last, mask in self.masks:
            scores[..., first:last].masked_fill_(~mask, -torch.inf)
        return scores


@dataclass(frozen=True)
class _Part:
    """One batch row and the heads that share a part of the plan's table."""

    b: int
    row: int  # b in the table, which may hold one row for all
    p: int  # the pattern of these heads
    heads: Tensor  # [G, R] int64: the query heads, those of one key head in a row
    chosen: Tensor | None  # [G] int64: the key heads if the part has only some of the heads, each with R = 1

    def queries(self, t: Tensor) -> Tensor:
        """The part's share of `[B, H, Q, ...]` as `[G, R, Q, ...]`."""
        t = t[self.b]
        return (t if self.chosen is None else t[self.heads.flatten()]).unflatten(0, self.heads.shape)

    def keys(self, t: Tensor) -> Tensor:
        """The part's share of `[B, G, K, D]` as `[G, K, D]`."""
        return t[self.b] if self.chosen is None else t[self.b, self.chosen]

    def put(self, total: Tensor, rows: slice, value: Tensor) -> None:
        """Write `value` `[G, R, m, ...]` into `total` `[B, H, Q, ...]`."""
        heads = slice(None) if self.chosen is None else self.heads.flatten()
        total[self.b, heads, rows] = value.flatten(0, 1).to(total.dtype)

    def add(self, total: Tensor, keys: slice, value: Tensor) -> None:
        """Add `value` `[G, n, D]` to `total` `[B, G, K, D]`."""
        into = total[self.b, :, keys]
        if self.chosen is None:
            into.add_(value)
        else:
            into.index_add_(0, self.chosen, value)

    def rows(self, plan: BlockPlan) -> Iterator[tuple[slice, Iterator[Tile]]]:
        """Each query block that sees anything: its queries, its tiles."""
        first = (self.row * len(plan.patterns) + self.p) * plan.q_blocks
        for i, runs in enumerate(plan.runs[first : first + plan.q_blocks]):
            if runs:
                q_range = plan.block_range(i, i, plan.q_len)
                yield slice(*q_range), (tile for run in runs for tile in _tiles(plan, self, q_range, run))

    def drop(self, seed: Tensor, rows: slice, tile: Tile, dropout: float) -> Tensor:
        """What dropout multiplies the weights of a tile by, `[G, R, m, n]`: 0 or 1 / (1 - dropout)."""
        device = self.heads.device
        q = torch.arange(rows.start + tile.q0, rows.start + tile.q1, device=device)
        k = torch.arange(tile.k0, tile.k1, device=device)
        b = torch.tensor(self.b, device=device)
        return kept_at(seed.to(device), b, self.heads[..., None, None], q[:, None], k, dropout) / (1 - dropout)


def _parts(plan: BlockPlan, q: Tensor, groups: int) -> Iterator[_Part]:
    batch, num_heads = q.shape[:2]
    everything = torch.arange(num_heads, device=q.device)
    for b in range(batch):
        row = b if plan.batch_rows > 1 else 0
        for p in range(len(plan.patterns)):
            if plan.heads:
                heads = everything[[h for h, pattern in enumerate(plan.heads) if pattern == p]]
                yield _Part(b, row, p, heads[:, None], heads // (num_heads // groups))
            else:
                yield _Part(b, row, p, everything.view(groups, -1), None)


def _tiles(plan: BlockPlan, part: _Part, q_range: tuple[int, int], run: Run) -> Iterator[Tile]:
    """Cut a run into tiles of at most MAX_KEYS keys and evaluate its partial blocks."""
    step = max(1, MAX_KEYS // plan.block_size)
    for first in range(run.first, run.last + 1, step):
        last = min(first + step - 1, run.last)
        k0, k1 = plan.block_range(first, last, plan.kv_len)
        masks = []
        for a, z in run.partial:
            if a <= last and z >= first:
                c0, c1 = plan.block_range(max(a, first), min(z, last), plan.kv_len)
                masks.append((c0 - k0, c1 - k0, plan.mask(part.row, part.p, q_range, (c0, c1))))
        if len(masks) == 1 and masks[0][1] - masks[0][0] == k1 - k0:
            yield from _trimmed(k0, masks[0][2])
        else:
            yield Tile(0, q_range[1] - q_range[0], k0, k1, tuple(masks))


def _trimmed(k0: int, mask: Tensor) -> Iterator[Tile]:
    """The smallest rectangle around what a partial tile holds: a few global tokens do not cost whole blocks."""
    rows, columns = (mask.any(dim).nonzero() for dim in (1, 0))
    if len(rows):
        q0, q1, first, last = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        yield Tile(q0, q1, k0 + first, k0 + last, ((0, last - first, mask[q0:q1, first:last]),))


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
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=work, device=q.device)
    scratch = _Scratch()
    for part in _parts(plan, q, k.shape[1]):
        part_q, part_k, part_v = part.queries(q), part.keys(k), part.keys(v)
        for rows, tiles in part.rows(plan):
            query = part_q[..., rows, :].to(work) * scoring.scale  # [G, R, m, D]
            state = None
            for tile in tiles:
                keys, values = (t[:, tile.keys].to(work) for t in (part_k, part_v))
                factor = part.drop(seed, rows, tile, dropout) if dropout else None
                change = _Change(scoring, plan, part.heads, rows.start, tile)
                state = _absorb(state, tile, query, keys, values, change, factor, scratch)
            if state is not None:
                top, total, weighted = state
                part.put(out, rows, weighted / total.where(total > 0, 1))
                part.put(lse, rows, (top + total.log()).squeeze(-1))
    return out, lse


@dataclass(frozen=True)
class _Change:
    """What soft cap and bias do to the scores of a tile of the query block that starts at query `row`."""

    scoring: Scoring
    plan: BlockPlan
    heads: Tensor
    row: int
    tile: Tile

    @property
    def _place(self) -> tuple[int, int]:
        return self.row + self.tile.q0 + self.plan.q_offset, self.tile.k0

    @property
    def _last_query(self) -> int:
        return self.plan.q_offset + self.plan.q_len - 1

    def apply(self, scores: Tensor) -> Tensor:
        """Change `scores` `[G, R, m, n]` in place."""
        cap = self.scoring.softcap
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        if self.scoring.bias is not None:
            (q, k), (m, n) = self._place, scores.shape[-2:]
            scores.add_(self.scoring.tile(self.heads, q, m, k, n, self._last_query).to(scores.dtype))
        return scores

    def slope(self, scores: Tensor) -> Tensor | None:
        """d changed score / d score, given the changed ones before they are masked; None for 1 everywhere."""
        cap = self.scoring.softcap
        if cap is None:
            return None
        if self.scoring.bias is not None:
            (q, k), (m, n) = self._place, scores.shape[-2:]
            scores = scores - self.scoring.tile(self.heads, q, m, k, n, self._last_query).to(scores.dtype)
        return 1 - (scores / cap).square()

    def add_gradient(self, total: Tensor | None, grad: Tensor) -> None:
        if total is not None:
            self.scoring.add_gradient(total, self.heads, grad, *self._place, self._last_query)


def _absorb(state, tile: Tile, query, keys: Tensor, values: Tensor, change: _Change, factor, scratch: _Scratch):
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
    grad_bias = None if scoring.bias is None else torch.zeros_like(scoring.bias, dtype=work)
    grad_q = torch.zeros_like(q, dtype=work)
    grad_k, grad_v = torch.zeros_like(k, dtype=work), torch.zeros_like(v, dtype=work)
    scratch = _Scratch()
    for part in _parts(plan, q, k.shape[1]):
        part_q, part_out, part_grad, part_lse, part_grad_lse = (
            part.queries(t) for t in (q, out, grad_out, lse, grad_lse)
        )
        part_k, part_v = part.keys(k), part.keys(v)
        for rows, tiles in part.rows(plan):
            query = part_q[..., rows, :].to(work) * scoring.scale  # [G, R, m, D]
            grad = part_grad[..., rows, :].to(work)
            # d loss / d score = weight * (d loss / d weight - delta)
            delta = (grad * part_out[..., rows, :]).sum(-1, keepdim=True) - part_grad_lse[..., rows, None].to(work)
            row_lse = part_lse[..., rows, None]
            sees = row_lse > -torch.inf
            row_lse, delta = row_lse.where(sees, 0), delta.where(sees, 0)
            grad_query = torch.zeros_like(query)
            for tile in tiles:
                keys, values = (t[:, tile.keys].to(work) for t in (part_k, part_v))
                factor = part.drop(seed, rows, tile, dropout) if dropout else None
                of_rows = (t[..., tile.queries, :] for t in (query, grad, row_lse, delta))
                change = _Change(scoring, plan, part.heads, rows.start, tile)
                tile_q, tile_k, tile_v = _tile_gradients(
                    tile, *of_rows, keys, values, change, grad_bias, factor, scratch
                )
                into = grad_query[..., tile.queries, :]
                into.add_(tile_q.view(into.shape))
                part.add(grad_k, tile.keys, tile_k)
                part.add(grad_v, tile.keys, tile_v)
            part.put(grad_q, rows, grad_query.mul_(scoring.scale))
    grad_bias = None if grad_bias is None else grad_bias.to(scoring.bias.dtype)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias


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
