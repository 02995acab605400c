"""A cache of constant memory: each layer keeps the keys that a later query can still see, and drops the others.

That is possible where a pattern is a window with an end and the first tokens (sinks): `window(left, 0) | first(sinks)`. Keys are
held as they came, with their true positions in them, so that answers are those with a cache that drops nothing. Attention sees
the keys that are held as a shorter text, the first and behind them the last: distances within the window are the true
ones, and sinks are seen from any distance.

Legend: B batch, G key heads, D head dim; a token's number counts from the start of the text, padding included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ...pattern import Pattern
from ...pattern.forms import WindowForm, read_window
from .config import SparseConfigMixin

# no side of a window is taken for endless, however long the text
ANY_LENGTH = 1 << 62


class StreamingCache(Cache):
    """For `model.generate(ids, cache=StreamingCache(model.config))`, and for passes by hand, of any number of tokens.

    Where Transformers is older, the argument is `past_key_values`. Memory is that of `sinks + left + 1` tokens per layer and row, from
    the first pass on, and of the longest padding, behind which the sinks of its row stand; a pass of Q tokens needs that of Q
    more while it runs. Padding is on the left, and all of it in the first pass. Weights that `sparse_reference` gives are those of
    the keys that are held, as they lie. Compiled models run with breaks in their graphs.

    Args:
        config: of a sparse decoder, whose every layer has a pattern like `window(left, 0) | first(sinks)`.

    Raises:
        ValueError: a layer has another pattern; the message names it.
    """

    def __init__(self, config: PreTrainedConfig):
        self.patterns = _patterns(config)
        kept = (_kept(layer, text) for layer, text in enumerate(self.patterns))
        super().__init__(layers=[StreamingLayer(*of_layer) for of_layer in kept])
        # tokens of padding before each row `[B]`, None where there are none
        self.padding: Tensor | None = None
        self._real: dict[tuple, Tensor] = {}

    def begin(self, attention_mask: Tensor | None, rows: int, new: int) -> None:
        """Prepare for a pass of `new` tokens in each row, before there are keys: padding decides what is kept.

        Raises:
            ValueError: another number of rows than in the passes before, a mask of another shape than `[B, tokens so far]`, padding
                elsewhere than on the left, or more of it than in the first pass.
        """
        if self.rows not in (None, rows):
            raise ValueError(
                f"the StreamingCache holds {self.get_seq_length()} tokens of {self.rows} rows, and this batch has {rows}: begin anew "
                "with cache.reset(), or choose rows with cache.batch_select_indices and cache.batch_repeat_interleave"
            )
        self.padding, self._real = _padding(attention_mask, self.get_seq_length() + new), {}
        longest = 0 if self.padding is None else int(self.padding.max())
        for layer in self.layers:
            assert isinstance(layer, StreamingLayer)
            if not layer.is_initialized:
                layer.padding = longest
            elif longest > layer.padding:
                raise ValueError(
                    f"a row has {longest} tokens of padding, and in the first pass it had at most {layer.padding}, so that keys of its "
                    "sinks may be dropped already; pass more tokens at first than there is padding, or use a DynamicCache"
                )

    @property
    def rows(self) -> int | None:
        """Batch rows of the tokens that it has seen; None before the first."""
        keys = (layer.keys for layer in self.layers if isinstance(layer, StreamingLayer))
        return next((t.shape[0] for t in keys if t is not None), None)

    def real(self, held: int, device: torch.device) -> Tensor | None:
        """Of a layer's `held` keys, which are no padding: bool `[B, held]`, or None if all are."""
        if self.padding is None:
            return None
        if (held, device) not in self._real:
            # layers share it, and with it their plan
            self._real[held, device] = torch.arange(held, device=device) >= self.padding.to(device)[:, None]
        return self._real[held, device]


