"""Passes of a decoder behind a cache, whatever its version of Transformers calls it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..models.hf.cache import CACHE_NAMES


@dataclass(frozen=True, eq=False)
class Padding:
    """Rows with padding on their left, where `mask` `[B, n]` is zero.

    The tokens that count have positions below `most`; others behind them, which nobody looks at, have none beyond.
    """

    mask: Tensor
    most: int

    @property
    def positions(self) -> Tensor:
        """`[B, n]`, from the first token of a row on."""
        return (self.mask.cumsum(1) - 1).clamp(0, self.most - 1)

    def longer(self, count: int) -> Padding:
        """With so many tokens more in each row."""
        return replace(self, mask=torch.cat((self.mask, self.mask.new_ones(len(self.mask), count)), 1))


def prefill(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, padding: Padding | None = None, last: int = 1
) -> tuple[Tensor, Cache]:
    """Read `ids` `[B, n]` into a cache, by default the model's own: the logits of the last tokens `[B, last, V]`, and the cache."""
    output = _call(model, ids, cache, {**last_alone(model, last), **_of_padding(model, ids, padding)})
    made = next(output[name] for name in CACHE_NAMES if output.get(name) is not None)
    return output.logits[:, -last:].float(), made


def go_on(model: PreTrainedModel, ids: Tensor, cache: Cache, padding: Padding | None = None) -> Tensor:
    """The logits `[B, Q, V]` of new tokens `[B, Q]`, which the cache keeps; `padding` is of all tokens so far, theirs included."""
    return _call(model, ids, cache, _of_padding(model, ids, padding)).logits.float()


def _call(model: PreTrainedModel, ids: Tensor, cache: Cache | None, options: dict[str, Any]) -> Any:
    names = _arguments(model)
    given = {} if cache is None else {next(name for name in CACHE_NAMES if name in names): cache}
    return model(input_ids=ids, use_cache=True, **given, **options)


def last_alone(model: PreTrainedModel, count: int = 1) -> dict[str, int]:
    """The argument by which a model makes the logits of its last tokens alone."""
    return {"logits_to_keep": count} if "logits_to_keep" in _arguments(model) else {}


def _of_padding(model: PreTrainedModel, ids: Tensor, padding: Padding | None) -> dict[str, Tensor]:
    """The arguments that tell new tokens `ids` `[B, Q]` from padding before them."""
    if padding is None:
        return {}
    positions = padding.positions[:, -ids.shape[1] :]
    return {
        "attention_mask": padding.mask,
        **({"position_ids": positions} if "position_ids" in _arguments(model) else {}),
    }


def _arguments(model: PreTrainedModel) -> Any:
    return inspect.signature(type(model).forward).parameters
