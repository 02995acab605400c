"""The table of families, and how one enters it and the Auto classes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .mixin import COUNTERPARTS


@dataclass(frozen=True)
class Family:
    """A dense family of Transformers and its sparse counterpart.

    `position_tables` are the names (suffixes of state-dict keys) of learned position tables, `position_buffers` those of
    saved buffers with one entry per position; both are empty for rotary positions. The first `position_offset` rows of a
    table are not positions.
    """

    dense_type: str
    config_class: type[PreTrainedConfig]
    classes: tuple[type, ...]
    position_tables: tuple[str, ...] = ()
    position_buffers: tuple[str, ...] = ()
    position_offset: int = 0

    @property
    def sparse_type(self) -> str:
        return self.config_class.model_type

    @property
    def architectures(self) -> dict[str, str]:
        """Dense class name -> sparse class name."""
        return {dense_class(c).__name__: c.__name__ for c in self.classes}


# dense model type -> family
FAMILIES: dict[str, Family] = {}


def dense_class(sparse_class: type) -> type:
    """The class of Transformers that a sparse class derives from: the base after the mixin."""
    return sparse_class.__bases__[1]


def register_family(dense_type: str, config_class, heads: dict, **positions) -> Family:
    """Enter a family: `heads` maps sparse classes to the Auto class (or None) that finds them."""
    family = Family(dense_type, config_class, tuple(heads), **positions)
    AutoConfig.register(config_class.model_type, config_class)
    for sparse_class, auto_class in heads.items():
        COUNTERPARTS[dense_class(sparse_class)] = sparse_class
        auto_class.register(config_class, sparse_class)
        # Transformers enters a class here when it is first built, and `sparsify` builds none; the plain `dict` method takes
        # the same key in every version
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(sparse_class), sparse_class._can_record_outputs)
    FAMILIES[dense_type] = family
    return family


def family_of(model_type: str) -> Family:
    """The family of a dense or sparse model type.

    Raises:
        ValueError: a type that has no sparse counterpart; the message lists those that have.
    """
    for family in FAMILIES.values():
        if model_type in (family.dense_type, family.sparse_type):
            return family
    raise ValueError(
        f"model type {model_type!r} has no sparse counterpart; supported are {', '.join(sorted(FAMILIES))}"
    )
