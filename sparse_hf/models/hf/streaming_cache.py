"""A cache of constant memory: each layer keeps the keys that a later query can still see, and drops the others.

That is possible where a pattern has an end: a window, chunks, what a head of its own sees, all of them with or without the first
tokens (sinks), marked ones, and summaries of blocks, of which a layer keeps as many as there are. Layers that see everything keep all,
beside others that drop. Keys are held as they came, with their true positions
in them, so that answers are those with a cache that drops nothing.

Shapes do not change with the text, and counters are tensors, so that `generate` compiles decoding as with a static cache.

Legend: B batch; a token's number counts from the start of the text, padding included.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import Cache, PreTrainedConfig

from ...attention.slots.far_keys import FarKeys
from ...attention.slots.new_tokens import Filled
from .config import SparseConfigMixin
from .kept import Kept, read_kept
from .pinning_layer import PinningLayer
from .positions import changing_angles, short_length, why_not_turned
from .streaming_layer import StreamingLayer

Positioning = Literal["true", "cache", "auto"]
POSITIONS = get_args(Positioning)
# new tokens that are computed with nothing but themselves copied, and tokens that can always be taken back
SPARE = 1
# the same where drafts of an assistant are taken back
SPARE_FOR_DRAFTS = 64


class StreamingCache(Cache):
    """For `model.generate(ids, cache=StreamingCache(model.config))`, and for passes by hand, of any number of tokens.

    Where Transformers is older, the argument is `past_key_values`. Memory is that of `sinks + left + spare` tokens per layer and row,
    from the first pass on, on a GPU of one more, which `generate` takes back itself, and of marked tokens and summaries as they come;
    a pass of more than `spare` tokens needs that of its own tokens more while it runs. Padding is on the left, before all tokens of its
    row. Weights that `sparse_reference` gives are those of the keys that are held, as they lie.

    Copies (`copy.deepcopy`) go on with a shared prefix on their own. `crop(-n)` takes n tokens back, at least `spare` of them.

    Args:
        config: of a sparse decoder, whose layers have patterns like `window(left, 0) | first(sinks)`.
        spare: tokens beside those that patterns ask for. So many can be taken back at any time.
        positions: "true", keys are as far away as they are; "cache", first tokens are as far away as among the keys that are kept, for
            streams longer than a model was trained on (StreamingLLM, arXiv:2309.17453, section 3.2), where positions are rotary; "auto",
            that from where the trained reach ends, as `cache_implementation="streaming"` has it. With "cache", angles that change with
            the length of a text ("dynamic", "longrope") stay those of short texts.

    Raises:
        ValueError: a layer has a pattern that never leaves a key for good, or no layer has another; the message names it. Or positions
            that cannot be those in a cache.

    Examples:
        >>> from sparse_hf import sparsify
        >>> model = sparsify(AutoModelForCausalLM.from_pretrained("my-llama"), "window(63, 0) | first(4)")
        >>> cache = StreamingCache(model.config)
        >>> tokens = model.generate(torch.randint(5, 300, (1, 500)), past_key_values=cache, max_new_tokens=20, min_new_tokens=20)
        >>> tokens.shape[1], cache.layers[0].keys.shape[2] < 100
        (520, True)
    """

    def __init__(self, config: PreTrainedConfig, spare: int = SPARE, positions: Positioning = "true"):
        if isinstance(spare, bool) or not isinstance(spare, int) or spare < 1:
            raise ValueError(f"spare is {spare!r}; it must be a whole number of at least 1")
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}; it must be one of {', '.join(map(repr, POSITIONS))}")
        self.patterns = _patterns(config)
        super().__init__(layers=[_layer(kept, spare) for kept in _kept(self.patterns)])
        # tokens of padding before each row `[B]`, None where there are none
        self.padding: Tensor | None = None
        # the marks of the tokens of this pass `[B, Q]`, None where there are none
        self.marks: Tensor | None = None
        # what layers of this pass have computed for each other; None in a graph
        self.shared: dict[Any, Any] | None = None
        # what this pass says of first tokens that are too far away
        self.turned_sinks: Any = None
        # are angles those of short texts, whatever comes?
        self.holds_angles = positions == "cache" and changing_angles(config) is not None
        reason = why_not_turned(config) or self._why_not_turned(config)
        if positions == "cache" and reason:
            raise ValueError(reason)
        # the position from which on first tokens are seen as among what is kept: None if they never are
        if self.holds_angles:
            for layer in self.own_layers:
                # a graph could not ask the pass
                layer.is_compileable = False
        never = positions == "true" or reason or positions == "auto" and changing_angles(config) is not None
        self.turns_from = None if never else 0
        if positions == "auto" and self.turns_from is not None:
            self.turns_from = config.positions.reach_of(config)  # pyright: ignore
        # may a token of this text be at that position?
        self.turns = self.turns_from == 0
        # has each row a token of its own, so that no more padding can come before it?
        self.settled = False
        # are the tokens of this pass written among the slots, which attention reads as they lie?
        self.in_place = False

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingCache:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        # what is copied in inference mode could be written to in no other
        with torch.inference_mode(False):
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def own_layers(self) -> list[StreamingLayer]:
        # all are of one kind, which Transformers' class does not say
        return cast(list[StreamingLayer], self.layers)

    def _why_not_turned(self, config: Any) -> str | None:
        """Why first tokens cannot be seen as among what the layers keep; None if they can."""
        longest = max((n.kept.sinks + n.kept.left for n in self.own_layers if n.kept.left is not None), default=0) + 1
        drops_all = all(layer.kept.left is not None for layer in self.own_layers)
        if self.holds_angles and (not drops_all or longest > short_length(config)):
            seen = f"{longest} tokens" if drops_all else "all tokens of a text"
            return (
                f"positions='cache' needs angles that do not change, and those of rope_type {changing_angles(config)!r} do beyond "
                f"{short_length(config)} tokens of a text, while a layer keeps {seen}; give narrower windows, or use positions='true'"
            )
        pinning = next((number for number, layer in enumerate(self.layers) if isinstance(layer, PinningLayer)), None)
        if pinning is None:
            return None
        return (
            f"positions='cache' counts first tokens and those of a window, and layer {pinning} keeps others too: its pattern is "
            f"{self.patterns[pinning]}; use positions='true'"
        )

    @property
    def rows(self) -> int | None:
        """Batch rows of the tokens that it has seen; None before the first."""
        return next((layer.rows for layer in self.own_layers if layer.rows), None)

    def begin(
        self, attention_mask: Tensor | None, rows: int, new: int, can_be_in_place: bool, marks: Tensor | None = None
    ) -> None:
        """Prepare for a pass of `new` tokens in each row.

        Args:
            attention_mask: of all tokens so far; None where there is no more padding than in the passes before.
            can_be_in_place: may attention read the slots as they lie?
            marks: of the new tokens, bool `[B, new]`; None where nothing is marked.

        Raises:
            ValueError: another number of rows than in the passes before, a mask of another shape than `[B, tokens so far]`,
                padding elsewhere than on the left or than it was, layers that an interrupted pass has left behind, or marked tokens that
                see keys which were dropped.
        """
        self.marks, self.turned_sinks = marks, None
        self.shared = None if is_compiling() else {}
        few = new <= min(layer.spare for layer in self.own_layers) and can_be_in_place and not torch.is_grad_enabled()
        if is_compiling():
            # what a graph cannot ask: `generate` compiles steps behind a prompt, whose padding is known
            self.in_place = few and all(layer.is_initialized for layer in self.own_layers)
            if attention_mask is not None and not self.in_place:
                self.padding = attention_mask.shape[1] - attention_mask.sum(1)
            return
        seen = self._seen_by_all()
        if self.rows not in (None, rows):
            raise ValueError(
                f"the StreamingCache holds {seen} tokens of {self.rows} rows, and this batch has {rows}: begin anew "
                "with cache.reset(), or choose rows with cache.batch_select_indices and cache.batch_repeat_interleave"
            )
        for layer in self.own_layers:
            if layer.keys is not None and layer.keys.shape[0] != rows:
                layer.forget()
        sees_all = self.expect_marks(marks, seen)
        self.make_room(seen + new)
        if attention_mask is not None or not seen:
            self.padding = _going_on(self.padding, padding_of(attention_mask, seen + new), seen)
        self.settled = self.padding is None or bool((self.padding < seen + new).all())
        is_padded = self.padding is not None and bool((self.padding > seen).any())
        has_graph = any(layer.keys is not None and layer.keys.requires_grad for layer in self.own_layers)
        self.in_place = few and not is_padded and not has_graph and not sees_all

    def expect_marks(self, marks: Tensor | None, seen: int) -> bool:
        """Prepare for new tokens with `marks` `[B, Q]` behind `seen` ones. Returns whether one of them sees all keys.

        Raises:
            ValueError: it sees keys that were dropped.
        """
        pinning = [layer for layer in self.own_layers if isinstance(layer, PinningLayer) and layer.pinned.marks]
        most = int(marks.sum(1).max()) if marks is not None and pinning else 0
        if marks is None or not most:
            return False
        wide = [layer for layer in pinning if layer.pinned.queries]
        for layer in wide:
            held = layer.kept.sinks + (layer.kept.left or 0)
            if seen > held:
                raise ValueError(
                    f"a new token behind {seen} others is marked, and under {self.patterns[self.layers.index(layer)]} it would see all of "
                    f"them, of which the StreamingCache may drop all but {held} and the marked ones: mark tokens in the first pass, use "
                    "marked_keys() in the pattern, which lets all see marked tokens, or a DynamicCache, which keeps all"
                )
        for layer in pinning:
            layer.make_room_for_marks(seen + marks.shape[1], most)
        return bool(wide)

    def _seen_by_all(self) -> int:
        """Tokens that each layer has seen."""
        seen = [layer.seen for layer in self.own_layers]
        if len(set(seen)) > 1 or any(layer.is_torn for layer in self.own_layers):
            of_each = ", ".join(map(str, seen))
            raise ValueError(
                f"the StreamingCache's layers have seen different numbers of tokens ({of_each}): a pass was interrupted between or within "
                "them, and what it holds is of no use; begin anew with cache.reset(), or go on from a copy of an earlier time"
            )
        return seen[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of a layer; see `StreamingLayer.update`."""
        layer = self.own_layers[layer_idx]
        given = key_states, value_states, self.padding, self.in_place, self.marks, self._shared_on(key_states.device)
        if is_compiling() or self.in_place:
            # a few tokens overwrite none that is still needed
            return layer.update(*given)
        layer.is_torn = True
        found = layer.update(*given)
        layer.is_torn = False
        return found

    def go_back(self, tokens: int) -> None:
        """Have all layers hold so many tokens again, behind a pass that failed, if each of them can: otherwise `begin` says so."""
        more = [layer.seen - tokens for layer in self.own_layers]
        if any(layer.is_torn or n > layer.croppable() for layer, n in zip(self.own_layers, more, strict=True)):
            return
        for layer, n in zip(self.own_layers, more, strict=True):
            layer.crop(-n)

    def filled(self, layer_idx: int, new: int) -> Filled:
        """What stands in the slots of a layer, of which the `new` tokens have just filled some."""
        layer = self.own_layers[layer_idx]
        length = None if is_compiling() else layer.known
        shared = self._shared_on(layer.device)
        seen = _seen_before(layer, new, shared)
        found = Filled(seen, begins=self.padding, ring=layer.ring, shared=shared, length=length)
        if not isinstance(layer, PinningLayer):
            return found
        return replace(found, marks=layer.marks_of_pass(self.in_place), oldest=layer.near_begin(new, self.padding))

    def _shared_on(self, device: torch.device) -> dict[Any, Any] | None:
        """What layers on a device have computed for each other in this pass; None in a graph."""
        return None if self.shared is None else self.shared.setdefault(device, {})

    def far_keys(self, layer_idx: int, filled: Filled) -> FarKeys | None:
        """The tokens that a layer keeps for good and that are not among the keys that it gave; None if there are none."""
        layer = self.own_layers[layer_idx]
        return layer.far_keys(filled.oldest, self.padding) if isinstance(layer, PinningLayer) else None

    def real(self, layer_idx: int, keys: int, new: int, rows: int) -> Tensor | None:
        """Of the `keys` that a layer gave in order, the `new` among them: which are no padding, bool `[B, K]`; None if all are."""
        found = self.own_layers[layer_idx].real(keys, new, self.padding)
        return None if found is None else found.expand(rows, -1)

    def make_room(self, length: int) -> None:
        """Prepare for so many tokens: layers that keep all would grow from time to time otherwise."""
        self.turns = self.turns or self.turns_from is not None and length > self.turns_from
        for layer in self.own_layers:
            layer.make_room(length)

    def activate_past_recording(self) -> None:
        """Prepare for drafts, of which tokens are taken back."""
        for layer in self.own_layers:
            layer.widen(SPARE_FOR_DRAFTS, self.padding)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: the last `-tokens_to_remove`.

        Raises:
            ValueError: more of them than the layers hold what came before.
        """
        # older versions count drafts on the device
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, -n takes the last n tokens back")
        if not tokens_to_remove:
            return
        most = min(layer.croppable() for layer in self.own_layers)
        if -tokens_to_remove > most:
            raise ValueError(
                f"crop({tokens_to_remove}): the StreamingCache has dropped what tokens further back see, and can take back {most} of "
                f"{self.get_seq_length()} tokens. Nothing was changed; make it with a greater spare (StreamingCache(config, spare="
                f"{-tokens_to_remove})), go on from a copy of an earlier time (copy.deepcopy), or begin anew with cache.reset()"
            )
        for layer in self.own_layers:
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.settled = False
        self.padding, self.marks, self.in_place, self.turns = None, None, False, self.turns_from == 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.padding is not None:
            self.padding = self.padding[indices.to(self.padding.device)]

    def reorder_cache(self, beam_idx) -> None:
        super().reorder_cache(beam_idx)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, beam_idx.to(self.padding.device))


def _layer(kept: Kept, spare: int) -> StreamingLayer:
    return StreamingLayer(kept, spare) if kept.pinned is None else PinningLayer(kept, spare)


def why_not_streamed(config: PreTrainedConfig) -> str | None:
    """Why a model cannot decode behind a StreamingCache; None if it can."""
    try:
        StreamingCache(config)
    except ValueError as error:
        return str(error)
    return None


def why_not_by_default(config: PreTrainedConfig) -> str | None:
    """Why a model decodes behind a StreamingCache only if somebody asks for it; None if it does in any case."""
    reason = why_not_streamed(config)
    if reason is not None:
        return reason
    cache = StreamingCache(config)
    wide = (n for n, layer in enumerate(cache.layers) if isinstance(layer, PinningLayer) and layer.pinned.queries)
    layer = next(wide, None)
    if layer is None:
        return None
    return (
        f"layer {layer} has the pattern {cache.patterns[layer]}: a token that is marked in a later pass would see keys that were dropped; "
        "with marked_keys() it sees no more than others"
    )


def _patterns(config: PreTrainedConfig) -> list[str]:
    """The pattern of each layer."""
    if isinstance(getattr(config, "config", None), PreTrainedConfig):
        raise ValueError(
            f"a StreamingCache is made of a configuration, and got a {type(config).__name__}; give its .config"
        )
    if not isinstance(config, SparseConfigMixin):
        raise ValueError(
            f"a StreamingCache drops what the patterns of a sparse model never see again, and {type(config).__name__} is that "
            "of a dense one; use `sparse_hf.sparsify(model, pattern).config`"
        )
    if set(config.stacks) != {""}:
        raise ValueError(
            f"a StreamingCache is for decoders, and {config.model_type} has {' and '.join(config.stacks)}; use a DynamicCache"
        )
    if config.chooses_keys:
        raise ValueError(
            f"each token of {config.model_type} chooses keys by content anew, and a StreamingCache would have dropped some; use a "
            "DynamicCache"
        )
    if config.decode == "dense":
        raise ValueError(
            f"sparse_attention of this {config.model_type} model says decode='dense', for which all keys are needed; use a DynamicCache, "
            "or decode='sparse'"
        )
    return [config.layer_pattern(layer, is_causal=True) for layer in range(config.num_hidden_layers)]


def _kept(patterns: list[str]) -> list[Kept]:
    """What each layer keeps."""
    found = [read_kept(text) for text in patterns]
    drops = any(isinstance(kept, Kept) and kept.left is not None for kept in found)
    for layer, (kept, text) in enumerate(zip(found, patterns, strict=True)):
        reason = kept if isinstance(kept, str) else None if drops else "its window has no end"
        if reason:
            raise ValueError(
                f"layer {layer} has the pattern {text}: {reason}. A StreamingCache drops keys of patterns like "
                "'window(255, 0) | first(4)' only; use a DynamicCache, which keeps all, or another pattern"
            )
    return [kept for kept in found if isinstance(kept, Kept)]


def padding_of(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Tokens of padding before each row, `[B]`; None where there are none."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[1] != length:
        raise ValueError(
            f"attention_mask has shape {shape}; with a StreamingCache it must be [batch, {length}], a number for each token so far"
        )
    # each token of a long text asks this: the least is found several times sooner than whether all are true
    if attention_mask.min() > 0:
        return None
    real = attention_mask.bool()
    padding = length - real.sum(1)
    if not torch.equal(real, torch.arange(length, device=real.device) >= padding[:, None]):
        raise ValueError(
            "attention_mask has padding behind real tokens, whose keys a StreamingCache cannot tell from others; pad on the left, "
            "or use a DynamicCache"
        )
    return padding


def _seen_before(layer: StreamingLayer, new: int, shared: dict[Any, Any] | None) -> Tensor:
    """Tokens before the `new` ones, a number on the device; that of the first layer on it serves all of a pass."""
    if shared is None:
        return layer.counter - new
    if new not in shared:
        shared[new] = layer.counter - new
    return shared[new]


def _going_on(before: Tensor | None, after: Tensor | None, seen: int) -> Tensor | None:
    """The padding `[B]` of rows, if it is what it was after `seen` tokens, but for rows without any token of theirs by then."""
    some = after if before is None else before
    if not seen or some is None:
        return after
    was, now = (torch.zeros_like(some) if one is None else one.to(some.device) for one in (before, after))
    if not bool(((was == now) | (was == seen) & (now >= seen)).all()):
        raise ValueError(
            f"attention_mask has {now.tolist()} tokens of padding before its rows, and the StreamingCache has seen {was.tolist()} of them "
            "among its tokens; give the same mask with ones for the new tokens, or begin anew with cache.reset()"
        )
    return after
