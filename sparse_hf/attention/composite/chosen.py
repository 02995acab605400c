"""Attention by patterns with `topk(...)` and `topk_blocks(...)`: each query's best keys, of those that positions leave out.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim; N chosen keys of a query; M blocks of keys, of which c
are chosen, of S keys each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...pattern import FULL, Pattern, TopK, TopKBlocks
from ...pattern.forms import EVERYTHING, CutContent, uses_indexer
from ...plan import BlockPlan
from ...plan.lsh import leaves_out_future, sequence_bounds
from ..backend import AttentionCall
from ..chosen.backend import ChosenKeys, GatheredKeys
from ..chosen.best_keys import Limits, choose
from ..chosen.scores import DotScores
from .content import ContentPlan, Kind

# keys of blocks that are looked at at once
MAX_KEYS = 1 << 20


@dataclass(frozen=True, eq=False)
class ChoicePlan(ContentPlan):
    """The pairs that positions say, and the keys that are chosen beside them."""

    chosen: ChosenKeys

    def chosen_mask(self, call: AttentionCall, queries: Tensor) -> Tensor:
        return ChosenKeys(self.chosen.index[:, :, queries]).as_mask(call.k.shape[2])


@dataclass(frozen=True, eq=False)
class Rest:
    """What a choice is made from: keys of the query's sequence, within the cut, that positions do not hold."""

    positions: BlockPlan
    cut: BlockPlan
    is_causal: bool
    batch: int

    def _rows(self, dims: int) -> Tensor:
        rows = self.batch if self.positions.sequences.rows > 1 else 1
        return torch.arange(rows, device=self.positions.device).view(-1, *(1,) * (dims - 1))

    def holds(self, q: Tensor, k: Tensor) -> Tensor:
        """May query q choose key k, by index? Of their joint shape, with four dimensions; the first is B or 1."""
        b = self._rows(4)
        return self.cut.allows(b, 0, q, k) & ~self.positions.allows(b, 0, q, k)

    @property
    def limits(self) -> Limits:
        return Limits(q_offset=self.positions.q_offset if self.is_causal else None, allows=self.holds)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the sequence of each token starts and ends, and whether it is real: `[B or 1, K]`."""
        return sequence_bounds(self.positions, self._rows(1).shape[0], self.positions.device)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of all sequences of a batch, one after the other.

    Legend: as above; B may be 1 where rows are alike.
    """

    rest: Rest
    size: int

    @cached_property
    def of_token(self) -> Tensor:
        """The block of each token, `[B, K]`."""
        return (self._begins.cumsum(-1) - 1).clamp(min=0)

    @cached_property
    def _begins(self) -> Tensor:
        start, _, real = self.rest.bounds
        return real & ((torch.arange(real.shape[1], device=real.device) - start) % self.size == 0)

    @cached_property
    def first(self) -> Tensor:
        """The first key of each block, `[B, M]`; K where a row has fewer."""
        begins, keys = self._begins, self._begins.shape[1]
        count = max(1, int(begins.sum(-1).max()))
        found = torch.full((begins.shape[0], count), keys, device=begins.device)
        row, key = begins.nonzero(as_tuple=True)
        found[row, self.of_token[row, key]] = key
        return found

    @cached_property
    def last(self) -> Tensor:
        """The last key of each block, `[B, M]`; -1 where a row has fewer."""
        _, end, _ = self.rest.bounds
        keys = end.shape[1]
        last = torch.minimum(self.first + self.size - 1, end.gather(1, self.first.clamp(max=keys - 1)))
        return last.masked_fill(self.first == keys, -1)

    def may_choose(self, q: Tensor, block: Tensor) -> Tensor:
        """May queries `[m, 1]` choose blocks `[M]` beside their own? `[B, 1, m, M]`."""
        start, _, real = self.rest.bounds
        x = q + self.rest.positions.q_offset
        row = torch.arange(start.shape[0], device=q.device).view(-1, 1, 1, 1)
        first, last = self.first[row, block], self.last[row, block]
        origin = start[row, x]
        # padding at the end of a row inherits the sequence before it
        allowed = real[row, x] & (last >= 0) & (origin == start[row, first.clamp(max=start.shape[1] - 1)])
        allowed = allowed & (self.of_token[row, x] != block)
        if self.rest.is_causal:
            allowed = allowed & (last < x)
        place = (x - origin).clamp(min=0)
        begin, end = (first - origin).clamp(min=0), (last - origin).clamp(min=0)
        return allowed & (self.rest.positions.patterns[0].blocks(place, place, begin, end) != FULL)

    def pooled(self, k: Tensor, scores: str) -> Tensor:
        """What blocks of keys `[B, G, K, D]` are scored by, `[B, G, M, D or 2 D]`."""
        inside = self.first[..., None] + torch.arange(self.size, device=k.device)  # [B, M, S]
        there = (inside <= self.last[..., None])[:, None, ..., None]
        place = inside.clamp(max=k.shape[2] - 1)
        row = torch.arange(k.shape[0], device=k.device)[:, None, None, None]
        head = torch.arange(k.shape[1], device=k.device)[:, None, None]
        wide = torch.promote_types(k.dtype, torch.float32)
        keys = k[row, head, place[:, None]].to(wide)  # [B, G, M, S, D]
        if scores == "mean":
            return keys.where(there, 0).sum(3) / there.sum(3).clamp(min=1)
        low, high = keys.where(there, torch.inf).amin(3), keys.where(there, -torch.inf).amax(3)
        # rows with fewer blocks: no block may be infinite
        return torch.cat([high, low], -1).nan_to_num(0, 0, 0)