class StreamingLayer(CacheLayerMixin):
    """Keys `[B, G, first + left + 1, D]`, and values: of the first tokens, and of the last `left + 1` in turn.

    Token i stands at i, and from `first` on at `first + (i - first) % (left + 1)`. So a single token takes the place of the one that
    fell out of the window. If it `sees_all` that is held, it gets the keys as they lie, since their order is nothing to it. Otherwise, and
    for several tokens, they are copied in order.
    """

    is_sliding = False

    def __init__(self, sinks: int, left: int, sees_all: bool):
        super().__init__()
        self.sinks, self.left, self.sees_all = sinks, left, sees_all
        self.padding = self.seen = 0

    @property
    def first(self) -> int:
        return self.padding + self.sinks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        room = self.first + self.left + 1
        self.device = key_states.device
        self.keys, self.values = (t.new_empty(*t.shape[:2], room, t.shape[3]) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take keys and values `[B, G, Q, D]`; give what their queries see, they themselves last: `[B, G, K, D]`.

        K is the number of all tokens so far, or `first + left + Q` where earlier ones are dropped.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        take = self._take_one if key_states.shape[2] == 1 and self.sees_all else self._take
        self.keys, keys = take(self.keys, key_states)
        self.values, values = take(self.values, value_states)
        self.seen += key_states.shape[2]
        return keys, values

    def _take_one(self, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """What is held then, and what the token sees."""
        slot = self._slot(self.seen)
        if _is_written_once(held, new):
            held = torch.cat((held[:, :, :slot], new, held[:, :, slot + 1 :]), 2)
        else:
            held[:, :, slot : slot + 1] = new
        return held, held[:, :, : self.seen + 1]

    def _take(self, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """What is held then, and what the tokens see."""
        begin, end = self.seen, self.seen + new.shape[2]
        past = held.index_select(2, self._slots(self._kept(0, begin, self.left)))
        kept = self._kept(begin, end, self.left + 1)
        write = held.index_copy if _is_written_once(held, new) else held.index_copy_
        held = write(2, self._slots(kept), new.index_select(2, kept - begin))
        return held, torch.cat((past, new), 2) if begin else new

    def _kept(self, begin: int, end: int, last: int) -> Tensor:
        """Of the tokens from `begin` to `end`, exclusive, those that are first or among the `last` before `end`."""
        ranges = (begin, min(self.first, end)), (max(self.first, begin, end - last), end)
        return torch.cat([torch.arange(one, max(one, other), device=self.device) for one, other in ranges])

    def _slot(self, token: int) -> int:
        """Where a token stands among those that are held."""
        return token - max(0, (token - self.first) // (self.left + 1)) * (self.left + 1)

    def _slots(self, tokens: Tensor) -> Tensor:
        """`_slot` of each."""
        rounds = (tokens - self.first) // (self.left + 1)
        return tokens - rounds * (rounds > 0) * (self.left + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # what is dropped does not concern the mask: the attention function reads the keys that it gets
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.padding = self.seen = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (t.repeat_interleave(repeats, 0) for t in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (t[indices] for t in (self.keys, self.values))

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "a StreamingCache drops keys for good, and decoding with an assistant or by prompt lookup takes tokens back; use a "
            "DynamicCache"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self.activate_past_recording()


def _is_written_once(held: Tensor, new: Tensor) -> bool:
    """Must keys be copied to take more, since gradients go through them, or they were made in inference mode?"""
    return new.requires_grad or held.requires_grad or held.is_inference() and not torch.is_inference_mode_enabled()


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
    return [config.layer_pattern(layer, is_causal=True) for layer in range(config.num_hidden_layers)]


def _kept(layer: int, text: str) -> tuple[int, int, bool]:
    """Sinks and window of a layer, of all its heads, and whether a token sees all of both.

    Sinks that are seen from some distance only, as in `window(255, 0) | (first(4) & window(4095, 0))`, need the longer window: where
    they have left it, they are behind it among the keys that are held too.
    """
    pattern = Pattern.parse(text)
    sinks, windows, reaches = [], [], []
    for head in pattern.heads or (pattern,):
        form = read_window(head, ANY_LENGTH, of_any_reach=True)
        reason = _why_endless(form)
        if isinstance(form, str) or reason:
            raise ValueError(
                f"layer {layer} has the pattern {text}: {reason}. A StreamingCache drops keys of patterns like "
                "'window(255, 0) | first(4)' only; use a DynamicCache, which keeps all, or another pattern"
            )
        sinks.append(form.first)
        windows.append((form.window.left or 0) if form.window is not None else 0)
        if form.first and form.clip.left is not None:
            reaches.append(form.clip.left)
    left = max(windows + reaches)
    return max(sinks), left, min(windows) == left


def _why_endless(form: WindowForm | str) -> str | None:
    """Why keys of a pattern can never be dropped, None if they can."""
    if isinstance(form, str):
        return form
    if form.marked:
        return "marked tokens may be anywhere"
    if form.window is not None and form.window.left is None:
        return "its window has no end"
    return None


def _padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
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
