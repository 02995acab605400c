"""A layer of a cache of constant memory: the first tokens in place, the last ones in a ring, and counters on the device.

Legend: B batch, G key heads, Q new tokens, K keys, D head dim, S slots; a token's number counts from the start of the text, padding
included, and its position from the first of its row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import CacheLayerMixin

from ...attention.slots.ring import Ring, positions_in, slots_of
from .kept import Kept
from .late import late_tokens

# slots for tokens that all keys may be read of again, before more are needed
LEAST_ROOM = 256


class StreamingLayer(CacheLayerMixin):
    """Keys `[B, G, S, D]` by position, and values: of the first tokens, and of the last ones in turn, see `Ring`.

    A few new tokens are written in place, and attention reads the slots as they lie. For more of them, the keys that are held
    come in order, as a shorter text before the new ones. All of that is of shapes that do not change with the text, and where
    a token stands is computed on the device: a graph of a step serves all steps.

    Args:
        kept: what the pattern of the layer needs.
        spare: new tokens that fit beside those that are needed, and tokens that can be taken back.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def __init__(self, kept: Kept, spare: int):
        super().__init__()
        self.kept, self.spare = kept, spare
        # slots for tokens that `generate` takes back by itself, where the device is known
        self.late = 0
        # of a layer that keeps all: slots that are wanted
        self.wanted = 0
        with torch.inference_mode(False):
            self.counter = torch.zeros((), dtype=torch.long)
        # what the counter says, as far as the host knows
        self.known: int | None = 0
        # the first token behind the sinks that was not written over, when that was last asked
        self.oldest = 0
        # did a pass end while it was written to?
        self.is_torn = False

    @property
    def keeps_all(self) -> bool:
        return self.kept.left is None

    @property
    def ring(self) -> Ring:
        if self.kept.left is None:
            return Ring(0, max(self.wanted, LEAST_ROOM) if self.keys is None else self.keys.shape[2])
        return Ring(self.kept.sinks, self.kept.left + self.kept.period - 1 + self.spare + self.late)

    @property
    def rows(self) -> int | None:
        """Batch rows of the tokens that it has seen; None before the first."""
        return self.keys.shape[0] if self.keys is not None and self.seen else None

    @property
    def seen(self) -> int:
        """Tokens that it has seen. After a graph of a step, the device is waited for."""
        if self.known is None:
            self.known = int(self.counter)
        return self.known

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.late = late_tokens(self.device)
        # tensors of inference mode could be written to in no other
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.zeros(*t.shape[:2], self.ring.slots, t.shape[3], dtype=t.dtype, device=t.device)
                for t in (key_states, value_states)
            )
            self.counter = self.counter.to(self.device)
        self.stay_in_place()
        self.is_initialized = True

    def stay_in_place(self) -> None:
        """Have CUDA graphs write to where they wrote before; they would be skipped for tensors that nobody says this of."""
        if not is_compiling():
            for t in (self.keys, self.values, self.counter):
                if t is not None:
                    torch._dynamo.mark_static_address(t)

    def make_room(self, length: int) -> None:
        """Have slots for so many tokens, if it keeps all. Some to spare: a graph is of one number of slots."""
        if not self.keeps_all or length <= self.ring.slots:
            return
        more = rounded_up(length if self.keys is None else max(length, 2 * self.ring.slots)) - self.ring.slots
        self.wanted = self.ring.slots + more
        if self.keys is not None and self.values is not None:
            with torch.inference_mode(False):
                self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (self.keys, self.values))
            self.stay_in_place()

    def widen(self, spare: int, padding: Tensor | None = None) -> None:
        """Have so many slots to spare, at least.

        Args:
            padding: `[B]`, tokens of padding before each row; None where there are none.
        """
        if spare <= self.spare:
            return
        self._note_oldest()
        held, before = (self.keys, self.values), self.ring
        self.spare = spare
        if self.keeps_all or held[0] is None or held[1] is None:
            return
        with torch.inference_mode(False):
            self.keys, self.values = (self._widened(t, before, padding) for t in held if t is not None)
        self.stay_in_place()

    def _widened(self, held: Tensor, before: Ring, padding: Tensor | None) -> Tensor:
        """Slots `[B, G, S, D]` of the ring before, as the wider ring has them."""
        there = positions_in(self.ring, self.before(padding))
        # what is beyond the old ring was overwritten, and is read by nobody
        return taken(held, slots_of(before, there.clamp(min=0))).clone()

    def update(
        self, key_states: Tensor, value_states: Tensor, padding: Tensor | None = None, in_place: bool = False,
        marks: Tensor | None = None, shared: dict[Any, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Take keys and values `[B, G, Q, D]`; give what their queries see, `[B, G, K, D]`.

        Args:
            padding: `[B]`, tokens of padding before each row; None where there are none.
            in_place: give the slots as they lie. There must be no padding among the new tokens, and no gradient.
            marks: `[B, Q]` bool, of the new tokens, for layers that ask for them; None where there are none.
            shared: what the layers of a pass have computed for each other; None in a graph.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        new = key_states.shape[2]
        if in_place:
            slots = self._new_slots(new, padding, shared)
            put(self.keys, slots, key_states)
            put(self.values, slots, value_states)
            keys, values = self.keys, self.values
        else:
            before = self.before(padding)
            keys, values = self._in_order(key_states, value_states, before, padding)
            self.keys, self.values = self._written(key_states, value_states, before, padding)
        self.counter.add_(new)
        # nobody asks a graph what the host knows, so that it is the same graph for all steps
        self.known = None if is_compiling() else self.seen_before(new) + new
        return keys, values

    def _new_slots(self, new: int, padding: Tensor | None, shared: dict[Any, Any] | None) -> Tensor:
        """The slots `[B or 1, Q]` of new tokens, which are the same in layers of one ring."""
        found = None if shared is None else shared.get(self.ring)
        if found is None:
            found = slots_of(self.ring, self.before(padding)[:, None] + torch.arange(new, device=self.device))
        if shared is not None:
            shared[self.ring] = found
        return found

    def seen_before(self, new: int) -> int:
        """Tokens before the `new` ones that the counter knows of already, as far as the host knows."""
        return int(self.counter) - new if self.known is None else self.known

    def before(self, padding: Tensor | None) -> Tensor:
        """Tokens of each row so far, padding left out: `[B]`, or `[1]` where there is none."""
        if padding is None:
            return self.counter[None]
        return (self.counter - padding.to(self.device)).clamp(min=0)

    def _dropped(self, count: Tensor) -> Tensor:
        """Of so many tokens of a row, how many are left out of those in order."""
        if self.kept.left is None:
            return torch.zeros_like(count)
        beyond = (count - self.kept.sinks - self.kept.left).clamp(min=0)
        return torch.div(beyond, self.kept.period, rounding_mode="floor") * self.kept.period

    def _past(self, padding: Tensor | None) -> int:
        """Keys before the new tokens where they come in order: as many as there are, or as there may be at most."""
        if self.kept.left is None:
            return self.ring.slots if is_compiling() else self.seen
        sinks, left, period = self.kept.sinks, self.kept.left, self.kept.period
        if is_compiling() or padding is not None:
            return sinks + left + period - 1 if is_compiling() else min(self.seen, sinks + left + period - 1)
        return self.seen - max(0, self.seen - sinks - left) // period * period

    def _in_order(
        self, keys: Tensor, values: Tensor, before: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Keys and values `[B, G, K, D]`: those that are held, in order and the last ones right before the new."""
        assert self.keys is not None and self.values is not None
        past = self._past(padding)
        if not past:
            return keys, values
        index = self._slots_in_order(past, before)
        return torch.cat((taken(self.keys, index), keys), 2), torch.cat((taken(self.values, index), values), 2)

    def _slots_in_order(self, past: int, before: Tensor) -> Tensor:
        """The slots `[B or 1, past]` of the keys that are held, the last ones at the end."""
        dropped = self._dropped(before)[:, None]
        # which of its own kept tokens each is, negative where a row has fewer
        rank = torch.arange(past, device=self.device) - past + before[:, None] - dropped
        positions = torch.where(rank < self.kept.sinks, rank, rank + dropped).clamp(min=0)
        return slots_of(self.ring, positions)

    def real(self, keys: int, new: int, padding: Tensor | None) -> Tensor | None:
        """Which of `keys` in order, the `new` among them and just written, are tokens of a row: bool `[B or 1, K]`; None if all."""
        if padding is None and not is_compiling():
            return None
        count = self.counter[None] if padding is None else self.counter - padding.to(self.device)
        own = count.clamp(max=new).clamp(min=0)
        before = count.clamp(min=0) - own
        there = before - self._dropped(before) + own
        return torch.arange(keys, device=self.device) >= keys - there[:, None]

    def _written(
        self, keys: Tensor, values: Tensor, before: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The slots with the new tokens in them."""
        assert self.keys is not None and self.values is not None
        index, fresh = self._fresh(keys.shape[2], before, padding)
        return joined(self.keys, keys, index, fresh), joined(self.values, values, index, fresh)

    def _fresh(self, new: int, before: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which of the new tokens each slot gets, and whether it gets one: `[B or 1, S]` each."""
        after = before + new if padding is None else (self.counter + new - padding.to(self.device)).clamp(min=0)
        there = positions_in(self.ring, after)
        # tokens of a row are the last of the new ones
        index = there - after[:, None] + new
        fresh = (there >= before[:, None]) & (there >= 0)
        return index.clamp(0, new - 1), fresh

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # what is dropped does not concern the mask: the attention function asks the cache
        return query_length if is_compiling() else self.seen + query_length, 0

    def get_seq_length(self) -> int:
        # a graph must not know the number
        return self.counter if is_compiling() and self.is_initialized else self.seen  # pyright: ignore[reportReturnType]

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.counter.zero_()
        self.known, self.oldest, self.is_torn = 0, 0, False

    def forget(self) -> None:
        """Begin anew, with other tensors."""
        self.reset()
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        self._note_oldest()
        self.known = self.seen - abs(tokens_to_remove)
        self.counter.sub_(abs(tokens_to_remove))

    def croppable(self) -> int:
        """How many tokens can be taken back, so that all is there that the next one sees."""
        self._note_oldest()
        if self.kept.left is None or self.oldest <= self.kept.sinks:
            return self.seen
        return self.seen - self.oldest - self.kept.left - self.kept.period + 1

    def _note_oldest(self) -> None:
        if not self.keeps_all:
            self.oldest = max(self.oldest, self.seen - self.ring.length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (writable(t.repeat_interleave(repeats, 0)) for t in (self.keys, self.values))
            self.stay_in_place()

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (writable(t[indices]) for t in (self.keys, self.values))
            self.stay_in_place()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        # in place: a graph goes on with the tensors that it knows
        for t in (self.keys, self.values):
            if t is not None:
                t.copy_(t.index_select(0, beam_idx.to(t.device)))


def rounded_up(slots: int, least: int = LEAST_ROOM) -> int:
    """At least so many slots, an eighth more at most, so that texts of nearly the same length share a graph."""
    step = max(least, (1 << (slots - 1).bit_length()) // 8)
    return -(-slots // step) * step


def put(held: Tensor, slots: Tensor, new: Tensor) -> None:
    """Write `new` `[B, G, Q, D]` to slots `[B or 1, Q]`."""
    if slots.shape[0] == 1:
        held.index_copy_(2, slots[0], new)
    else:
        held.scatter_(2, slots[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]), new)


def taken(held: Tensor, slots: Tensor) -> Tensor:
    """`[B, G, K, D]` of slots `[B or 1, K]`."""
    if slots.shape[0] == 1:
        return held.index_select(2, slots[0])
    return held.gather(2, slots[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]))


def joined(held: Tensor, new: Tensor, index: Tensor, fresh: Tensor) -> Tensor:
    """Slots `held`, but for those that are `fresh` `[B or 1, S]`, which get the new tokens of an `index`."""
    written = torch.where(fresh[:, None, :, None], taken(new, index), held)
    if new.requires_grad or held.requires_grad:
        return writable(written)
    return held.copy_(written)


def writable(t: Tensor) -> Tensor:
    """A new tensor as one that later passes can write to: those of inference mode could be written to in no other."""
    if is_compiling() or not t.is_inference():
        return t
    with torch.inference_mode(False):
        return t.clone()
