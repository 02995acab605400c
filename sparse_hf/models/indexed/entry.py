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
        attention: what its attention module does in another way, if anything, in the same form.
        attention_class: the dense class of that.
        takes_patterns: can a pattern limit the choice?
        packs: are packed documents told apart?
    """

    indexer: str
    indexer_class: str = ""
    attention: str = ""
    attention_class: str = ""
    takes_patterns: bool = True
    packs: bool = True

    def derive(self) -> None:
        # by name, because it imports torch and Transformers
        import_module(".derive", __package__).derive_indexed(self)


def is_there(folder: str) -> bool:
    """Does this version of Transformers have a folder of models? It is not imported to find out."""
    return any((place / folder).is_dir() for place in _models())


@cache
def _models() -> tuple[Path, ...]:
    spec = importlib.util.find_spec("transformers")
    return tuple(Path(place) / "models" for place in (spec.submodule_search_locations or ()) if spec) if spec else ()
