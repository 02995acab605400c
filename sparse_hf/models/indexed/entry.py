"""Entries of the table of families that choose their keys by content. Nothing here imports torch or Transformers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from ..hf.dense_family import DenseFamily


@dataclass(frozen=True, kw_only=True)
class IndexedFamily(DenseFamily):
    """A family whose layers have an indexer, which chooses the keys of each query.

    Attributes:
        indexer: how it chooses, `{file of this room}.{class}`.
        indexer_class: the dense class of the indexer, if it is not called `{prefix}Indexer`.
        parts: further modules that do something in another way, as pairs of a dense class and what is put before it, in the
            same form.
        takes_patterns: can a pattern limit the choice?
        packs: are packed documents told apart?
        own_caches: has it caches of its own, which drop keys that no layer sees again?
    """

    indexer: str
    indexer_class: str = ""
    parts: tuple[tuple[str, str], ...] = ()
    takes_patterns: bool = True
    packs: bool = True
    own_caches: bool = False

    def derive(self) -> None:
        # by name, because it imports torch and Transformers
        import_module(".derive", __package__).derive_indexed(self)


def is_there(folder: str) -> bool:
    """Does this version of Transformers have a folder of models? It is not imported to find out."""
    return any((place / folder).is_dir() for place in _models())


@cache
def _models() -> tuple[Path, ...]:
    spec = importlib.util.find_spec("transformers")
    return tuple(Path(place) / "models" for place in spec.submodule_search_locations or ()) if spec else ()
