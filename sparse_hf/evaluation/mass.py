"""How much of a layer's dense attention weights a pattern keeps: strip by strip of queries, never n x n.

Legend: H query heads, G key heads, n tokens, D head dim, m queries of a strip, K keys that a strip sees, P patterns,
E ranges of distances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import HeldPairs
from ..plan import BlockPlan

# the pairs that a pattern holds: what positions say, or what it has chosen
Pairs = BlockPlan | HeldPairs
# queries of a strip, at the least; a GPU takes as many as make so many numbers for all heads
STRIP, GPU_NUMBERS = 64, 1 << 26


@dataclass(frozen=True)
class Scores:
    """What happens to a score before the softmax: scale, soft cap, and a learned logit per head beside all keys, `[H]`."""

    scale: float
    softcap: float | None = None
    sink: Tensor | None = None

    @staticmethod
    def of(q: Tensor, arguments: Mapping[str, Any]) -> Scores:
        """What a layer's arguments of attention say."""
        scale = arguments.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return Scores(scale, arguments.get("softcap"), arguments.get("s_aux"))


@dataclass(frozen=True, eq=False)
class Mass:
    """Attention weights of a layer, added up.

    Args:
        dense: `[H, E]`, of all pairs, by distance.
        kept: `[P, H, E]`, of the pairs that each pattern holds.
        lost: `[P, n]`, of all heads, by the key from which a pattern cuts them off.
        sink: `[H]`, of the learned logit, where there is one.
        queries: rows of weights that were added up, each of which sums to 1.
    """

    dense: Tensor
    kept: Tensor
    lost: Tensor
    sink: Tensor
    queries: int


def ranges(length: int) -> list[tuple[int, int]]:
    """Ranges of distances, ends inclusive: 0, 1, 2-3, 4-7, ... up to the text's length."""
    edges = [(0, 0)]
    while edges[-1][1] < length - 1:
        first = edges[-1][1] + 1
        edges.append((first, min(2 * first - 1, length - 1)))
    return edges


def kept_mass(q: Tensor, k: Tensor, scores: Scores, own: Pairs, plans: Sequence[Pairs], is_causal: bool) -> Mass:
    """The weights of q `[H, n, D]` and k `[G, n, D]` under the plan `own` of dense attention, and what `plans` keep of them.

    Memory is that of strips, O(n). Heads may have patterns of their own.
    """
    heads, length = q.shape[0], q.shape[1]
    k = k.repeat_interleave(heads // k.shape[0], 0)
    distances = ranges(length)
    # added up where they are made: a host that asked for each would wait for a GPU tens of thousands of times
    dense = q.new_zeros(heads, len(distances), dtype=torch.float64)
    kept = q.new_zeros(len(plans), heads, len(distances), dtype=torch.float64)
    lost, sink = q.new_zeros(len(plans), length, dtype=torch.float64), q.new_zeros(heads, dtype=torch.float64)
    step = strip_of(q, plans)
    for first in range(0, length, step):
        last = min(first + step, length)
        strip = _Strip(first, last, last if is_causal else length)
        weights, outside = attention_weights(q[:, first:last], k[:, : strip.keys], scores, strip.mask(own))
        masks = strip.masks(plans, heads)
        for e, bounds in enumerate(distances):
            for keys, within in strip.at(bounds, is_causal, q.device):
                near = weights[:, :, keys] * within
                dense[:, e] += near.sum((1, 2))
                kept[:, :, e] += _sums(near, masks[..., keys])
        lost[:, : strip.keys] += _by_key(weights, ~masks)
        sink += outside
    return Mass(dense.cpu(), kept.cpu(), lost.cpu(), sink.cpu(), length)


def strip_of(q: Tensor, plans: Sequence[Pairs]) -> int:
    """Queries of a strip: few on a CPU, and on a GPU, which waits for its host between small ones, as many as memory is spent on."""
    if not q.is_cuda:
        return STRIP
    masks = len(plans) if any(isinstance(plan, HeldPairs) or plan.heads for plan in plans) else 1
    return max(STRIP, GPU_NUMBERS // (q.shape[0] * q.shape[1] * masks))


@dataclass(frozen=True)
class _Strip:
    """Queries `first` .. `last` - 1 and the first `keys` keys."""

    first: int
    last: int
    keys: int

    def mask(self, plan: Pairs) -> Tensor:
        """The pairs of a plan, `[1 or H, m, K]`."""
        if isinstance(plan, HeldPairs):
            queries = torch.arange(self.first, self.last, device=plan.call.q.device)
            return plan.mask(queries)[0, :, :, : self.keys]
        of_patterns = [plan.mask(0, p, (self.first, self.last), (0, self.keys)) for p in range(len(plan.patterns))]
        return torch.stack([of_patterns[p] for p in plan.heads or (0,)])

    def masks(self, plans: Sequence[Pairs], heads: int) -> Tensor:
        """The pairs of several, `[P, 1 or H, m, K]`."""
        found = [self.mask(plan) for plan in plans]
        wanted = heads if any(len(mask) > 1 for mask in found) else 1
        return torch.stack([mask.expand(wanted, -1, -1) for mask in found])

    def at(self, bounds: tuple[int, int], is_causal: bool, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """The keys at these distances from some query, and which of the pairs are at them, `[m, keys]`."""
        least, most = bounds
        query = torch.arange(self.first, self.last, device=device)[:, None]
        sides = [(self.first - most, self.last - least, 1), (self.first + least, self.last + most, -1)]
        for begin, end, sign in sides[: 1 if is_causal or most == 0 else 2]:
            begin, end = max(begin, 0), min(end, self.keys)
            if begin < end:
                distance = sign * (query - torch.arange(begin, end, device=device))
                yield slice(begin, end), (distance >= least) & (distance <= most)


def attention_weights(q: Tensor, k: Tensor, scores: Scores, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The weights `[H, m, K]` of a strip, and what a learned logit takes of each head's, `[H]`."""
    found = (q.float() @ k.float().mT) * scores.scale
    if scores.softcap is not None:
        found = scores.softcap * (found / scores.softcap).tanh()
    total = found.masked_fill_(~allowed, -torch.inf).logsumexp(-1, keepdim=True)
    if scores.sink is None:
        # a query without any key has no weight at all
        return (found - total.clamp(min=torch.finfo(total.dtype).min)).exp(), found.new_zeros(len(found))
    sink = scores.sink.float()[:, None, None]
    total = torch.logaddexp(total, sink)
    return (found - total).exp(), (sink - total).exp().sum((1, 2))


def _sums(weights: Tensor, masks: Tensor) -> Tensor:
    """Weights `[H, m, K]` within masks `[P, 1 or H, m, K]`, added up: `[P, H]`."""
    numbers, flat = masks.to(weights.dtype).flatten(2), weights.flatten(1)
    return numbers[:, 0] @ flat.mT if numbers.shape[1] == 1 else torch.einsum("hx,phx->ph", flat, numbers)


def _by_key(weights: Tensor, masks: Tensor) -> Tensor:
    """Weights `[H, m, K]` within masks `[P, 1 or H, m, K]`, added up by key: `[P, K]`."""
    numbers = masks.to(weights.dtype)
    if numbers.shape[1] == 1:
        return torch.einsum("mk,pmk->pk", weights.sum(0), numbers[:, 0])
    return torch.einsum("hmk,phmk->pk", weights, numbers)
