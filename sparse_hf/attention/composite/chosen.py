"""Attention by patterns with `topk(...)` and `topk_blocks(...)`: each query's best keys, of those that positions leave out.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; N chosen keys of a query; M blocks of keys, of which c
are chosen, of S keys each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...pattern import TopK, TopKBlocks
from ...pattern.forms import EVERYTHING, CutContent
from ...plan import BlockPlan
from ...plan.lsh import leaves_out_future
from ..backend import AttentionCall
from ..chosen.backend import ChosenKeys, GatheredKeys
from ..chosen.best_keys import choose
from ..chosen.scores import DotScores
from .chosen_blocks import Rest, block_choice
from .content import ContentPlan, Kind

@dataclass(frozen=True, eq=False)
class ChoicePlan(ContentPlan):
    """The pairs that positions say, and the keys that are chosen beside them."""

    chosen: ChosenKeys

    def chosen_mask(self, call: AttentionCall, queries: Tensor) -> Tensor:
        return ChosenKeys(self.chosen.index[:, :, queries]).as_mask(call.k.shape[2])


def _token_choice(call: AttentionCall, content: TopK, rest: Rest) -> Tensor:
    """`[B, H, Q, N]`."""
    return choose(DotScores(call.q, call.k), content.count, rest.limits)


def _make_plan(call: AttentionCall, chosen: tuple[CutContent, ...], positions: BlockPlan) -> ChoicePlan:
    found = []
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        for content, cut in chosen:
            within = replace(positions, patterns=(EVERYTHING if cut is None else cut,))
            rest = Rest(positions, within, leaves_out_future(cut), call.q.shape[0])
            if isinstance(content, TopK):
                found.append(_token_choice(call, content, rest))
            else:
                assert isinstance(content, TopKBlocks)
                found.append(block_choice(call, content, rest))
    return ChoicePlan(positions, ChosenKeys(found[0] if len(found) == 1 else _once(torch.cat(found, -1))))


def _once(index: Tensor) -> Tensor:
    """Keys that several choices found, each once."""
    index = index.sort(dim=-1).values
    again = torch.nn.functional.pad(index[..., 1:] == index[..., :-1], (1, 0), value=False)
    return index.masked_fill(again, -1)


def _why_not(call: AttentionCall) -> str | None:
    if call.scoring.bias is not None:
        return "topk(...) does not go with relative_bias; use patterns of positions in such models"
    return None


ALL_BACKENDS = ("auto", "reference", "blockwise", "flex", "fa", "triton")
CHOICES = Kind("topk", ALL_BACKENDS, _make_plan, GatheredKeys(), _why_not)
