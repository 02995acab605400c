"""Passes of a decoder behind a cache, whatever its version of Transformers calls it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..models.hf.cache import CACHE_NAMES


def prefill(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Read `ids` `[B, n]` into a cache, by default the model's own: the logits of the last token `[B, 1, V]`, and the cache.

    `mask` `[B, n]` is zero at padding, which stands on the left.
    """
    output = _call(model, ids, cache, {**last_alone(model), **_of_padding(model, ids, mask)})
    made = next(output[name] for name in CACHE_NAMES if output.get(name) is not None)
    return output.logits[:, -1:].float(), made


def go_on(model: PreTrainedModel, ids: Tensor, cache: Cache, mask: Tensor | None = None) -> Tensor:
    """The logits `[B, Q, V]` of new tokens `[B, Q]`, which the cache keeps; `mask` is of all tokens so far, theirs included."""
    return _call(model, ids, cache, _of_padding(model, ids, mask)).logits.float()


def _call(model: PreTrainedModel, ids: Tensor, cache: Cache | None, options: dict[str, Any]) -> Any:
    names = _arguments(model)
    given = {} if cache is None else {next(name for name in CACHE_NAMES if name in names): cache}
    return model(input_ids=ids, use_cache=True, **given, **options)


def last_alone(model: PreTrainedModel) -> dict[str, int]:
    """The argument by which a model makes the logits of its last token alone."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}


def _of_padding(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """The arguments that tell new tokens `ids` `[B, Q]` from padding before them: positions count from the first token of a row."""
    if mask is None:
        return {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {"attention_mask": mask, **({"position_ids": positions} if "position_ids" in _arguments(model) else {})}


def _arguments(model: PreTrainedModel) -> Any:
    return inspect.signature(type(model).forward).parameters
