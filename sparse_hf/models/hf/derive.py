"""The sparse classes of a row of the table of families."""

from __future__ import annotations

from importlib import import_module
from types import new_class

import transformers
from transformers import PreTrainedConfig

from .config import SparseConfigMixin
from .dense_family import DenseFamily
from .encoder_decoder import SparseEncoderDecoderConfigMixin
from .model_mixin import SparseEncoderMixin
from .register import Family, modeling_module, register_family


def derive_dense(row: DenseFamily) -> Family:
    """Make the classes of a row and register them. They become attributes of `row.module`."""
    dense_config: type[PreTrainedConfig] = getattr(transformers, row.config or f"{row.prefix}Config")
    mixin = SparseEncoderDecoderConfigMixin if row.encoder else SparseConfigMixin
    config_class = _subclass(
        row,
        (mixin, dense_config),
        model_type=row.sparse_type,
        __doc__=f"[`{dense_config.__name__}`] with a pattern for each layer. The family is described in {row.source}.",
    )
    parts = {}
    if row.encoder:
        dense_encoder = getattr(modeling_module(dense_config), row.encoder)
        parts[dense_encoder] = _subclass(
            row,
            (SparseEncoderMixin, dense_encoder),
            __annotations__={"config": config_class},
            __doc__=f"[`{row.encoder}`] with sparse attention by its configuration's patterns.",
        )
    return register_family(config_class, row.positions, parts=parts)


def _subclass(row: DenseFamily, bases: tuple[type, type], **content) -> type:
    """`Sparse{dense}`, derived from a mixin and a dense class, as an attribute of the row's module."""
    name = f"Sparse{bases[1].__name__}"
    made = new_class(name, bases, exec_body=lambda body: body.update(content, __module__=row.module))
    setattr(import_module(row.module), name, made)
    return made
