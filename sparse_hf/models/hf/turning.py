"""First tokens of a long stream, turned to where they stand among the keys that are kept (StreamingLLM, arXiv:2309.17453, 3.2).

Rotary positions say how far away a key is. In a long stream the first tokens (sinks) are further away than a model has ever seen.
So a query that sees them is turned back to the position that it would have if nothing stood between them and the window, for these
few keys alone; the keys of the window are as far away as they are.

How a layer turns its keys is not looked up by the name of a model: it is read off the keys of a single token at two positions.

Legend: B batch, H query heads, G key heads, Q queries, S first tokens, D head dim, R numbers of a head that are turned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from ...attention.scoring import Scoring
from ...attention.slots.far_keys import FarKeys, far_attention
from ...attention.slots.new_tokens import own_places
from ...pattern import First, Window
from ...pattern.base import as_pattern
from ...pattern.complement import Outside
from ..names import STREAMING
from .cache import cache_name, given_cache, new_tokens
from .kept import Kept, read_kept
from .positions import changing_angles, why_not_turned
from .short_angles import holds_angles, refuse_graphs_of_short_texts
from .streaming_cache import StreamingCache

logger = logging.get_logger(__name__)

# the two positions at which a token is looked at, and how exactly their keys must be told, by the roundings of a dtype
PLACES = (0, 5)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
COARSE = 5e-2


@dataclass(frozen=True, eq=False)
class Turn:
    """How a layer turns its queries and keys by position: pairs of numbers, by an angle `position * inv_freq` each.

    Args:
        inv_freq: `[R / 2]`, float32 as the model has them.
        begin: the first of the numbers of a head that are turned.
        interleaved: are the numbers of a pair side by side, or half of them apart?
    """

    inv_freq: Tensor
    begin: int
    interleaved: bool

    def turned(self, t: Tensor, angles: Tensor) -> Tensor:
        """`t` `[B, H, Q, D]` by angles `[B or 1, Q, R / 2]`."""
        cos, sin = (wave.to(t.dtype)[:, None] for wave in (angles.cos(), angles.sin()))
        end = self.begin + 2 * self.inv_freq.shape[0]
        part = t[..., self.begin : end]
        if self.interleaved:
            one, other = part[..., 0::2], part[..., 1::2]
            part = torch.stack((one * cos - other * sin, other * cos + one * sin), -1).flatten(-2)
        else:
            one, other = part.chunk(2, -1)
            part = torch.cat((one * cos - other * sin, other * cos + one * sin), -1)
        return torch.cat((t[..., : self.begin], part, t[..., end:]), -1)

    def from_to(self, old: Tensor, new: Tensor) -> Tensor:
        """The angles `[B or 1, Q, R / 2]` between positions, without the roundings of the model's own at far ones."""
        freq = self.inv_freq.to(old.device)
        own = old.float()[..., None] * freq
        if old.device.type == "mps":
            return new.float()[..., None] * freq - own
        return (new.double()[..., None] * freq.double() - own.double()).float()


class Queries(NamedTuple):
    """Where queries stand, `[B or 1, Q]` each: how many tokens of their row come before, and at which positions they were turned."""

    own: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class TurnedSinks:
    """What attention is told of a pass some of whose queries see the first tokens from further away than they ought to.

    Args:
        turns: of each layer; None where it turns nothing.
        start: queries at this position and behind it see them as if they were in a cache.
        jumps: do positions jump, so that even near queries may be far away by position?
        holds_angles: are angles those of short texts, see `hold_angles`?
    """

    turns: tuple[Turn | None, ...]
    start: int
    jumps: bool = False
    holds_angles: bool = False

    def of_layer(self, layer: int, pattern: str) -> FarSinks | None:
        """What a layer does with its first tokens; None if it has none, or turns nothing."""
        kept, turn = kept_with_sinks(pattern), self.turns[layer]
        return None if kept is None or turn is None else FarSinks(turn, kept, self.start, self.jumps, pattern)


