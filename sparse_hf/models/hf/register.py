"""The table of families, and how one enters it and the Auto classes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ...registry import ENTRIES, LazyTable
from ..derived.entry import configurations, has_layers
from ..derived.off_interface import OFF_THE_INTERFACE
from . import attention_interface  # noqa: F401  # registers our attention with Transformers
from .auto_classes import auto_classes, known_names
from .config import SparseConfigMixin
from .counterparts import COUNTERPARTS
from .model_mixin import SparseGenerationMixin, SparseMixin
from .name_tables import enter_names
from .positions import Positions
from .remote_code import RemoteCode
from .saving import ReadsParts

# heads whose labels are not one class per token or per row, so that Trainer cannot count them: it averages their loss
UNCOUNTED = ("ForQuestionAnswering", "ForPreTraining")


@dataclass(frozen=True)
class Family:
    """A dense family of Transformers and its sparse counterpart.

    Examples:
        >>> family = family_of("bert")
        >>> family.sparse_type, family.verified, family.positions.scheme
        ('sparse_bert', True, 'learned')
    """

    dense_type: str
    config_class: type[SparseConfigMixin]
    classes: tuple[type[PreTrainedModel], ...]
    positions: Positions
    # is it an entry of the table, or of a user, rather than derived when it was met?
    verified: bool = True

    @property
    def sparse_type(self) -> str:
        return self.config_class.model_type

    @property
    def implies_pattern(self) -> bool:
        """Is the family of Transformers sparse by itself, so that no pattern need be given?"""
        return self.config_class.implies_pattern

    @property
    def is_composed(self) -> bool:
        """Has it no layers of its own, and a text among the models within it?"""
        return not issubclass(self.config_class, SparseConfigMixin)

    @property
    def dense_config_class(self) -> type[PreTrainedConfig]:
        return self.config_class.__bases__[1]

    @property
    def names(self) -> list[str]:
        """Names of the sparse configuration and classes."""
        return [self.config_class.__name__, *(c.__name__ for c in self.classes)]

    @property
    def architectures(self) -> dict[str, str]:
        """Dense class name -> sparse class name."""
        return {dense_class(c).__name__: c.__name__ for c in self.classes}


# dense model type -> family, which is derived when it is first looked at
FAMILIES = LazyTable({entry.dense_type: entry for entry in ENTRIES}, "dense_type")


def dense_class(sparse_class: type) -> type[PreTrainedModel]:
    """The class of Transformers that a sparse class derives from: the base after the mixin.

    Examples:
        >>> from sparse_hf import SparseBertModel
        >>> dense_class(SparseBertModel).__name__
        'BertModel'
    """
    return sparse_class.__bases__[1]


def register_family(
    config_class: type[SparseConfigMixin],
    positions: Positions,
    parts: Mapping[type, type] | None = None,
    heads: Iterable[type[PreTrainedModel]] = (),
    of_heads: Mapping[str, Any] | None = None,
    verified: bool = True,
) -> Family:
    """Make the sparse class of every head of a family and register it with the Auto classes that find the dense one.

    The classes appear in the module of `config_class`, named as in Transformers with `Sparse` in front; a class that the
    module defines itself under such a name is taken as it is.

    Args:
        config_class: `class SparseXConfig(SparseConfigMixin, XConfig)`.
        positions: the scheme of its positions.
        parts: modules inside the model that need a counterpart of their own, dense class -> sparse class.
        heads: dense classes that no Auto class knows.
        of_heads: class attributes of every sparse class that is derived here.
        verified: is the family tested by name, and not derived when it was met?

    Examples:
        >>> from transformers import NystromformerConfig
        >>> class SparseMineConfig(SparseConfigMixin, NystromformerConfig):
        ...     model_type = "sparse_mine"
        >>> register_family(SparseMineConfig, Positions("learned", limit="max_position_embeddings")).sparse_type
        'sparse_mine'
    """
    config_class.positions = positions
    dense_config = config_class.__bases__[1]
    AutoConfig.register(config_class.model_type, config_class)
    autos_of = _heads(dense_config)
    if not verified:
        # two types may share a class, which is the one's whose configuration it takes
        autos_of = {dense: autos for dense, autos in autos_of.items() if dense.config_class is dense_config}
    autos_of |= {dense: [] for dense in heads if dense not in autos_of}
    classes = tuple(_counterpart(dense, config_class, of_heads or {}) for dense in autos_of)
    COUNTERPARTS.update(zip(autos_of, classes, strict=True))
    COUNTERPARTS.update(parts or {})
    _register_heads(config_class, autos_of)
    _enter_recorders((*classes, *(parts or {}).values()))
    _rename_alike(dense_config.model_type, config_class.model_type, classes)
    family = Family(dense_config.model_type, config_class, classes, positions, verified)
    config_class.remote_code = RemoteCode(
        family.dense_type, family.sparse_type, config_class.__name__, family.architectures
    )
    FAMILIES[family.dense_type] = family
    enter_names(family.dense_type, config_class, {dense_class(c): c for c in classes} | dict(parts or {}))
    return family


def _counterpart(
    dense: type[PreTrainedModel], config_class: type[SparseConfigMixin], more: Mapping[str, Any]
) -> type[PreTrainedModel]:
    """The sparse class of a head: the one that the family's module defines, or a derived one, which it gets."""
    module = sys.modules[config_class.__module__]
    sparse = vars(module).get(f"Sparse{dense.__name__}") or _derive(dense, config_class, more)
    setattr(module, sparse.__name__, sparse)
    return sparse


