"""Transformers' caches under a pattern: sliding ones are made to keep all keys, streaming ones hear of padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from .streaming_cache import StreamingCache

# what a cache is called among the arguments of `forward`, newest name first
CACHE_NAMES = ("cache", "past_key_values")


def given_cache(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of `forward`."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def begin_streaming(kwargs: Mapping[str, Any]) -> dict[str, StreamingCache]:
    """Announce a pass to a `StreamingCache`, and give the argument by which attention gets to it.

    Args:
        kwargs: all arguments of `forward` by name. Models hand keys alone to their attention, and no cache.
    """
    cache = next((kwargs[name] for name in CACHE_NAMES if isinstance(kwargs.get(name), StreamingCache)), None)
    tokens = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if cache is None or tokens is None:
        return {}
    cache.begin(kwargs.get("attention_mask"), tokens.shape[1])
    return {"streaming_cache": cache}


def makes_sliding_cache(config: PreTrainedConfig, use_cache: bool | None) -> bool:
    """Would the dense class make a cache that drops keys, of a window that the pattern need not share?"""
    wanted = getattr(config, "use_cache", False) if use_cache is None else use_cache
    return bool(wanted) and getattr(config, "sliding_window", None) is not None


def keep_all(cache: DynamicCache | StaticCache, max_length: int) -> None:
    """Have a cache that would drop keys keep them all. It begins anew: `generate` has the whole text to fill it from."""
    if any(isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)) for layer in cache.layers):
        is_static = isinstance(cache, StaticCache)
        cache.layers[:] = [StaticLayer(max_length) if is_static else DynamicLayer() for _ in cache.layers]
