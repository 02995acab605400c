"""Sparse models inside others: what a model of Transformers saves must name the pattern of a sparse one that it holds.

A configuration names it where the sparse model's own is that configuration or a part of it. A user's model around a
sparse one, or a model of several whose text model was made sparse, has another, and what it saves loads as dense.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .config import SparseConfigMixin

logger = logging.get_logger(__name__)

_SAVES = inspect.unwrap(PreTrainedModel.save_pretrained).__code__


def warn_of_lost_pattern(model: Any, prefix: str) -> None:
    """Warn if `model` is being saved by another that does not name its pattern.

    Transformers asks a model that it saves for its weights, which asks the models inside, and tells them not for what. So the
    saving model is found among the callers.

    Args:
        model: a sparse model that is asked for its weights.
        prefix: what their names begin with.
    """
    saved = _saved_model()
    if saved is None or any(_names(config, model.config) for config in _configurations(saved.config)):
        return
    name, parts = prefix.rstrip("."), getattr(type(saved.config), "sub_configs", None)
    within = next((part for part in parts or () if getattr(saved.config, part, None) is not None), None)
    remedy = f"save {name!r} by itself, or apply sparse_hf.sparsify again after loading"
    if within is not None:
        remedy = f"set its configuration first, as in model.config.{within} = model.{name}.config"
    logger.warning(
        f"what {type(saved).__name__} saves says nothing of the pattern of {name!r}, a sparse {type(model).__name__} within it, and "
        f"loads as a dense model: {remedy}"
    )


def _saved_model() -> PreTrainedModel | None:
    """The outermost model that is being saved by `save_pretrained`; None if none is."""
    frame, found = sys._getframe(2), None
    while frame is not None:
        if frame.f_code is _SAVES:
            found = frame.f_locals.get("model_to_save", frame.f_locals.get("self"))
        frame = frame.f_back
    return found


def _configurations(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration, and those within it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configurations(value)


def _names(config: PreTrainedConfig, sparse: PreTrainedConfig) -> bool:
    """Does a configuration name the pattern of a sparse one?"""
    if config is sparse:
        return True
    is_alike = isinstance(config, SparseConfigMixin) and config.model_type == sparse.model_type
    return is_alike and vars(config).get("sparse_attention") == vars(sparse).get("sparse_attention")
