"""New tokens over the slots of a cache that was allocated ahead, in one graph for all lengths of the text.

A static cache has as many keys from the first token to the last. How many of them are filled is a number on the device, which
nobody reads here: what is visible is computed from it there, so that a graph of a decoding step is compiled and recorded once.

A streaming cache has the first tokens in their slots, and the last ones in turn in a `Ring` of slots behind them. Its graph
serves texts of any length too.

Windows with first tokens read just those slots that some new token may see. Of other patterns all slots are scored, and a mask
`[Q, K]` says which count; both are linear in the text.

Legend: B batch, H query heads, G key heads, R = H / G, Q new tokens, K slots, D head dim; n slots that are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...pattern import Pattern
from ...pattern.base import Marks, as_pattern
from ...pattern.forms import ANY_LENGTH
from ..backends.triton.walk import why_unfit
from ..scoring import Scoring
from ..strides import folded, like
from .pairs import pairs_by_head
from .reach import Reach, read_reach
from .ring import NO_RING, Ring, held_places, slots_of

# new tokens from which a pass is one over a prompt
MAX_TOKENS = 128
# query heads of a key head times new tokens, whose sums fit into a program's registers
MAX_ROWS = 64
# numbers of keys, or of values, that are copied to a wider dtype at once
MAX_WIDENED = 1 << 24


@dataclass(frozen=True, eq=False)
class Filled:
    """What stands in the slots of a cache, of which new tokens fill some already.

    Args:
        seen: `[]`, whole number: tokens that came before, padding included.
        real: `[B, K]` bool, false on padding; None where there is none. But under patterns that hold the whole past, padding must stand
            before all tokens of its row. A ring needs none.
        marks: `[B, K]` bool, the tokens that `marked()` speaks of; None where there is none.
        begins: `[B]`, tokens of padding before each row; None where they are known from `real`, or there is none.
        ring: where tokens stand by their positions; `NO_RING` where each is in the slot of its number, padding included.
        oldest: `[B or 1]`, the position behind the first tokens of a ring from which on it is read; None where all of it is.
        shared: what the layers of a pass have computed of a ring, for each other; None in a graph.
        length: tokens of a ring's text, the new ones among them, where the host knows that; padding included.
    """

    seen: Tensor
    real: Tensor | None = None
    marks: Tensor | None = None
    begins: Tensor | None = None
    ring: Ring = NO_RING
    oldest: Tensor | None = None
    shared: dict[Any, Any] | None = None
    length: int | None = None


def slots_attention(
    q: Tensor, k: Tensor, v: Tensor, filled: Filled, pattern: str, scoring: Scoring, wants_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention `[B, H, Q, D]` of new tokens to a cache that holds them already, and its lse `[B, H, Q]`. It has no gradient.

    Args:
        q: `[B, H, Q, D]`.
        k, v: `[B, G, K, D]`; what lies behind the new tokens is read by nobody, but no NaN may lie there.
        filled: what stands in the slots.
        pattern: the text of a causal pattern.
        scoring: scale, soft cap, and a bias `[H, 2 K - 1]` of the distances (slot - query) from `1 - K` to `K - 1`; a ring knows none.
        wants_lse: is the lse read? If not, it holds nothing.
    """
    if scoring.bias is not None and filled.ring:
        raise NotImplementedError(
            "attention over a ring of slots, of which some were written again, knows no relative bias"
        )
    if filled.shared is not None and filled.length is not None and why_unfit(q, v) is not None:
        return _by_shared_mask((q, k, v), filled, pattern, scoring, wants_lse)
    # traced, so that a graph finds where texts begin once for all layers
    begins = filled.begins if filled.real is None else filled.real.int().argmax(1)
    return _operator(
        q, k, v, filled.seen, filled.real, begins, filled.marks, filled.oldest, list(filled.ring), pattern, scoring.scale,
        scoring.softcap, wants_lse, scoring.bias,
    )  # fmt: skip


