"""`threshold(...)` of a few queries, as in decoding: all their scores at once, in some dozens of steps whatever the heads and keys.

Legend: B batch, H query heads, G key heads, R = H / G, Q queries, K keys; T groups of queries and M blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...pattern import Threshold
from ..autograd import AutogradBackend
from ..backend import AttentionCall, Backend, Results
from ..slots.new_tokens import products, under
from ..strides import folded
from .chosen_blocks import Blocks
from .chosen_rest import Rest
from .content import ContentPlan

# queries, and scores that exist at once
MAX_QUERIES, MAX_SCORES = 16, 1 << 26


@dataclass(frozen=True, eq=False)
class FewPlan(ContentPlan):
    """All pairs of a few queries, `[B, H, Q, K]` bool, and the share of weights that is left out, `[B, H, Q]`."""

    chosen: Tensor
    lost: Tensor

    @property
    def backend(self) -> Backend:
        return FEW

    @property
    def is_told(self) -> bool:
        return True

    @property
    def left_out(self) -> Tensor:
        return self.lost

    def chosen_mask(self, call: AttentionCall, queries: Tensor) -> Tensor:
        return self.chosen[:, :, queries]


class FewQueries(AutogradBackend):
    """Attention under the mask of a `FewPlan`."""

    name = "few"

    def why_not(self, call: AttentionCall) -> str | None:
        return None

    def forward(self, call: AttentionCall) -> Results:
        mask, work = call.plan.chosen, torch.promote_types(call.q.dtype, torch.float32)
        blind = ~mask.any(-1, keepdim=True)
        opened = folded(mask | blind, call.k.shape[1])
        return under((call.q, call.k, call.v), opened, blind, None, call.scoring, True, work)


FEW = FewQueries()


def is_few(call: AttentionCall) -> bool:
    (batch, heads, queries, _), keys = call.q.shape, call.k.shape[2]
    return queries <= MAX_QUERIES and batch * heads * queries * keys <= MAX_SCORES and not call.dropout


def few_weighty(call: AttentionCall, content: Threshold, rest: Rest) -> FewPlan:
    """The pairs of positions and of kept tiles, and what is left out."""
    (batch, heads, queries, _), keys, offset = call.q.shape, call.k.shape[2], rest.positions.q_offset
    wide = torch.promote_types(call.q.dtype, torch.float32)
    scores = products(folded(call.q, call.k.shape[1]), call.k, wide) * call.scoring.scale  # [B, G, R Q, K]
    scores = scores.unflatten(2, (-1, queries)).flatten(1, 2)  # [B, H, Q, K]
    if call.scoring.softcap is not None:
        scores = (scores / call.scoring.softcap).tanh() * call.scoring.softcap
    row = torch.arange(batch, device=scores.device)[:, None, None, None]
    x, y = torch.arange(queries, device=scores.device)[:, None], torch.arange(keys, device=scores.device)
    held, may = (plan.allows(row, 0, x, y) for plan in (rest.positions, rest.cut))  # [B or 1, 1, Q, K]
    scores = scores.masked_fill(~(held | may), -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.where(top > -torch.inf, 0)).exp()
    judged = may & ~held
    worth = weights.where(judged, 0)
    blocks = Blocks(rest, content.size)
    block = blocks.of_token[:, None, None].expand(worth.shape)
    # of several sequences each begins a block
    count = -(-keys // content.size) if rest.positions.is_bare else keys
    most = worth.new_zeros(batch, heads, queries, count).scatter_reduce_(3, block, worth, "amax")
    keeps = most >= content.share  # [B, H, Q, M]
    if content.queries > 1 and queries > 1:
        own = Blocks(rest, content.queries).of_token[:, offset:][:, :queries]
        group = (own - own[:, :1])[:, None, :, None].expand(keeps.shape)
        keeps = (
            torch.zeros_like(keeps, dtype=torch.uint8).scatter_reduce_(2, group, keeps.byte(), "amax").gather(2, group)
        )
    kept = judged & (keeps.gather(3, block) > 0)
    # a query that sees nothing has 0 / 0
    lost = worth.masked_fill(kept, 0).sum(-1) / weights.sum(-1)
    return FewPlan(rest.positions, held | kept, lost)
