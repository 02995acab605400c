"""Sparse models: derived from Transformers' own classes, registered with its Auto classes.

What is public is imported, and a family derived, when it is first asked for; `__init__.pyi` lists the names.
"""

from importlib import import_module

from .. import registry
from . import dense_families  # enters the families
from .names import PUBLIC


def __getattr__(name: str):
    if name == "__all__":
        return _public()
    if name in PUBLIC:
        return getattr(import_module(f".{PUBLIC[name]}", __name__), name)
    entry = registry.entry_of_class(name)
    # of two families, one may be called as the other begins
    if entry is not None and hasattr(import_module(entry.module), name):
        return registry.sparse_class(name)
    if not name.startswith("Sparse"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".derived_families", __name__), name)


def __dir__() -> list[str]:
    return sorted(_public())


def _public() -> list[str]:
    families = import_module(".hf.register", __name__).FAMILIES
    return [*PUBLIC, *(name for family in families.values() if family.verified for name in family.names)]
