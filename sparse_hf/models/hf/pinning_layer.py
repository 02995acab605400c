"""A layer of a streaming cache that keeps some tokens for good: marked ones, or the last of each block.

Such a token has a slot of its own beside the ring, from the time it comes. It is read there once the ring has dropped it.

Legend: B batch, G key heads, Q new tokens, K keys, D head dim, S slots, P slots for tokens that are kept for good.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ...attention.slots.far_keys import FarKeys
from .kept import Kept, Pinned
from .streaming_layer import StreamingLayer, joined, put, rounded_up, taken, writable

# slots for marked tokens, of whom there are few
LEAST_PINS = 32
# the first slot is for what is not kept, so that shapes do not depend on what is
NOBODY = 1


class PinningLayer(StreamingLayer):
    """See `StreamingLayer`. How many tokens are kept for good is a number on the device, and their slots are made ahead."""

    def __init__(self, kept: Kept, spare: int):
        super().__init__(kept, spare)
        self.pins = 0
        # keys and values `[B, G, P, D]`, the numbers of their tokens `[B, P]`, which are marked, and how many there are `[B]`
        self.pinned_keys: Any = None
        self.pinned_values: Any = None
        self.numbers: Any = None
        self.marked: Any = None
        self.count: Any = None
        # marks of the tokens in the ring `[B, 1, S, 1]`, and of keys in order `[B, K]` until attention has them
        self.slot_marks: Any = None
        self.held_marks: Tensor | None = None

    @property
    def pinned(self) -> Pinned:
        assert self.kept.pinned is not None
        return self.kept.pinned

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.make_pins(1)
        rows, device = key_states.shape[0], self.device
        with torch.inference_mode(False):
            self.pinned_keys, self.pinned_values = (
                t.new_zeros(rows, t.shape[1], self.pins, t.shape[3], requires_grad=False)
                for t in (key_states, value_states)
            )
            self.numbers = torch.full((rows, self.pins), -1, dtype=torch.long, device=device)
            self.count = torch.zeros(rows, dtype=torch.long, device=device)
            self.marked = torch.zeros(rows, self.pins, dtype=torch.bool, device=device)
            self.slot_marks = torch.zeros(rows, 1, self.ring.slots, 1, dtype=torch.bool, device=device)
        self.stay_in_place()

    def stay_in_place(self) -> None:
        super().stay_in_place()
        if not is_compiling():
            for name in OWN:
                if getattr(self, name) is not None:
                    torch._dynamo.mark_static_address(getattr(self, name))

    def make_room(self, length: int) -> None:
        super().make_room(length)
        if self.pinned.summaries:
            self.make_pins(self.pinned.most(length) + self._most_marked())

    def make_room_for_marks(self, length: int, more: int) -> None:
        """Have slots for `more` marked tokens of a text of so many."""
        if self.pinned.keys:
            self.make_pins(self.pinned.most(length) + self._most_marked() + more)

    def _most_marked(self) -> int:
        """Marked tokens of a row at most; waits for the device."""
        return 0 if self.marked is None or not self.pinned.keys else int(self.marked.sum(1).max())

    def make_pins(self, tokens: int) -> None:
        """Have slots for so many tokens that are kept for good."""
        if tokens + NOBODY <= self.pins:
            return
        more = rounded_up(tokens + NOBODY, LEAST_PINS) - self.pins
        self.pins += more
        if self.pinned_keys is None:
            return
        pad = torch.nn.functional.pad
        with torch.inference_mode(False):
            self.pinned_keys, self.pinned_values = (
                pad(t, (0, 0, 0, more)) for t in (self.pinned_keys, self.pinned_values)
            )
            self.numbers, self.marked = pad(self.numbers, (0, more), value=-1), pad(self.marked, (0, more))
        self.stay_in_place()

    def update(
        self, key_states: Tensor, value_states: Tensor, padding: Tensor | None = None, in_place: bool = False,
        marks: Tensor | None = None, shared: dict[Any, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, new = key_states.shape[0], key_states.shape[2]
        given = torch.zeros(rows, new, dtype=torch.bool, device=self.device) if marks is None else marks
        numbers = (self.counter + torch.arange(new, device=self.device))[None]
        places = numbers if padding is None else numbers - padding.to(self.device)[:, None]
        if self.pinned.marks:
            self._note_marks(given[:, None, :, None], padding, shared, in_place)
        chosen = (self.pinned.holds(places, given) & (places >= self.kept.sinks)).expand(rows, -1)
        rank = chosen.cumsum(1)
        slots = torch.where(chosen, self.count[:, None] + rank, 0)
        self.pinned_keys = _written(self.pinned_keys, slots, key_states)
        self.pinned_values = _written(self.pinned_values, slots, value_states)
        self.numbers.scatter_(1, slots, torch.where(chosen, numbers, -1))
        self.marked.scatter_(1, slots, given & chosen)
        self.count.add_(rank[:, -1])
        return super().update(key_states, value_states, padding, in_place, shared=shared)

    def _note_marks(
        self, given: Tensor, padding: Tensor | None, shared: dict[Any, Any] | None, in_place: bool
    ) -> None:  # fmt: skip
        """Keep the marks of new tokens `[B, 1, Q, 1]` where their keys will be."""
        if in_place:
            put(self.slot_marks, self._new_slots(given.shape[2], padding, shared), given)
            return
        before, past = self.before(padding), self._past(padding)
        held = given
        if past:
            held = torch.cat((taken(self.slot_marks, self._slots_in_order(past, before)), given), 2)
        self.held_marks = held[:, 0, :, 0]
        self.slot_marks = joined(self.slot_marks, given, *self._fresh(given.shape[2], before, padding))

    def marks_of_pass(self, in_place: bool) -> Tensor | None:
        """The marks of the keys that `update` gave, `[B, K]`."""
        if not self.pinned.marks:
            return None
        found, self.held_marks = self.slot_marks[:, 0, :, 0] if in_place else self.held_marks, None
        return found

    def near_begin(self, new: int, padding: Tensor | None) -> Tensor:
        """The position from which on keys are read where they came, the `new` ones being the last: `[B or 1]`."""
        count = self.counter[None] if padding is None else self.counter - padding.to(self.device)
        own = count.clamp(min=0, max=new)
        return self.kept.sinks + self._dropped(count.clamp(min=0) - own)

    def far_keys(self, oldest: Tensor | None, padding: Tensor | None) -> FarKeys | None:
        """The tokens that are kept for good and stand before `oldest`, of `near_begin`; None if there are none."""
        assert self.kept.left is not None and oldest is not None
        if not is_compiling() and self.seen <= self.kept.sinks + self.kept.left:
            return None
        begins = 0 if padding is None else padding.to(self.device)[:, None]
        places = torch.where(self.numbers >= 0, self.numbers - begins, -1)
        places = torch.where(places < oldest[:, None], places, -1)
        return FarKeys(self.pinned_keys, self.pinned_values, places, self.marked if self.pinned.marks else None)

    def widen(self, spare: int, padding: Tensor | None = None) -> None:
        marks, before, wider = self.slot_marks, self.ring, spare > self.spare
        super().widen(spare, padding)
        if wider and marks is not None:
            with torch.inference_mode(False):
                self.slot_marks = self._widened(marks, before, padding)
            self.stay_in_place()

    def reset(self) -> None:
        super().reset()
        if self.count is not None:
            self.count.zero_()
            self.numbers.fill_(-1)
            self.marked.zero_()

    def forget(self) -> None:
        super().forget()
        for name in OWN:
            setattr(self, name, None)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.count is not None:
            gone = self.numbers >= self.counter
            self.numbers.masked_fill_(gone, -1)
            self.marked.masked_fill_(gone, False)
            self.count.copy_((self.numbers >= 0).sum(1))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: writable(t.repeat_interleave(repeats, 0)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda t: writable(t[indices.to(t.device)]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda t: t.copy_(t.index_select(0, beam_idx.to(t.device))))

    def _each(self, change: Any) -> None:
        for name in OWN:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        self.stay_in_place()


# tensors of a row each
OWN = ("pinned_keys", "pinned_values", "numbers", "marked", "count", "slot_marks")


def _written(held: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """`held` `[B, G, P, D]` with `new` `[B, G, Q, D]` in slots `[B, Q]`."""
    if not (new.requires_grad or held.requires_grad):
        put(held, slots, new)
        return held
    return writable(held.scatter(2, slots[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]), new))
