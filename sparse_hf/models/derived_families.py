"""The classes of families that are no entry of the table, made when one of them is first asked for."""

from __future__ import annotations

from .derived.names import derive_class


def __getattr__(name: str):
    if name.startswith("Sparse"):
        derive_class(name)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
