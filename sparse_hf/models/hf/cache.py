"""Transformers' caches under a pattern: sliding ones are made to keep all keys, streaming ones learn of padding."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, EncoderDecoderCache, cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils import logging

from ..names import STREAMING
from .config import SparseConfigMixin
from .inner_padding import has_padding_in_the_way
from .streaming_cache import StreamingCache, padding_of, why_not_by_default, why_not_streamed

logger = logging.get_logger(__name__)

# what a cache is called among the arguments of `forward`, newest name first
CACHE_NAMES = ("cache", "past_key_values")

# what cache layers have into which the text is compressed (DeepSeek V4)
OWN_STATE = "store_compression_weights"


class GrownStaticLayer(StaticLayer):
    """In place of a layer that slides: it keeps all keys, and grows, since what length was asked for is not known."""


def given_cache(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of `forward`."""
    # an output of Transformers that is asked for the older name says that it is old
    return next((value for name, value in kwargs.items() if name in CACHE_NAMES and value is not None), None)


def cache_name(model: Any) -> str:
    """What a cache is called among the arguments of a model's `forward`."""
    takes = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in takes)


def check_cache_name(given: Mapping[str, Any], known: Container[str]) -> None:
    """Raise ValueError if `cache` is given where an older version of Transformers would take it for anything and forget it."""
    new, old = CACHE_NAMES
    if isinstance(given.get(new), Cache) and new not in known and old in known:
        raise ValueError(f"forward has no argument {new!r} in this version of Transformers, which calls it {old}")


def check_is_used(cache: Cache | None, generation_config: Any) -> None:
    """Raise ValueError if `generate` has a cache and would compute all tokens at every step, and have it take them each time."""
    if cache is not None and generation_config.use_cache is False:
        raise ValueError(
            f"generate was given a {type(cache).__name__}, and use_cache=False, as some models' configurations say: each pass would be "
            "over the whole text, and the cache would take all of it again; give use_cache=True, or no cache"
        )


def check_static(config: Any, implementation: str | None) -> None:
    """Raise ValueError if a static cache is asked for by name, and Transformers has none for a kind of the model's layers."""
    known = getattr(cache_utils, "STATIC_LAYER_TYPE_MAPPING", None)
    if known is None or "static" not in (implementation or ""):
        return
    missing = sorted(set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - set(known))
    if missing:
        raise ValueError(
            f"cache_implementation is {implementation!r}, and Transformers has no static cache for layers of kind {', '.join(missing)}, "
            f"which {config.model_type} has; leave it out, and a dynamic one is taken"
        )


def cached_tokens(cache: Cache | None) -> int:
    """Tokens in a cache. Those of a static one on a GPU are waited for."""
    return 0 if cache is None else int(cache.get_seq_length())


