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


class ReadsParts:
    """Of a configuration: it reads those within it as what they were saved as."""


class SavedByOthers:
    """Of a sparse model: it warns where another one that holds it is saved without its pattern."""

    config: SparseConfigMixin

    def state_dict(self, *args, **kwargs):
        """As torch's. Transformers asks a model that it saves for its weights, which asks the models inside."""
        prefix = kwargs.get("prefix") or (args[1] if len(args) > 1 else "")
        saved = _saved_model() if prefix else None
        if saved is not None:
            _warn_of_lost_pattern(self, prefix.rstrip("."), saved)
        return super().state_dict(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] - of a mixin's model


def _saved_model() -> PreTrainedModel | None:
    """The model of which `save_pretrained` asks the weights, found among the callers; None where nobody saves.

    Nor where a sparse model is in between, which says all that there is to say.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _SAVES:
        if frame.f_code is _ASKED and frame.f_locals.get("prefix"):
            return None
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("model_to_save", frame.f_locals.get("self"))


_SAVES, _ASKED = inspect.unwrap(PreTrainedModel.save_pretrained).__code__, SavedByOthers.state_dict.__code__


def _warn_of_lost_pattern(model: Any, name: str, saved: PreTrainedModel) -> None:
    """Warn if the configuration of the model that is saved names no such pattern as that of the sparse one within it."""
    if any(_names(config, model.config) for config in _configurations(saved.config)):
        return
    dense_type = type(model.config).__bases__[1].model_type
    alike = [key for key, value in vars(saved.config).items() if getattr(value, "model_type", None) == dense_type]
    remedy = f"save {name!r} by itself, or apply sparse_hf.sparsify again after loading"
    if any(config is model.config for config in _configurations(saved.config, read_as_sparse=False)):
        remedy = f"its configuration reads that part as a dense one; make {type(saved).__name__} sparse, sparse_hf.sparsify(model, pattern)"
    elif alike:
        part = name if name in alike else alike[0]
        remedy = f"set model.config.{part} = model.{name}.config before saving"
    logger.warning(
        f"what {type(saved).__name__} saves says nothing of the pattern of {name!r}, a sparse {type(model).__name__} within it, and "
        f"loads as a dense model: {remedy}"
    )


def _configurations(config: PreTrainedConfig, read_as_sparse: bool = True) -> Iterator[PreTrainedConfig]:
    """A configuration, and those within it.

    Args:
        read_as_sparse: leave those out that are read as a dense class's whatever they say.
    """
    yield config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and not (read_as_sparse and _reads_as_dense(config, name, value)):
            yield from _configurations(value, read_as_sparse)


def _reads_as_dense(config: PreTrainedConfig, name: str, part: PreTrainedConfig) -> bool:
    """Does a configuration have one class for a part, and not the one that the part has now?"""
    known = config.sub_configs.get(name)
    is_one = isinstance(known, type) and issubclass(known, PreTrainedConfig)
    return is_one and not isinstance(config, ReadsParts) and type(part) is not known


def _names(config: PreTrainedConfig, sparse: PreTrainedConfig) -> bool:
    """Does a configuration name the pattern of a sparse one?"""
    if config is sparse:
        return True
    if not isinstance(config, SparseConfigMixin) or config.model_type != sparse.model_type:
        return False
    # the names of layers were fitted to those that there are, for as long as saving takes
    one, other = (vars(c).get("sparse_attention") or {} for c in (config, sparse))
    return one.get("patterns") == other.get("patterns")