@dataclass(frozen=True, eq=False)
class FarSinks:
    """Attention of a layer in two disjoint parts: to the near keys as they are, and to the first tokens by turned queries."""

    turn: Turn
    kept: Kept
    start: int
    jumps: bool
    pattern: str

    @property
    def near(self) -> str:
        """The pattern of the other part."""
        return near_pattern(self.pattern, self.jumps)

    def part(
        self, tensors: tuple[Tensor, Tensor, Tensor], seen: Tensor | int, of_rows: Tensor | None, of_keys: Tensor | None,
        kwargs: Mapping[str, Any], scoring: Scoring,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`attention` of the arguments of an attention function.

        Args:
            tensors: q, k and v.
            seen: tokens before the queries, padding included.
            of_rows: `[B]`, tokens of padding before each row; None where there are none.
            of_keys: `[B]`, where rows begin among the keys; None is 0.
            kwargs: of the attention function, positions among them.
        """
        q, keys, values = tensors
        own = own_places(torch.as_tensor(seen, device=q.device), of_rows, q.shape[2])
        given = kwargs.get("document_positions", kwargs.get("position_ids"))
        places = given if given is not None and given.ndim == 2 and given.shape[1] == q.shape[2] else own
        first, of_first = (first_keys(t, of_keys, self.kept.sinks) for t in (keys, values))
        return self.attention(q, first, of_first, Queries(own, places), scoring)

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, queries: Queries, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Out `[B, H, Q, D]` and lse `[B, H, Q]` of first tokens.

        Args:
            q: `[B, H, Q, D]`, turned by their positions.
            keys, values: `[B, G, S, D]` of the first tokens of each row, at positions 0 .. S - 1.
            queries: where they stand.
            scoring: scale and soft cap.
        """
        own, positions = queries
        sinks, left = self.kept.sinks, self.kept.left
        assert left is not None
        # among what is kept for it, a query is behind the first tokens and the window
        among = own.clamp(max=sinks + left)
        wanted = torch.where(positions >= self.start, among, positions)
        turned = self.turn.turned(q, self.turn.from_to(positions, wanted))
        least = -1 if self.jumps else left
        far = FarKeys.of_first(keys, values)
        return far_attention(turned, far, own, self.pattern, scoring, least)


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def kept_with_sinks(pattern: str) -> Kept | None:
    """What a layer keeps whose first tokens may be far away; None of others."""
    kept = read_kept(pattern)
    return None if isinstance(kept, str) or not kept.sinks or kept.left is None else kept


@torch.compiler.assume_constant_result
def near_pattern(text: str, jumps: bool) -> str:
    """A pattern without first tokens that are far away, or without any of them where positions jump."""
    kept, pattern = read_kept(text), as_pattern(text)
    assert isinstance(kept, Kept)
    rest = Outside(First(kept.sinks)) if jumps else Window(kept.left, 0)
    if kept.pinned is not None:
        # tokens that are kept for good are seen from any distance
        rest = rest | Outside(First(kept.sinks))
    if pattern.heads:
        return str(type(pattern)(*(head & rest for head in pattern.heads)))
    return str(pattern & rest)


def begin_turning(model: Any, kwargs: Mapping[str, Any]) -> dict[str, TurnedSinks]:
    """The argument by which attention learns of first tokens that are too far away, if any query of a pass sees such.

    A `StreamingCache` says from where on. Without any cache, it is where the trained reach of a model ends whose `generation_config`
    asks for a streaming one, so that one pass over a text gives what a stream of it gives. Other caches leave all as it is.

    Args:
        model: of the pass.
        kwargs: all arguments of `forward` by name.
    """
    cache, tokens, places = given_cache(kwargs), new_tokens(kwargs), kwargs.get("position_ids")
    if tokens is None:
        return {}
    if isinstance(cache, StreamingCache):
        start = cache.turns_from if cache.turns else None
    else:
        start = _start_of_one_pass(model, tokens, places) if cache is None else None
    if start is None:
        return {}
    jumps = False
    if places is not None and places.ndim == 2 and not torch.compiler.is_compiling():
        steps = places[:, 1:] - places[:, :-1]
        # padding repeats positions
        jumps = bool((steps > 1).any())
    holds = isinstance(cache, StreamingCache) and cache.holds_angles
    if holds and torch.compiler.is_compiling():
        refuse_graphs_of_short_texts()
    turned = TurnedSinks(find_turns(model), start, jumps, holds)
    if isinstance(cache, StreamingCache):
        cache.turned_sinks = turned
    return {"turned_sinks": turned}


def _start_of_one_pass(model: Any, tokens: Tensor, places: Tensor | None) -> int | None:
    """From where on a pass without a cache turns first tokens; None where it has no such position."""
    settings = getattr(model, "generation_config", None)
    if getattr(settings, "cache_implementation", None) != STREAMING or model.training:
        return None
    knows = places is not None and not torch.compiler.is_compiling()
    last = int(places.max()) if places is not None and knows else tokens.shape[1] - 1
    reach = None if model.config.positions is None else model.config.positions.reach_of(model.config)
    return trained_reach(model.config) if reach is not None and last >= reach else None


def trained_reach(config: Any) -> int | None:
    """The position from which on first tokens are turned by themselves; None if they never are."""
    positions = config.positions
    if positions is None or positions.scheme != "rotary" or set(config.stacks) != {""} or changing_angles(config):
        return None
    if not any(kept_with_sinks(config.layer_pattern(n, is_causal=True)) for n in range(config.num_hidden_layers)):
        return None
    return positions.reach_of(config)


# models whose layers were looked at, and what was seen: as long as they live
_KNOWN: WeakKeyDictionary[Any, tuple[Turn | None, ...]] = WeakKeyDictionary()


def find_turns(model: Any) -> tuple[Turn | None, ...]:
    """How each layer turns its keys.

    Raises:
        ValueError: positions that are not rotary, or keys that are turned in no known way.
    """
    if model not in _KNOWN:
        reason = why_not_turned(model.config)
        if reason:
            raise ValueError(reason)
        if changing_angles(model.config) is not None and not holds_angles(model):
            raise ValueError(
                "positions='cache': rope_parameters of this model's configuration were changed to angles that change with the length of "
                "a text; make the model anew, from_pretrained(..., config=config)"
            )
        _KNOWN[model] = tuple(_looked_at(model))
    return _KNOWN[model]


@torch.no_grad()
def _looked_at(model: Any) -> Iterator[Turn | None]:
    before, after = (_keys_of_one_token(model, place) for place in PLACES)
    frequencies = list(_frequencies(model))
    distance = torch.tensor([[PLACES[1] - PLACES[0]]], device=model.device)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        limit = TOLERANCE.get(old.dtype, COARSE) * float(old.abs().max())
        if float((old - new).abs().max()) <= limit / 100:
            # a layer without positions
            yield None
            continue
        ways = [
            Turn(freq, begin, interleaved)
            for freq, interleaved in product(frequencies, (False, True))
            for begin in sorted({0, old.shape[-1] - 2 * freq.shape[0]})
            if begin >= 0
        ]
        errors = [_error(way, old, new, distance) for way in ways]
        best = min(range(len(ways)), key=errors.__getitem__, default=None)
        if best is None or errors[best] > limit:
            raise ValueError(
                f"positions='cache': layer {layer} of {type(model).__name__} turns its keys by their positions in a way that is not known "
                "here; use positions='true'"
            )
        yield ways[best]


def _error(way: Turn, old: Tensor, new: Tensor, distance: Tensor) -> float:
    """How far a way to turn keys `[1, G, 1, D]` is from what was seen."""
    angles = distance.to(old.device).double()[..., None] * way.inv_freq.to(old.device).double()
    return float((way.turned(old.double(), angles) - new.double()).abs().max())


def _keys_of_one_token(model: Any, position: int) -> list[Tensor]:
    """The keys of each layer, `[1, G, 1, D]`: a token alone has the same states wherever it stands, if positions are rotary."""
    cache = DynamicCache()
    ids, place = (torch.full((1, 1), number, device=model.device) for number in (1, position))
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        # the same dropout, if any
        torch.manual_seed(0)
        model(ids, position_ids=place, **{cache_name(model): cache})
    return [layer.keys for layer in cache.layers if isinstance(layer, CacheLayerMixin) and layer.keys is not None]


def _frequencies(model: Any) -> Iterator[Tensor]:
    """What angles of a model may go by: its buffers, and what they are by default where it has none."""
    found = [b for name, b in model.named_buffers() if name.endswith("inv_freq") and "original" not in name]
    # some are written to in longer texts
    yield from (b.detach().float().clone() for b in found if b.ndim == 1)
    if not found:
        config = model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = getattr(config, "rotary_dim", None) or head
        yield 1.0 / 10000.0 ** (torch.arange(0, size, 2, device=model.device).float() / size)


def first_keys(t: Tensor, begins: Tensor | None, sinks: int) -> Tensor:
    """Of keys `[B, G, K, D]`, the first of each row, `[B, G, S, D]`; rows begin at `begins` `[B]`, None is 0."""
    if begins is None:
        return t[:, :, :sinks]
    index = (begins[:, None] + torch.arange(sinks, device=t.device)).clamp(max=t.shape[2] - 1)
    return t.gather(2, index[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