def over_slots(of_tokens: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor | None:
    """`[B, N]` of the tokens so far, as `[B, K]` over all slots of a cache whose graph of a step is to serve all steps.

    A streaming cache has no slots for them: it knows the padding behind a prompt itself, and needs none.

    Args:
        of_tokens: a mask or marks, zeros where nobody is yet.
        kwargs: arguments of `prepare_inputs_for_generation`. The prompt is computed without a graph, and others' caches grow.
    """
    cache = given_cache(kwargs)
    if of_tokens is None or cache is None or not cache.is_compileable or kwargs.get("is_first_iteration"):
        return of_tokens
    if isinstance(cache, StreamingCache):
        return None if cache.settled else of_tokens
    return pad(of_tokens, (0, max(0, cache.get_max_length() - of_tokens.shape[1])))


def new_tokens(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Ids or embeddings of the tokens of a pass, among the arguments of `forward`: `[B, Q, ...]`."""
    return next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)


def begin_streaming(
    config: SparseConfigMixin, kwargs: Mapping[str, Any], marks: Tensor | None
) -> dict[str, StreamingCache]:
    """Announce a pass to a `StreamingCache`, and give the argument by which attention gets to it.

    Args:
        config: of the model.
        kwargs: all arguments of `forward` by name. Models hand keys alone to their attention, and no cache.
        marks: of the new tokens.
    """
    cache, tokens = given_cache(kwargs), new_tokens(kwargs)
    if not isinstance(cache, StreamingCache) or tokens is None:
        return {}
    can_be_in_place = config._attn_implementation == "sparse"
    cache.begin(kwargs.get("attention_mask"), tokens.shape[0], tokens.shape[1], can_be_in_place, marks)
    if not torch.compiler.is_compiling():
        _warn_beyond(config, cache, cache.get_seq_length() + tokens.shape[1])
    return {"streaming_cache": cache}


def of_streaming(cache: Any) -> dict[str, Any]:
    """Arguments of attention that a `StreamingCache` has, for layers whose dense class keeps a pass's from them."""
    if not isinstance(cache, StreamingCache):
        return {}
    return {"streaming_cache": cache, "turned_sinks": cache.turned_sinks}


def _warn_beyond(config: SparseConfigMixin, cache: StreamingCache, tokens: int) -> None:
    """Say once where a stream has more tokens than the model has positions for."""
    most = None if config.positions is None else config.positions.reach_of(config)
    if most is None or tokens <= most:
        return
    if cache.turns:
        if cache.turns_from:
            logger.warning_once(
                f"the text behind a streaming cache has more tokens than {config.model_type} is configured for ({most}): from there on its "
                "first tokens are seen as far away as they are among the keys that are kept (positions='cache')"
            )
        return
    logger.warning_once(
        f"the text behind a StreamingCache has more tokens than {config.model_type} is configured for ({most}): the cache bounds "
        "memory and leaves tokens their true positions, beyond which few models answer well; give StreamingCache(config, "
        "positions='cache') where positions are rotary, begin anew with cache.reset(), or convert the dense checkpoint with a greater "
        "max_length"
    )


# an argument of passes: the pattern of each layer, in place of those of the configuration
LAYERS_SEE = "layers_see"


def decoding_patterns(model: Any, inputs: dict[str, Any], given: Mapping[str, Any], is_anew: bool) -> None:
    """Have a step of `generate` behind a prompt see what the dense model sees, if this call or the configuration wants it.

    Args:
        model: that generates.
        inputs: of `forward`, from which `decode` is taken.
        given: arguments of `prepare_inputs_for_generation`.
        is_anew: are all tokens computed again?
    """
    decode, cache = inputs.pop("decode", None) or model.config.decode, given_cache(inputs)
    if decode != "dense" or given.get("is_first_iteration") or is_anew or cache is None:
        return
    # the first pass of an assistant is not called so; no static cache assists, and its length would be waited for at every token
    if cache.is_compileable or cached_tokens(cache):
        inputs[LAYERS_SEE] = model.config.dense_patterns()


def lost_cache(model: Any, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> str | None:
    """What a cache is called that the dense class has thrown away, to compute all tokens again; None if it has not.

    Phi-3 does so where its angles change, and would go on with one that keeps all keys.

    Args:
        model: that generates.
        given: arguments of `prepare_inputs_for_generation`.
        inputs: what it gives to `forward`.
    """
    if given_cache(given) is None or given_cache(inputs) is not None:
        return None
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in takes), None)


def emptied_cache(model: Any, input_ids: Tensor, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> Cache:
    """The cache that was given, empty for the tokens that are computed again.

    Args:
        model, given, inputs: see `lost_cache`.
        input_ids: the text so far, without what only a cache holds.

    Raises:
        ValueError: tokens that only the cache holds would have to be computed again.
    """
    cache, tokens = given_cache(given), new_tokens(inputs)
    assert cache is not None
    held = cached_tokens(cache)
    if held:
        if tokens is None or tokens.shape[1] != text_length(input_ids, given):
            raise ValueError(
                f"{type(model).__name__} computes all tokens again at this length, where its positions are scaled anew, and {held} of "
                "them are only in the cache; pass the whole text to generate, not new tokens alone"
            )
        empty(cache)
    return cache


def empty(cache: Cache) -> None:
    """Have a cache begin anew, in its own objects."""
    cache.reset()
    for part in parts_of(cache):
        for layer in part.layers:
            if isinstance(layer, DynamicLayer):
                # older versions write zeros over the keys, and go on behind them
                layer.keys = layer.values = None
                layer.is_initialized = False


def parts_of(cache: Cache) -> tuple[Cache, ...]:
    """The cache of a decoder, and beside it that of what it reads of its encoder, if there is one."""
    return (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if isinstance(cache, EncoderDecoderCache)
        else (cache,)
    )


def text_length(input_ids: Tensor, kwargs: Mapping[str, Any]) -> int:
    """Tokens in the cache and new ones, of a step of `generate`.

    Args:
        input_ids: the text so far, without what only a cache holds; or a piece of it, where a prompt is taken in pieces.
        kwargs: further arguments of `prepare_inputs_for_generation`.
    """
    new, embeddings = kwargs.get("next_sequence_length"), kwargs.get("inputs_embeds")
    if new is None:
        new = input_ids.shape[1]
        if embeddings is not None and kwargs.get("is_first_iteration"):
            new = embeddings.shape[1]
    return cached_tokens(given_cache(kwargs)) + new


# arguments with an entry for each token so far
OF_TOKENS = ("attention_mask", "position_ids")


def first_tokens(kwargs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Arguments of the model in `generate` as they are for so many tokens of the text."""
    return {
        **kwargs,
        **{name: kwargs[name][:, :length] for name in OF_TOKENS if kwargs.get(name) is not None},
    }


def read_in_pieces(model: Any, input_ids: Tensor, size: int, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Read what a cache that holds tokens has not seen, but for the last piece; None where nothing was read.

    Older versions of Transformers read the whole prompt again behind such a cache.

    Args:
        model, kwargs: of `generate`.
        input_ids: the whole text, or new tokens alone, with a mask of the whole.
        size: tokens of a piece.

    Returns:
        The `input_ids` that are left: the whole text, of which only the cache tells what is new, or new tokens alone.
    """
    cache, mask = given_cache(kwargs), kwargs.get("attention_mask")
    held = cached_tokens(cache)
    if not held or kwargs.get("inputs_embeds") is not None:
        return None
    before = 0 if mask is None else mask.shape[1] - input_ids.shape[1]
    is_whole = not before
    while held + size < before + input_ids.shape[1]:
        end = held + size
        inputs = model.prepare_inputs_for_generation(
            input_ids[:, : end - before] if is_whole else input_ids[:, :size],
            next_sequence_length=size if is_whole else None,
            **first_tokens(kwargs, end),
        )
        model(**inputs, return_dict=True)
        held = end
        if not is_whole:
            input_ids, before = input_ids[:, size:], before + size
    return input_ids


def named_streaming(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> StreamingCache | None:
    """The streaming cache that `generate` shall go on with, as an argument of its steps; None if it shall take another.

    `cache_implementation="streaming"` asks for it. A draft is decoded behind one wherever it can be.

    Args:
        model: that generates.
        generation_config: of this call; what it says of a cache that is made here is taken from it.
        kwargs: of the model in `generate`; the cache is put among them.

    Raises:
        ValueError: the model cannot be decoded so; the message names the layer and its pattern.
    """
    if (kwargs.get("decode") or model.config.decode) == "dense":
        if generation_config.cache_implementation == STREAMING and kwargs.get("decode") is None:
            raise ValueError(why_not_streamed(model.config))
        if generation_config.cache_implementation == STREAMING:
            # what a folder says of all calls gives way to what this call says
            generation_config.cache_implementation = None
        return None
    is_named, given = generation_config.cache_implementation == STREAMING, given_cache(kwargs)
    drafts = bool(generation_config.is_assistant) and generation_config.cache_implementation is None
    if not is_named and not drafts or generation_config.use_cache is False:
        return None
    if given is not None:
        if is_named and model.generation_config.cache_implementation == STREAMING:
            # what a folder says of all calls gives way to what this call says
            generation_config.cache_implementation = None
        return None
    if drafts and (model.config.is_encoder_decoder or why_not_by_default(model.config)):
        return None
    cache, mask = StreamingCache(model.config, positions="auto"), kwargs.get("attention_mask")
    generation_config.cache_implementation = None
    if mask is not None and has_padding_in_the_way(mask):
        logger.warning_once(
            "attention_mask has padding behind or between a prompt's real tokens, which a streaming cache cannot tell from others: this "
            "call keeps all keys instead (DynamicCache); pad on the left"
        )
        return None
    kwargs[cache_name(model)] = cache
    return cache


def prepare_cache(cache: Cache | None, length: int, mask: Tensor | None) -> None:
    """Have a cache that `generate` goes on with hold a text of so many tokens, however the dense family would.

    Args:
        mask: of the prompt.

    Raises:
        ValueError: a static cache that has no room for it, or padding behind tokens that a streaming one cannot tell from others.
    """
    if isinstance(cache, StreamingCache):
        if mask is not None and mask.ndim == 2:
            # a prompt may come in pieces, without the mask of the whole
            padding_of(mask, mask.shape[1])
        cache.make_room(length)
    keep_all(cache, 0, length)
    most = room_of(cache)
    if most is not None and length > most:
        raise ValueError(
            f"the static cache holds {most} tokens, and this call may come to {length}: give a lower max_new_tokens, or a cache with a "
            "greater max_cache_len"
        )


def room_of(cache: Cache | None) -> int | None:
    """The tokens that a static cache holds at most; None of others."""
    if cache is None or isinstance(cache, (StreamingCache, EncoderDecoderCache)) or not cache.layers:
        return None
    layer = cache.layers[0]
    return layer.max_cache_len if isinstance(layer, StaticLayer) and not layer.is_sliding else None


def keep_all(cache: Cache | None, new: int, length: int = 0) -> None:
    """Have a cache of the dense family, which slides over a window that the pattern need not share, keep all keys.

    Args:
        cache: of Transformers; what it holds, it goes on holding.
        new: tokens that come next.
        length: tokens that a static one must hold in the end, 0 if that is not known.

    Raises:
        ValueError: keys were dropped already.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None or isinstance(cache, StreamingCache):
        return
    # masks are made for all layers by the length of one
    static = (layer for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding)
    longest = max((layer.max_cache_len for layer in static), default=0)
    for index, layer in enumerate(cache.layers):
        if hasattr(layer, OWN_STATE):
            # a family's own layer, which keeps the past in another form
            continue
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[index] = _filled(DynamicLayer(), layer)
        elif isinstance(layer, (StaticSlidingWindowLayer, GrownStaticLayer)):
            room, needed = layer.max_cache_len, length or int(layer.get_seq_length()) + new
            if layer.is_sliding or room < needed:
                # by hand, as many again: each time that it grows, all is copied
                wanted = max(needed, room if length else 2 * room, longest)
                cache.layers[index] = _filled(GrownStaticLayer(wanted), layer)


def _filled(new: DynamicLayer | StaticLayer, old: CacheLayerMixin) -> CacheLayerMixin:
    """A layer with all that another holds."""
    seen = int(old.get_seq_length())
    if not old.is_initialized or not seen:
        return new
    assert old.keys is not None and old.values is not None
    if old.keys.shape[2] < seen:
        raise ValueError(
            f"the cache slides over a window of the dense family and has dropped {seen - old.keys.shape[2]} of {seen} tokens, which "
            "a pattern may still see; make it without a window, DynamicCache(config=sparse_model.config), before the first pass"
        )
    new.update(old.keys[:, :, :seen], old.values[:, :, :seen])
    return new
