"""Passes of a decoder behind a cache, whatever its version of Transformers calls it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..models.hf.cache import CACHE_NAMES


def prefill(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Read `ids` `[1, n]` into a cache, by default the model's own: the logits of the last token `[1, 1, V]`, and the cache."""
    output = _call(model, ids, cache, last_alone(model))
    made = next(output[name] for name in CACHE_NAMES if output.get(name) is not None)
    return output.logits[:, -1:].float(), made


def go_on(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """The logits `[1, Q, V]` of new tokens `[1, Q]`, which the cache keeps."""
    return _call(model, ids, cache, {}).logits.float()


def _call(model: PreTrainedModel, ids: Tensor, cache: Cache | None, options: dict[str, Any]) -> Any:
    names = _arguments(model)
    given = {} if cache is None else {next(name for name in CACHE_NAMES if name in names): cache}
    return model(input_ids=ids, use_cache=True, **given, **options)


def last_alone(model: PreTrainedModel) -> dict[str, int]:
    """The argument by which a model makes the logits of its last token alone."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}


def _arguments(model: PreTrainedModel) -> Any:
    return inspect.signature(type(model).forward).parameters
