"""The sparse classes of a family that chooses its keys by content."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..hf.derive import subclass
from ..hf.register import Family, modeling_module, register_family
from .config import IndexedConfigMixin
from .entry import IndexedFamily


def derive_indexed(entry: IndexedFamily) -> Family:
    """Make the classes of an entry and register them. They become attributes of `entry.module`."""
    dense_config: type[PreTrainedConfig] = getattr(transformers, entry.config or f"{entry.prefix}Config")
    modeling = modeling_module(dense_config)
    config_class = subclass(
        entry.module,
        (IndexedConfigMixin, dense_config),
        model_type=entry.sparse_type,
        takes_patterns=entry.takes_patterns,
        documents_are_told_apart=entry.packs,
        own_caches=entry.own_caches,
        __doc__=f"[`{dense_config.__name__}`], whose layers choose keys in pieces. The family is described in {entry.source}.",
    )
    mixin, dense = _mixin(entry.indexer), getattr(modeling, entry.indexer_class or f"{entry.prefix}Indexer")
    more = {"turn": staticmethod(getattr(modeling, mixin.rotary))} if mixin.rotary else {}
    doc = f"[`{dense.__name__}`], scored in pieces."
    parts = {dense: subclass(entry.module, (mixin, dense), __doc__=doc, **more)}
    for name, mixin in entry.parts:
        dense = getattr(modeling, name)
        doc = f"[`{name}`], with keys that are chosen in pieces."
        parts[dense] = subclass(entry.module, (_mixin(mixin), dense), __doc__=doc)
    return register_family(
        config_class, entry.positions, parts=parts, of_heads={"_valid_auto_compile_criteria": _never}
    )


def _mixin(name: str) -> Any:
    """A class of this room, by `{file}.{class}`."""
    file, kind = name.split(".")
    return getattr(import_module(f".{file}", __package__), kind)


def _never(*_: Any) -> bool:
    """Are steps of `generate` compiled? A choice is made in pieces, which is no single graph."""
    return False