def _by_shared_mask(
    tensors: tuple[Tensor, Tensor, Tensor], filled: Filled, pattern: str, scoring: Scoring, wants_lse: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same where no kernel reads a ring, under a mask that layers of one pattern share."""
    q, k, v = tensors
    assert filled.shared is not None and filled.length is not None
    # as long as the ring has not come round, slots are filled from the first on
    keys, new = min(k.shape[2], filled.length), q.shape[2]
    own = pattern, filled.ring, q.shape[1], k.shape[1], new, wants_lse, scoring.softcap is None, q.dtype
    if own not in filled.shared:
        form = as_pattern(pattern)
        places = own_places(filled.seen, filled.begins, new)
        held = held_places(filled.ring, places, filled.oldest)
        reach = read_reach(form, ANY_LENGTH) if filled.oldest is None else None
        mask = _ring_mask(form, reach, places, held, filled.ring, filled.marks)[..., :keys]
        opened, blind = _opened(mask, q.shape[1], k.shape[1])
        if scoring.softcap is None and not wants_lse:
            # what the kernel adds, made once
            opened = torch.zeros_like(opened, dtype=q.dtype).masked_fill_(~opened, -torch.inf)
        filled.shared[own] = opened, blind
    opened, blind = filled.shared[own]
    if keys < k.shape[2]:
        k, v = k[:, :, :keys], v[:, :, :keys]
    return under((q, k, v), opened, blind, None, scoring, wants_lse)


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def takes_slots(pattern: str) -> bool:
    """Is a pattern one of positions, and not of what queries and keys are?"""
    return not as_pattern(pattern).uses_content


@torch.library.custom_op("sparse_hf::slots", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, real: Tensor | None, begins: Tensor | None, marks: Tensor | None,
    oldest: Tensor | None, ring: list[int], pattern: str, scale: float, softcap: float | None, wants_lse: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    form, turns, scoring = as_pattern(pattern), Ring(*ring), Scoring(scale, softcap)
    # a ring holds the last tokens of a text without end
    reach = read_reach(form, ANY_LENGTH if turns else k.shape[2])
    fits = bias is None and oldest is None and why_unfit(q, v) is None
    if reach is not None and fits and q.shape[1] // k.shape[1] * q.shape[2] <= MAX_ROWS:
        from .kernels import decode

        return decode((q, k, v), seen, real, begins, reach, turns, scoring)
    of_bias = None if bias is None else _bias(bias, seen, q.shape[2], k.shape[2])
    if turns:
        places = own_places(seen, begins, q.shape[2])
        mask = _ring_mask(form, reach, places, held_places(turns, places, oldest), turns, marks)
    elif reach is not None and reach.first + reach.left + q.shape[2] < k.shape[2]:
        slots, exists = visible_slots(reach, seen, begins, q.shape[2], k.shape[2])
        k, v = (_taken(t, slots) for t in (k, v))
        of_bias = None if of_bias is None else _taken(of_bias.expand(slots.shape[0], -1, -1, -1).mT, slots).mT
        places = slots if begins is None else slots - begins[:, None]
        exists = exists if real is None else exists & real.gather(1, slots)
        mask = _window_mask(reach, own_places(seen, begins, q.shape[2]), places, exists)
    else:
        mask = _mask(form, seen, real, marks, q.shape[2], k.shape[2])
    return _dense((q, k, v), mask, of_bias, scoring, wants_lse)


@_operator.register_fake
def _fake(q, k, v, *rest):
    return like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def visible_slots(
    reach: Reach, seen: Tensor, begins: Tensor | None, new: int, slots: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The slots that new tokens may see, each once, `[B or 1, n]`, and which of them are there.

    Args:
        begins: `[B]`, the slot of each row's first token; None is 0.
    """
    device = seen.device
    first = torch.zeros(1, 1, dtype=torch.long, device=device) if begins is None else begins[:, None]
    ahead = first + torch.arange(reach.first, device=device)
    start = torch.maximum(first + reach.first, seen - reach.left)
    behind = start + torch.arange(reach.left + new, device=device)
    found = torch.cat((ahead, behind), 1)
    exists = found < seen + new
    return found.clamp(max=slots - 1), exists


def own_places(seen: Tensor, begins: Tensor | None, new: int) -> Tensor:
    """The places of new tokens in their own texts, `[B or 1, Q]`."""
    slots = seen + torch.arange(new, device=seen.device)[None]
    return slots if begins is None else slots - begins.to(slots.device)[:, None]


def _window_mask(reach: Reach, q: Tensor, k: Tensor, exists: Tensor) -> Tensor:
    """`[B or 1, 1, Q, n]` of places `[B or 1, Q]` and `[B or 1, n]`."""
    q, k = q[:, None, :, None], k[:, None, None, :]
    return (k <= q) & ((q - k <= reach.left) | (k < reach.first)) & exists[:, None, None, :]


def _ring_mask(
    pattern: Pattern, reach: Reach | None, q: Tensor, k: Tensor, ring: Ring, marks: Tensor | None
) -> Tensor:  # fmt: skip
    """`[B or 1, H or 1, Q, K]`: what a pattern holds of the slots of a ring, for places `[B or 1, Q]` and `[B or 1, K]`."""
    if reach is not None:
        return _window_mask(reach, q, k, k >= 0)
    own, every, there = q.clamp(min=0), k.clamp(min=0)[:, None, :], (k >= 0)[:, None, :]
    about = Marks()
    if marks is not None:
        of_q = marks.gather(1, slots_of(ring, own).expand(marks.shape[0], -1))
        about = Marks(of_q[:, :, None], marks[:, None, :])
    return pairs_by_head(pattern, own[:, :, None], every, about, there)


def _mask(
    pattern: Pattern, seen: Tensor, real: Tensor | None, marks: Tensor | None, new: int, slots: int
) -> Tensor:  # fmt: skip
    """`[B or 1, H or 1, Q, K]`: what a pattern holds of all slots."""
    device = seen.device
    every, own = torch.arange(slots, device=device)[None], seen + torch.arange(new, device=device)
    there = every < seen + new
    places = every if real is None else (real.long().cumsum(1) - 1).clamp(min=0)
    q = places.expand(places.shape[0], -1).index_select(1, own)[:, :, None]
    k = places[:, None, :]
    there = there if real is None else there & real
    of_q, of_k = (None, None) if marks is None else (marks.index_select(1, own)[:, :, None], marks[:, None, :])
    about = Marks(of_q, of_k, q[:, -1:] + 1)
    return pairs_by_head(pattern, q, k, about, there[:, None, :])


def _bias(bias: Tensor, seen: Tensor, new: int, slots: int) -> Tensor:
    """`[1, H, Q, K]` of a bias `[H, 2 K - 1]` by distance."""
    queries = seen + torch.arange(new, device=seen.device)[:, None]
    distances = torch.arange(slots, device=seen.device) - queries + slots - 1
    # of new tokens behind the last slot, which nobody reads
    return bias[:, distances.clamp(min=0)][None]


def _taken(t: Tensor, slots: Tensor) -> Tensor:
    """`[B, G, n, D]` of `[B, G, K, D]`."""
    if slots.shape[0] == 1:
        return t.index_select(2, slots[0])
    return t.gather(2, slots[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))


def _dense(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor, bias: Tensor | None, scoring: Scoring, wants_lse: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention under a mask and a bias `[B or 1, H, Q, n]`, and its lse if it is wanted; what sees nothing gives 0."""
    q, k, v = tensors
    blind = ~mask.any(-1, keepdim=True)
    opened = folded((mask | blind).expand(-1, q.shape[1], -1, -1), k.shape[1])
    out, found = under(tensors, opened, blind, bias, scoring, wants_lse)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    # an operator gives tensors of its own, of the layout that it has said
    return like(q, v.shape[-1]).copy_(out), lse.copy_(found) if wants_lse else lse


def _opened(mask: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor | None]:
    """A mask of query heads by key head, in which each query sees something, and which ones see nothing: None if all do."""
    blind = ~mask.any(-1, keepdim=True)
    is_some = bool(blind.any())
    mask = mask | blind if is_some else mask
    if mask.shape[1:3] != (1, 1):
        mask = folded(mask.expand(-1, heads, -1, -1), groups)
    return mask, blind if is_some else None


def products(queries: Tensor, k: Tensor, work: torch.dtype) -> Tensor:
    """`[B, G, n, K]` of queries `[B, G, n, D]` and keys `[B, G, K, D]`, in `work`; of these no copy exists as a whole."""
    queries = queries.to(work)
    found = [queries @ some.to(work).mT for some in _widened(k, work)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """`[B, G, n, E]` of weights `[B, G, n, K]` and values `[B, G, K, E]`, in the dtype of weights."""
    values = _widened(v, weights.dtype)
    parts = zip(weights.split([some.shape[2] for some in values], -1), values, strict=True)
    first, *others = (part @ some.to(weights.dtype) for part, some in parts)
    return sum(others, first)


def _widened(t: Tensor, work: torch.dtype) -> tuple[Tensor, ...]:
    """Tokens of `[B, G, K, D]`, so many at a time as are copied to `work` at once."""
    of_token = t.shape[0] * t.shape[1] * t.shape[3]
    return (t,) if t.dtype == work else t.split(max(1, MAX_WIDENED // max(1, of_token)), 2)


def under(
    tensors: tuple[Tensor, Tensor, Tensor], opened: Tensor, blind: Tensor | None, bias: Tensor | None, scoring: Scoring,
    wants_lse: bool, work: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention under a mask of query heads by key head, and its lse, which is empty if it is not wanted.

    Args:
        opened: `[B or 1, G or 1, R Q or 1, n]`, in which each query sees something.
        blind: `[B or 1, H or 1, Q, 1]`, queries that see nothing; None if all see something.
        bias: `[B or 1, H, Q, n]`.
        work: the dtype of scores.
    """
    q, k, v = tensors
    groups, lse = k.shape[1], q.new_empty(0, dtype=torch.float32)
    queries = folded(q, groups)
    if scoring.softcap is None and bias is None and not wants_lse:
        out = scaled_dot_product_attention(queries, k, v, opened, scale=scoring.scale)
    else:
        scores = products(queries, k, work) * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        if bias is not None:
            scores = scores + folded(bias.to(work).expand(q.shape[0], -1, -1, -1), groups)
        scores = scores.masked_fill(~opened, -torch.inf)
        out = _weighted(scores.softmax(-1), v).to(q.dtype)
        lse = scores.logsumexp(-1).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
        lse = lse if blind is None else lse.masked_fill(blind[..., 0], -torch.inf)
    out = out.reshape(*q.shape[:3], v.shape[-1])
    return (out if blind is None else out.masked_fill(blind, 0)), lse