def _token_choice(call: AttentionCall, content: TopK, rest: Rest) -> Tensor:
    """`[B, H, Q, N]`, or `[B, 1, Q, N]` by an indexer."""
    scores = call.indexed if content.uses_indexer else DotScores(call.q, call.k)
    return choose(scores, content.count, rest.limits)


def _block_choice(call: AttentionCall, content: TopKBlocks, rest: Rest) -> Tensor:
    """`[B, H, Q, c * S]`."""
    blocks = Blocks(rest, content.size)
    query = call.q if content.scores == "mean" else torch.cat([call.q.relu(), -(-call.q).relu()], -1)
    own = blocks.of_token[:, rest.positions.q_offset :][:, : call.q.shape[2]]  # [B or 1, Q]
    found = own[:, None, :, None].expand(*call.q.shape[:3], 1)
    if content.count > 1:
        scorer = DotScores(query, blocks.pooled(call.k, content.scores))
        others = choose(scorer, content.count - 1, Limits(allows=blocks.may_choose))
        found = torch.cat([others.long(), found], -1)
    return torch.cat(list(_keys_of_blocks(found, blocks)), 2)


def _keys_of_blocks(found: Tensor, blocks: Blocks) -> Iterator[Tensor]:
    """The keys `[B, H, m, c * S]` of blocks `[B, H, Q, c]`, some queries at a time."""
    batch, heads, queries, count = found.shape
    inside = torch.arange(blocks.size, device=found.device)
    row = torch.arange(blocks.first.shape[0], device=found.device).view(-1, 1, 1, 1)
    for q in torch.arange(queries, device=found.device).split(
        max(1, MAX_KEYS // (batch * heads * count * blocks.size))
    ):
        block = found[:, :, q]
        first, last = (t[row, block.clamp(min=0)][..., None] for t in (blocks.first, blocks.last))
        keys = first + inside  # [B, H, m, c, S]
        there = (keys <= last) & (block >= 0)[..., None]
        keys, there = keys.flatten(3), there.flatten(3)
        there = there & blocks.rest.holds(q[:, None], keys.clamp(max=blocks.of_token.shape[1] - 1))
        yield keys.masked_fill(~there, -1).int()


def _make_plan(call: AttentionCall, chosen: tuple[CutContent, ...], positions: BlockPlan) -> ChoicePlan:
    found = []
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        for content, cut in chosen:
            rest = rest_of(call, cut, positions)
            if isinstance(content, TopK):
                found.append(_token_choice(call, content, rest))
            else:
                assert isinstance(content, TopKBlocks)
                found.append(_block_choice(call, content, rest))
    if len(found) > 1:
        # a choice that all heads share beside one of each
        found = [index.expand(-1, max(one.shape[1] for one in found), -1, -1) for index in found]
        return ChoicePlan(positions, ChosenKeys(_once(torch.cat(found, -1))))
    return ChoicePlan(positions, ChosenKeys(found[0]))


def rest_of(call: AttentionCall, cut: Pattern | None, positions: BlockPlan) -> Rest:
    """What a choice is made from that is cut to `cut`, beside the plan of what positions say."""
    within = replace(positions, patterns=(EVERYTHING if cut is None else cut,))
    return Rest(positions, within, leaves_out_future(cut), call.q.shape[0])


def _once(index: Tensor) -> Tensor:
    """Keys that several choices found, each once."""
    index = index.sort(dim=-1).values
    again = torch.nn.functional.pad(index[..., 1:] == index[..., :-1], (1, 0), value=False)
    return index.masked_fill(again, -1)


def _why_not(call: AttentionCall) -> str | None:
    if call.scoring.bias is not None:
        return "topk(...) does not go with relative_bias; use patterns of positions in such models"
    if call.indexed is None and uses_indexer(str(call.pattern)):
        return (
            f"{call.pattern} chooses by the scores of an indexer, and none were handed over: give a model one with sparse_hf.sparsify "
            "or convert, or say topk(...) without it"
        )
    return None


ALL_BACKENDS = ("auto", "reference", "blockwise", "flex", "fa", "triton")
CHOICES = Kind("topk", ALL_BACKENDS, _make_plan, GatheredKeys(), _why_not)
