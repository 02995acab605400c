"""Sparse models: derived from Transformers' own classes, registered with its Auto classes.

What is public is imported, and a family derived, when it is first asked for; `__init__.pyi` lists the names.
"""

from importlib import import_module

from .. import registry
from . import dense_families  # enters the families

# public names beside the classes of the families -> the module that defines them
PUBLIC = {
    "FAMILIES": "hf.register",
    "Family": "hf.register",
    "Positions": "hf.positions",
    "SparseConfigMixin": "hf.config",
    "SparseMixin": "hf.model_mixin",
    "StreamingCache": "hf.streaming_cache",
    "dense_class": "hf.register",
    "family_of": "hf.register",
    "parse_layers": "hf.layer_spec",
    "register_family": "hf.register",
    "sparsify": "hf.sparsify",
    "transformers_random_blocks": "bigbird.block_sparse",
}


def __getattr__(name: str):
    if name == "__all__":
        families = import_module(".hf.register", __name__).FAMILIES
        return [*PUBLIC, *(name for family in families.values() for name in family.names)]
    if name in PUBLIC:
        return getattr(import_module(f".{PUBLIC[name]}", __name__), name)
    if registry.entry_of_class(name) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return registry.sparse_class(name)


def __dir__() -> list[str]:
    return sorted(__getattr__("__all__"))
