"""What a decoder's cache holds of a text, read off a pass without memory (device "meta")."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..conversion.indexers import find_indexers
from ..models import Family, StreamingCache
from ..models.hf.cache import CACHE_NAMES


def cache_size(config: Any, family: Family, model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Bytes of what is kept of one row of so many tokens: of all of them, and with a streaming cache.

    Args:
        config: of a sparse decoder.
        model: the dense model of it, without memory.
    """
    dtype = config.dtype or torch.float32
    try:
        layers = [numbers * dtype.itemsize for numbers in _numbers(config, model, length)]
    except RuntimeError:
        # a family whose own code asks for numbers in the middle of a pass
        return {"dtype": None, "bytes_per_token": None, "bytes": None}
    # those that `topk(..., 'indexer')` gives a model, which the dense one has not
    whole = sum(layers) + length * dtype.itemsize * sum(one.width for one in find_indexers(family, config).values())
    found = {"dtype": str(dtype).removeprefix("torch."), "bytes_per_token": round(whole / length), "bytes": whole}
    try:
        cache = StreamingCache(config)
    except ValueError as error:
        return {**found, "streaming_bytes": None, "why_not_streaming": str(error)}
    slots = [length if layer.keeps_all else min(length, layer.ring.slots) for layer in cache.own_layers]
    streaming = sum(count * layer // length for count, layer in zip(slots, layers, strict=True))
    return {**found, "streaming_bytes": streaming}


def _numbers(config: Any, model: PreTrainedModel, length: int) -> list[int]:
    """How many numbers each layer of a cache that drops nothing has of one row."""
    # what asks for numbers is left out: ways to compute experts that look where tokens go, and the search for padding
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    model.config.pad_token_id = None
    cache = DynamicCache(config=config)
    names = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {next(name for name in CACHE_NAMES if name in names): cache}
    with torch.no_grad():
        model.eval()(input_ids=torch.zeros(1, length, dtype=torch.int64, device="meta"), use_cache=True, **given)
    return [_held(vars(layer)) for layer in cache.layers]


def _held(kept: Any) -> int:
    if isinstance(kept, torch.Tensor):
        return kept.numel() if kept.is_floating_point() else 0
    parts = kept.values() if isinstance(kept, dict) else kept if isinstance(kept, (list, tuple)) else ()
    return sum(map(_held, parts))
