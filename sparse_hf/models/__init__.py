"""Sparse models: derived from Transformers' own classes, registered with its Auto classes.

A family's configuration and heads are here under their names, and derived when one of them is first asked for.
"""

from importlib import import_module

from ..registry import ENTRIES, MODELS, entry_of_class
from .bigbird.block_sparse import transformers_random_blocks
from .hf import attention_interface  # registers our attention with Transformers
from .hf.config import SparseConfigMixin
from .hf.layer_spec import parse_layers
from .hf.model_mixin import SparseMixin
from .hf.positions import Positions
from .hf.register import FAMILIES, Family, dense_class, family_of, register_family
from .hf.streaming_cache import StreamingCache
from .sparsify import sparsify


def __getattr__(name: str):
    if name == "__all__":
        return [*MODELS, *(name for entry in ENTRIES for name in import_module(entry.module_name).__all__)]
    entry = entry_of_class(name)
    if entry is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(entry.module_name), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
