"""Attention of a text that is split over ranks: each computes its own queries.

Three ways, of which the first that fits is taken:

- by reach: a rank fetches the keys beyond its part that its pattern reaches;
- by heads: queries, keys and values go to where their heads are computed over the whole text, and the output comes back;
- whole: a rank fetches all keys.

Legend: B batch, H query heads, G key heads, n tokens of this rank, N of all, D and E head dims of keys and values, S ranks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..attention import attention
from ..attention.backend import AttentionCall, Results
from ..pattern import Pattern, PerHead
from ..pattern.base import as_pattern
from ..plan import BatchInfo, of_batch
from .exchange import Ranks, Route
from .needs import Needs, find_needs
from .text import SplitText
from .wide import WideRows

logger = logging.getLogger(__name__)


# FSDP walks through dataclasses that layers are given, in search of tensors
class SplitAttention:
    """What layers of one forward pass call instead of `attention`.

    Attributes:
        ranks, text: who shares the text, and how.
        calls: how many layers have called.
    """

    def __init__(self, ranks: Ranks, text: SplitText):
        self.ranks, self.text, self.calls = ranks, text, 0

    def attention(self, call: AttentionCall, backend: str) -> Results:
        """Out `[B, H, n, E]` and lse `[B, H, n]` of this rank's queries; every rank calls it.

        Args:
            call: with this rank's tokens alone. Its batch is not read: the text's own is.

        Raises:
            NotImplementedError: pairs chosen by content, or a bias by distance.
        """
        pattern = as_pattern(call.pattern)  # pyright: ignore[reportArgumentType]
        _refuse(call, pattern)
        self.calls += 1
        n = self.text.sizes[self.ranks.rank]
        if call.q.shape[2] != n:
            raise ValueError(f"attention got {call.q.shape[2]} tokens, and the part of rank {self.ranks.rank} has {n}")
        way = self._way(pattern, call.q.shape[1], call.k.shape[1])
        if way == "heads":
            return self._by_heads(replace(call, pattern=pattern), backend)
        return self._held(pattern, way == "whole", call.q).attention(replace(call, pattern=pattern), backend)

    def marked_rows(self, call: AttentionCall, out: Tensor) -> Tensor | None:
        """`out` `[B, H, n, E]` with the rows of marked tokens by the pairs of another call; None if nothing is marked.

        Args:
            call: its queries, keys and values are other projections, and its pattern says what marked queries see.
        """
        marks = self.text.batch.marks
        if marks is None or not bool(marks.any()):
            return None
        own = "marked rows", out.device
        if own not in self.text.memo:
            most = int(marks.sum(1).max())
            order = marks.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            index = torch.where(marks.gather(1, order), order, -1)
            self.text.memo[own] = WideRows.of(self.ranks, self.text, index, out)
        return self.text.memo[own].put(call, out, out[..., 0])[0]

    def _way(self, pattern: Pattern, heads: int, key_heads: int) -> str:
        own = "way", pattern, heads, key_heads
        if own not in self.text.memo:
            needs, most = find_needs(self.text, pattern), max(self.text.sizes)
            may_deal = _dealt(heads, key_heads, self.ranks.size) is not None
            # whoever fetches as much as it has is better off with an equal share of the heads
            if needs.why_not is None and (needs.most < most or not may_deal):
                way = "reach"
            else:
                way = "heads" if may_deal else "whole"
                _say(str(pattern), way, needs.why_not or "reaches as much as a part of the text and more")
            self.text.memo[own] = way
        return self.text.memo[own]

    def _held(self, pattern: Pattern, everything: bool, like: Tensor) -> Held:
        own = "held", pattern, everything, like.device, like.shape[0]
        if own not in self.text.memo:
            needs = find_needs(self.text, pattern, everything)
            self.text.memo[own] = Held.of(self.ranks, self.text, needs, like)
        return self.text.memo[own]

    def _by_heads(self, call: AttentionCall, backend: str) -> Results:
        """Whole texts of some heads, and back."""
        ranks, heads = self.ranks, call.q.shape[1]
        repeats = _dealt(heads, call.k.shape[1], ranks.size)
        assert repeats is not None
        own = heads // ranks.size
        k, v = (t if repeats == 1 else t.repeat_interleave(repeats, 1) for t in (call.k, call.v))
        q, k, v = (self._to_heads(t) for t in (call.q, k, v))
        pattern = call.pattern
        assert isinstance(pattern, Pattern)
        if pattern.heads is not None:
            pattern = PerHead(*pattern.heads[ranks.rank * own : (ranks.rank + 1) * own])
        batch = self._whole_batch(q.device)
        out, lse = attention(replace(call, q=q, k=k, v=v, pattern=pattern, q_offset=0, batch=batch), backend)
        out = self._to_parts(out)
        return out, self._to_parts(lse[..., None])[..., 0] if call.wants_lse else lse

    def _whole_batch(self, device: torch.device) -> BatchInfo:
        own = "whole", device
        if own not in self.text.memo:
            self.text.memo[own] = of_batch(*(None if t is None else t.to(device) for t in self.text.batch.tensors))
        return self.text.memo[own]

    def _to_heads(self, t: Tensor) -> Tensor:
        """`[B, heads, n, D]` to `[B, heads / S, N, D]`."""
        rows, heads, n, dim = t.shape
        ranks, sizes = self.ranks, self.text.sizes
        sent = t.unflatten(1, (ranks.size, -1)).permute(1, 3, 0, 2, 4).reshape(ranks.size * n, -1)
        got = ranks.swap(sent, [n] * ranks.size, sizes)
        return got.view(-1, rows, heads // ranks.size, dim).permute(1, 2, 0, 3)

    def _to_parts(self, t: Tensor) -> Tensor:
        """`[B, heads / S, N, D]` to `[B, heads, n, D]`."""
        rows, heads, length, dim = t.shape
        ranks, sizes = self.ranks, self.text.sizes
        n = sizes[ranks.rank]
        got = ranks.swap(t.permute(2, 0, 1, 3).reshape(length, -1), sizes, [n] * ranks.size)
        return got.view(ranks.size, n, rows, heads, dim).permute(2, 0, 3, 1, 4).reshape(rows, -1, n, dim)


def _dealt(heads: int, key_heads: int, ranks: int) -> int | None:
    """How often key heads are repeated so that ranks get equal numbers of heads; None if they cannot."""
    if heads % ranks:
        return None
    if key_heads % ranks == 0:
        return 1
    return ranks // key_heads if ranks % key_heads == 0 else None


def _refuse(call: AttentionCall, pattern: Pattern) -> None:
    if pattern.uses_content:
        raise NotImplementedError(
            f"{pattern} chooses pairs from queries and keys of the whole text, which is split over processes here; use data "
            "parallelism or FSDP"
        )
    if call.scoring.bias is not None:
        raise NotImplementedError(
            "this layer has a bias by distance, made for the tokens of one process; a text that is split over processes needs rotary "
            "positions, or positions in the embeddings"
        )


@lru_cache
def _say(pattern: str, way: str, reason: str) -> None:
    what = {"heads": "queries, keys and values go by heads", "whole": "every process fetches all keys"}[way]
    logger.warning("a text over several processes: %s, since %s %s", what, pattern, reason.removeprefix(f"{pattern} "))


@dataclass(frozen=True, eq=False)
class Held:
    """What a rank holds for the queries of its part under one pattern.

    Attributes:
        left: keys that are laid before its own.
        batch: padding, documents and marks of what it holds.
        route: how keys get there.
        wide: queries that all ranks compute together; None if there are none.
    """

    left: int
    batch: BatchInfo
    route: Route
    wide: WideRows | None

    @staticmethod
    def of(ranks: Ranks, text: SplitText, needs: Needs, like: Tensor) -> Held:
        """What this rank holds of a text; `like` is of its batch and on its device."""
        rows, device = like.shape[0], like.device
        asked = [torch.cat(both, 1).expand(rows, -1) for both in zip(needs.left, needs.right, strict=True)]
        route = Route.of(ranks, text.bounds, asked)
        own = torch.arange(*text.bounds[ranks.rank : ranks.rank + 2]).expand(len(needs.wide), -1)
        index = torch.cat((needs.left[ranks.rank], own, needs.right[ranks.rank]), 1)
        wide = WideRows.of(ranks, text, needs.wide, like) if needs.wide.shape[1] else None
        return Held(needs.left[ranks.rank].shape[1], batch_of(text, index, rows, device), route.to(device), wide)

    def attention(self, call: AttentionCall, backend: str) -> Results:
        own_k, own_v = call.k.transpose(1, 2), call.v.transpose(1, 2)  # [B, n, G, D]
        got_k, got_v = self.route.fetch(own_k, own_v)
        k, v = (
            torch.cat((got[:, : self.left], own, got[:, self.left :]), 1).transpose(1, 2)
            for got, own in ((got_k, own_k), (got_v, own_v))
        )
        found = attention(replace(call, k=k, v=v, q_offset=self.left, batch=self.batch), backend)
        return found if self.wide is None else self.wide.put(call, *found)


def batch_of(text: SplitText, index: Tensor, rows: int, device: torch.device) -> BatchInfo:
    """What the batch says of the tokens `[R, K]`, in their order."""
    sequences, at = text.sequences, index.clamp(min=0)

    def taken(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.gather(1, at)

    start, real, marks = map(taken, (sequences.start, sequences.real, sequences.marks))
    missing = index < 0
    if bool(missing.any()):
        real = ~missing if real is None else real & ~missing
    # padding is in no document
    documents = None if start is None else start.clamp(min=0)
    documents = None if documents is None or bool((documents == documents[:, :1]).all()) else documents
    given = (real, documents, None if marks is None else marks & ~missing)
    return of_batch(*(None if t is None else t.expand(rows, -1).to(device) for t in given))