def _register_heads(
    config_class: type[SparseConfigMixin], autos_of: Mapping[type, Sequence[type[_BaseAutoModelClass]]]
) -> None:
    """Have each Auto class find the counterparts of the dense classes that it knows."""
    for auto in dict.fromkeys(auto for autos in autos_of.values() for auto in autos):
        known = tuple(COUNTERPARTS[dense] for dense, autos in autos_of.items() if auto in autos)
        auto.register(config_class, known[0])
        if len(known) > 1:
            # as in Transformers' own table, where the configuration's `architectures` tell which
            mapping: Any = auto._model_mapping
            mapping.register(config_class, known, exist_ok=True)


def _enter_recorders(classes: Iterable[type]) -> None:
    """Enter classes in the table of what Transformers can record of a model: states, weights of attention.

    Transformers enters a class when it is first built, and `sparsify` builds none.
    """
    for sparse in classes:
        if issubclass(sparse, PreTrainedModel):
            # the plain `dict` method takes the same key in every version
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(sparse), sparse._can_record_outputs)


def _rename_alike(dense_type: str, sparse_type: str, classes: Iterable[type]) -> None:
    """Have the tensors of a sparse family's checkpoints renamed and merged as those of the dense family are."""
    for dense, sparse in ((dense_type, sparse_type), *((dense_class(c).__name__, c.__name__) for c in classes)):
        mapping = get_checkpoint_conversion_mapping(dense)
        if mapping is not None:
            register_checkpoint_conversion_mapping(sparse, mapping)


def modeling_module(dense_config: type) -> ModuleType:
    """The module of Transformers with the model classes of a dense configuration."""
    return importlib.import_module(dense_config.__module__.replace(".configuration_", ".modeling_"))


def _heads(dense_config: type[PreTrainedConfig]) -> dict[type[PreTrainedModel], list[type[_BaseAutoModelClass]]]:
    """Every model class that an Auto class knows for a dense configuration -> those Auto classes."""
    module = modeling_module(dense_config)
    found: dict[type[PreTrainedModel], list[type[_BaseAutoModelClass]]] = {}
    for auto in auto_classes():
        for name in known_names(auto, dense_config.model_type):
            # a family of another module may borrow the configuration
            if hasattr(module, name):
                found.setdefault(getattr(module, name), []).append(auto)
    return found


def _derive(
    dense: type[PreTrainedModel], config_class: type[SparseConfigMixin], more: Mapping[str, Any]
) -> type[PreTrainedModel]:
    mixin = SparseGenerationMixin if issubclass(dense, GenerationMixin) else SparseMixin
    content: dict[str, Any] = {
        "__module__": config_class.__module__,
        "__doc__": f"[`{dense.__name__}`] with sparse attention by its configuration's patterns.",
        "__annotations__": {"config": config_class},
        "config_class": config_class,
        **more,
    }
    if dense.__name__.endswith(UNCOUNTED):
        content["accepts_loss_kwargs"] = False
    made: Any = type(f"Sparse{dense.__name__}", (mixin, dense), content)
    return made


def find_family(model_type: str) -> Family | None:
    """The family of a dense or sparse model type; None if it has no sparse counterpart."""
    if model_type in CONFIG_MAPPING and issubclass(CONFIG_MAPPING[model_type], SparseConfigMixin):
        model_type = CONFIG_MAPPING[model_type].__bases__[1].model_type
    found = FAMILIES.get(model_type)
    return None if found is None or found.is_composed else found


def find_composed(model_type: str) -> Family | None:
    """The family of a dense or sparse model type of several models, one of which writes text; None if it is none."""
    if model_type in CONFIG_MAPPING and issubclass(CONFIG_MAPPING[model_type], ReadsParts):
        # a sparse one
        model_type = CONFIG_MAPPING[model_type].__bases__[1].model_type
    found = FAMILIES.get(model_type)
    if found is None or not found.is_composed:
        return None
    return found if any(issubclass(c, GenerationMixin) for c in found.classes) else None


def family_of(model_type: str) -> Family:
    """The family of a dense or sparse model type.

    Raises:
        ValueError: a type that has no sparse counterpart; the message says why and lists those that have.

    Examples:
        >>> family_of("llama").config_class.__name__, family_of("sparse_llama").dense_type
        ('SparseLlamaConfig', 'llama')
    """
    family = find_family(model_type)
    if family is None:
        names = ", ".join(sorted(entry.dense_type for entry in ENTRIES))
        supported = f"supported are {names}, and those that `sparse-hf list` names as derived"
        raise ValueError(f"model type {model_type!r} has no sparse counterpart: {_reason(model_type)}; {supported}")
    return family


def _reason(model_type: str) -> str:
    """Why a model type is not in the table, read off Transformers' own source."""
    if model_type not in CONFIG_MAPPING:
        return "Transformers does not know it either"
    if model_type not in configurations():
        return "its classes are none that Transformers ships, and only those are tried: have its layers call sparse_hf.sparse_attention"
    if not has_layers(model_type):
        made = "make each of these sparse by itself"
        if find_composed(model_type) is not None:
            made = "sparse_hf.sparsify makes the text of a loaded one sparse, which save_pretrained keeps"
        return f"it has no layers of its own, and the models within it have: {made}"
    config = CONFIG_MAPPING[model_type].__module__
    spec = importlib.util.find_spec(config.replace(".configuration_", ".modeling_"))
    if spec is None:
        return "Transformers has no model class for it"
    more = OFF_THE_INTERFACE.get(model_type)
    found = "it computes attention by itself, not through Transformers' attention interface"
    return f"{found}, so no pattern can reach it" if more is None else f"{found}, and {more}"
