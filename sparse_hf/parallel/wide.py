"""Queries that see nearly everything: every rank computes them over its own keys, and their owners merge what all found.

Legend: B batch, H query heads, G key heads, M wide queries of a row, n tokens of this rank, D and E head dims, S ranks, T wide
queries of this rank in all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..attention.backend import AttentionCall, Results
from ..attention.merge import merge
from ..pattern.base import as_pattern
from ..plan import build_plan
from .exchange import Ranks, Route
from .text import SplitText

# keys whose scores exist at a time
KEYS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class WideRows:
    """The wide queries of one text under one pattern.

    Attributes:
        index: `[R, M]`, where they stand in the text, -1 for none.
        sent: of each rank, rows `[B * M]` of its own queries.
        own: rows of the batch and tokens of this rank's part, `[T]` each.
    """

    ranks: Ranks
    text: SplitText
    index: Tensor
    route: Route
    sent: list[Tensor]
    own: tuple[Tensor, Tensor]

    @staticmethod
    def of(ranks: Ranks, text: SplitText, index: Tensor, like: Tensor) -> WideRows:
        """Those of this rank; `like` is of its batch and on its device."""
        rows, device, bounds = like.shape[0], like.device, text.bounds
        of_rows = index.expand(rows, -1)
        route = Route.of(ranks, bounds, [of_rows] * ranks.size).to(device)
        owners = [(of_rows >= a) & (of_rows < z) for a, z in zip(bounds[:-1], bounds[1:], strict=True)]
        sent = [owned.flatten().nonzero().flatten().to(device) for owned in owners]
        # all ranks ask for the same, so that this one's are what it sends to any of them
        row, token = (t[: route.sent[0]] for t in route.picked)
        return WideRows(ranks, text, index.to(device), route, sent, (row, token))

    def put(self, call: AttentionCall, out: Tensor, lse: Tensor) -> Results:
        """`out` `[B, H, n, E]` and `lse` `[B, H, n]` with those of this rank's wide queries."""
        (q,) = self.route.fetch(call.q.transpose(1, 2))
        wide_out, wide_lse = self.shared(call, q.transpose(1, 2), call.k, call.v)
        row, token = self.own
        out = out.transpose(1, 2).index_put((row, token), wide_out.to(out.dtype)).transpose(1, 2)
        if call.wants_lse:
            lse = lse.transpose(1, 2).index_put((row, token), wide_lse.to(lse.dtype)).transpose(1, 2)
        return out, lse

    def shared(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out `[T, H, E]` and lse `[T, H]` of this rank's wide queries, over the keys of all ranks.

        Args:
            call: for its pattern, scores and dropout.
            q: `[B, H, M, D]`, the wide queries of all ranks.
            k, v: `[B, G, n, D]`, of this rank.
        """
        out, lse = self._over_own_keys(call, q, k, v)
        found = torch.cat((out.to(lse.dtype), lse[..., None]), -1).transpose(1, 2).flatten(0, 1)  # [B * M, H, E + 1]
        heads, count = found.shape[1], len(self.own[0])
        sent = found.index_select(0, torch.cat(self.sent)).flatten(1)
        got = self.ranks.swap(sent, [len(rows) for rows in self.sent], [count] * self.ranks.size)
        parts = got.view(self.ranks.size, count, heads, found.shape[2])
        return merge([(part[..., :-1], part[..., -1]) for part in parts.unbind()])

    def _over_own_keys(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out `[B, H, M, E]` and lse `[B, H, M]`, some keys at a time."""
        pattern, begin = as_pattern(call.pattern), self.text.bounds[self.ranks.rank]  # pyright: ignore[reportArgumentType]
        padding, segments, marks = self.text.batch.tensors
        plan = build_plan(
            pattern, self.text.length, key_padding_mask=padding, segment_ids=segments, marks=marks, device=q.device
        )

        # rows that are alike are asked once
        index = self.index[: plan.batch_rows].expand(plan.batch_rows, -1)

        def part(first: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            row = torch.arange(plan.batch_rows, device=q.device)[:, None, None]
            keys = torch.arange(first, first + k.shape[2], device=q.device)
            queries = index[..., None]
            allowed = [
                plan.allows(row, p, queries.clamp(min=0), keys) & (queries >= 0) for p in range(len(plan.patterns))
            ]
            of_heads = torch.stack([allowed[p] for p in plan.heads or (0,)], 1)  # [rows, H or 1, M, keys]
            return _dense(call, (q, k, v), of_heads)

        pieces = zip(k.split(KEYS_AT_ONCE, 2), v.split(KEYS_AT_ONCE, 2), strict=True)
        parts = [
            checkpoint(partial(part, begin + i * KEYS_AT_ONCE), q, *piece, use_reentrant=False)
            for i, piece in enumerate(pieces)
        ]
        return merge(parts)  # pyright: ignore[reportArgumentType]


def _dense(call: AttentionCall, qkv: tuple[Tensor, Tensor, Tensor], allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Out `[B, H, M, E]` and lse `[B, H, M]` over the pairs that are `allowed` `[B or 1, H or 1, M, n]`."""
    work = torch.promote_types(qkv[0].dtype, torch.float32)
    q, k, v = (t.to(work) for t in qkv)
    repeats = q.shape[1] // k.shape[1]
    scores = (q.unflatten(1, (-1, repeats)) @ k[:, :, None].mT).flatten(1, 2) * call.scoring.scale
    if call.scoring.softcap is not None:
        scores = (scores / call.scoring.softcap).tanh() * call.scoring.softcap
    sees = allowed.any(-1)
    # a row that sees nothing is filled up, so that nothing of it is NaN
    scores = scores.masked_fill(~(allowed | ~sees[..., None]), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.nn.functional.dropout((scores - lse[..., None]).exp(), call.dropout.p)
    out = (weights.unflatten(1, (-1, repeats)) @ v[:, :, None]).flatten(1, 2)
    return out.masked_fill(~sees[..., None], 0), lse.masked_fill(~sees, -torch.inf)
