"""The sparse classes of a family that is an entry of the table."""

from __future__ import annotations

from importlib import import_module
from types import new_class
from typing import Any

import transformers
from transformers import PreTrainedConfig

from .config import SparseConfigMixin
from .dense_family import DenseFamily
from .encoder_decoder import SparseEncoderDecoderConfigMixin
from .joined import JoinedProjections
from .model_mixin import SparseEncoderMixin
from .register import Family, modeling_module, register_family


def derive_dense(entry: DenseFamily) -> Family:
    """Make the classes of an entry and register them. They become attributes of `entry.module`."""
    dense_config: type[PreTrainedConfig] = getattr(transformers, entry.config or f"{entry.prefix}Config")
    mixin = SparseEncoderDecoderConfigMixin if entry.encoder else SparseConfigMixin
    config_class = subclass(
        entry.module,
        (mixin, dense_config),
        model_type=entry.sparse_type,
        __doc__=f"[`{dense_config.__name__}`] with a pattern for each layer. The family is described in {entry.source}.",
    )
    parts = {}
    if entry.encoder:
        dense_encoder = getattr(modeling_module(dense_config), entry.encoder)
        parts[dense_encoder] = subclass(
            entry.module,
            (SparseEncoderMixin, dense_encoder),
            __annotations__={"config": config_class},
            __doc__=f"[`{entry.encoder}`] with sparse attention by its configuration's patterns.",
        )
    if entry.joins:
        dense_attention = getattr(modeling_module(dense_config), entry.joins)
        parts[dense_attention] = subclass(
            entry.module,
            (JoinedProjections, dense_attention),
            __doc__=f"[`{entry.joins}`], whose projections are one product where the host is what takes time.",
        )
    return register_family(config_class, entry.positions, parts=parts)


def subclass(module: str, bases: tuple[type, type], **content: Any) -> Any:
    """`Sparse{dense}`, derived from a mixin and a dense class, as an attribute of a module."""
    name = f"Sparse{bases[1].__name__}"
    made = new_class(name, bases, exec_body=lambda body: body.update(content, __module__=module))
    setattr(import_module(module), name, made)
    return made
