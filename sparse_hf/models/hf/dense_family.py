"""Entries of the table of families: what there is to say of a family before anything of it is imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from ...registry import Entry
from .positions import Positions


@dataclass(frozen=True, kw_only=True)
class DenseFamily(Entry):
    """A family whose attention is dense in Transformers, and which differs from others by what stands here alone.

    Its classes are attributes of the table's module.

    Attributes:
        prefix: what Transformers' classes begin with ("Llama").
        dense_type: the model type in Transformers.
        positions: how the family knows where a token stands.
        source: where it is described.
        config: the configuration class, if it is not called `{prefix}Config`.
        encoder: of encoder-decoders, the class of the encoder, which finds marks by itself.
        joins: the class of attention modules that project their states as BERT's do.
    """

    prefix: str
    dense_type: str
    positions: Positions
    source: str
    config: str = ""
    encoder: str = ""
    joins: str = ""
    module: str = "sparse_hf.models.dense_families"

    @property
    def sparse_type(self) -> str:
        return f"sparse_{self.dense_type}".replace("-", "_")

    def derive(self) -> None:
        # by name, because it imports torch and Transformers
        import_module(".derive", __package__).derive_dense(self)


@dataclass(frozen=True)
class OtherFamily(Entry):
    """A family with code of its own: a module, which registers the family when it is imported."""

    module: str
    prefix: str
    dense_type: str
    sparse_type: str

    def derive(self) -> None:
        import_module(self.module)
