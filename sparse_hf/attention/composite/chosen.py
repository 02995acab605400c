"""Attention by patterns with `topk(...)` and `topk_blocks(...)`: each query's best keys, of those that positions leave out.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; N chosen keys of a query; M blocks of keys, of which c
are chosen, of S keys each.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...pattern import Pattern, Threshold, TopK, TopKBlocks, VerticalSlash
from ...pattern.base import as_pattern
from ...pattern.forms import CutContent
from ...plan import BlockPlan, remembered
from ..backend import AttentionCall
from ..chosen.backend import GatheredKeys
from ..chosen.best_keys import choose
from ..chosen.choice import Choice, ChosenKeys
from ..chosen.scores import DotScores
from .chosen_blocks import block_choice, find_groups
from .chosen_few import few_weighty, is_few
from .chosen_rest import Rest, find_rest
from .chosen_scores import slash_worth
from .chosen_threshold import weighty_tiles
from .chosen_tiles import ChosenTiles, chosen_tiles
from .content import ContentPlan, Kind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ChoicePlan(ContentPlan):
    """The pairs that positions say, and the keys that are chosen beside them."""

    chosen: Choice

    def chosen_mask(self, call: AttentionCall, queries: Tensor) -> Tensor:
        return _by_heads(self.chosen.as_mask(call.k.shape[2], queries), call.q.shape[1])


@dataclass(frozen=True, eq=False)
class TilePlan(ContentPlan):
    """Tiles of the pairs that positions say and of blocks that are chosen, in one plan."""

    chosen: ChosenTiles

    @property
    def joined(self) -> ChosenTiles:
        return self.chosen

    def chosen_mask(self, call: AttentionCall, queries: Tensor) -> Tensor:
        b = torch.arange(call.q.shape[0], device=queries.device)
        h = torch.tensor(self.chosen.heads, device=queries.device)
        keys = torch.arange(call.k.shape[2], device=queries.device)
        return self.chosen.chosen(b[:, None, None, None], h[:, None, None], queries[:, None], keys)


@dataclass(frozen=True, eq=False)
class WeightyPlan(TilePlan):
    """The same, of tiles that a threshold keeps, and what share of weights it leaves out."""

    lost: Tensor | None

    @property
    def is_told(self) -> bool:
        return True

    @property
    def left_out(self) -> Tensor | None:
        return self.lost


def _token_choice(call: AttentionCall, content: TopK, rest: Rest) -> Tensor:
    """`[B, H, Q, N]`, or `[B, 1, Q, N]` by an indexer."""
    if content.uses_indexer:
        return _indexed_choice(
            call.indexed, content.count, rest.positions, rest.cut.patterns[0], rest.is_causal, rest.batch
        )
    return choose(DotScores(call.q, call.k), content.count, rest.limits)


# layers that share an indexer and a pattern choose once
@remembered
def _indexed_choice(scores: Any, count: int, positions: BlockPlan, cut: Pattern, is_causal: bool, batch: int) -> Tensor:
    rest = Rest(positions, replace(positions, patterns=(cut,)), is_causal, batch)
    return choose(scores, count, rest.limits)


def _slash_choice(call: AttentionCall, content: VerticalSlash, rest: Rest) -> list[Tensor]:
    """The columns and the diagonals of each query, `[B, H, Q, N]` each."""
    counts = content.columns, content.diagonals
    found = slash_worth(call, rest, content.queries)
    return [choose(worth, count, rest.limits) for worth, count in zip(found, counts, strict=True)]


def _make_plan(call: AttentionCall, chosen: tuple[CutContent, ...], positions: BlockPlan) -> ChoicePlan:
    found = []
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        for content, cut in chosen:
            rest = find_rest(positions, cut, call.q.shape[0])
            if content.most_keys >= call.k.shape[2]:
                _say_whole(str(content), content.most_keys)
            if isinstance(content, TopK):
                found.append(ChosenKeys(_token_choice(call, content, rest)))
            elif isinstance(content, VerticalSlash):
                found += [ChosenKeys(index) for index in _slash_choice(call, content, rest)]
            else:
                assert isinstance(content, TopKBlocks)
                found.append(block_choice(call, content, rest))
    if len(found) > 1:
        # a choice that heads share beside one of each
        heads = max(one.shape[1] for one in found)
        return ChoicePlan(positions, ChosenKeys(_once(torch.cat([_by_heads(one.index, heads) for one in found], -1))))
    return ChoicePlan(positions, found[0])


def _by_heads(t: Tensor, heads: int) -> Tensor:
    """What neighbouring heads share, `[B, C, ...]`, for each of `heads`."""
    return t.expand(-1, heads, -1, -1) if t.shape[1] == 1 else t.repeat_interleave(heads // t.shape[1], 1)


@lru_cache
def _say_whole(content: str, most: int) -> None:
    logger.info(
        "texts of up to %s tokens are shorter than what %s may choose: queries get all that it leaves them",
        f"{most:,}",
        content,
    )


def _make_tile_plan(call: AttentionCall, chosen: tuple[CutContent, ...], positions: BlockPlan) -> ContentPlan:
    """In tiles where blocks begin where tiles do, else key by key."""
    ((content, cut),) = chosen
    assert isinstance(content, TopKBlocks)
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        plan = chosen_tiles(call, find_groups(find_rest(positions, cut, call.q.shape[0]), content))
    return _make_plan(call, chosen, positions) if plan is None else TilePlan(positions, plan)


def _make_weighty_plan(call: AttentionCall, chosen: tuple[CutContent, ...], positions: BlockPlan) -> ContentPlan:
    (content, cut), *others = chosen
    if others:
        raise ValueError(f"{call.pattern} has {len(chosen)} thresholds; one pattern takes one")
    assert isinstance(content, Threshold)
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        if is_few(call):
            return few_weighty(call, content, find_rest(positions, cut, call.q.shape[0]))
        plan, lost = weighty_tiles(call, content, find_rest(positions, cut, call.q.shape[0]))
    return WeightyPlan(positions, plan, lost)


def choose_in_tiles(chosen: tuple[CutContent, ...]) -> bool:
    """Do groups of queries choose blocks, and nothing else is chosen?"""
    contents = [content for content, _ in chosen]
    return len(contents) == 1 and isinstance(contents[0], TopKBlocks) and contents[0].queries > 1


def _once(index: Tensor) -> Tensor:
    """Keys that several choices found, each once."""
    index = index.sort(dim=-1).values
    again = torch.nn.functional.pad(index[..., 1:] == index[..., :-1], (1, 0), value=False)
    return index.masked_fill(again, -1)


def _why_not(call: AttentionCall, word: str = "topk") -> str | None:
    if call.scoring.bias is not None:
        return f"{word}(...) does not go with relative_bias; use patterns of positions in such models"
    if call.indexed is None and call.pattern is not None and as_pattern(call.pattern).uses_indexer:
        return (
            f"{call.pattern} chooses by the scores of an indexer, and none were handed over: give a model one with sparse_hf.sparsify "
            "or convert, or say topk(...) without it"
        )
    return None


# tables of tiles are for these
OF_TILES = ("auto", "reference", "blockwise", "triton")
CHOICES = Kind("topk", ("auto", "reference", "blockwise", "flex", "fa", "triton"), _make_plan, GatheredKeys(), _why_not)
BLOCK_CHOICES = Kind("topk_blocks", OF_TILES, _make_tile_plan, GatheredKeys(), _why_not, in_tiles=True)
THRESHOLDS = Kind(
    "threshold", OF_TILES, _make_weighty_plan, GatheredKeys(), partial(_why_not, word="threshold"), in_tiles=True
)


def kind_of_choice(chosen: tuple[CutContent, ...]) -> Kind:
    """How keys are chosen, of patterns other than `lsh(...)`."""
    if any(isinstance(content, Threshold) for content, _ in chosen):
        return THRESHOLDS
    return BLOCK_CHOICES if choose_in_tiles(chosen) else CHOICES
