"""The sparse classes of a family that chooses its keys by content."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..hf.derive import subclass
from ..hf.register import Family, modeling_module, register_family
from . import dsa
from .config import IndexedConfigMixin
from .entry import IndexedFamily


def derive_indexed(entry: IndexedFamily) -> Family:
    """Make the classes of an entry and register them. They become attributes of `entry.module`."""
    dense_config: type[PreTrainedConfig] = getattr(transformers, entry.config or f"{entry.prefix}Config")
    config_class = subclass(
        entry.module,
        (IndexedConfigMixin, dense_config),
        model_type=entry.sparse_type,
        __doc__=f"[`{dense_config.__name__}`], whose layers choose keys in pieces. The family is described in {entry.source}.",
    )
    modeling, mixin = modeling_module(dense_config), getattr(dsa, entry.indexer)
    dense = getattr(modeling, entry.indexer_class or f"{entry.prefix}Indexer")
    indexer = subclass(
        entry.module,
        (mixin, dense),
        turn=staticmethod(getattr(modeling, mixin.rotary)),
        __doc__=f"[`{dense.__name__}`], scored in pieces.",
    )
    return register_family(
        config_class, entry.positions, parts={dense: indexer}, of_heads={"_valid_auto_compile_criteria": _never}
    )


def _never(*_: Any) -> bool:
    """Are steps of `generate` compiled? A choice is made in pieces, which is no single graph."""
    return False
