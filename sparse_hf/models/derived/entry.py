"""Families that are no entry of the table: found by their model type when somebody asks for them.

Nothing here imports torch or Transformers before a model type is looked up.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ...registry import Entry

# model types that worked when all were tried, written by `make zoo`
WORKED = Path(__file__).parent / "worked.json"
# what a modelling file calls that hands its attention to Transformers' interface
INTERFACE = ".get_interface("
# what configurations call the number of their layers
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks", "encoder_layers", "layers")
# and lists with the kind of each
KINDS = ("layer_types", "layers_block_type", "block_types")
# the configuration of the text within a model of several
TEXT = "text_config"


@dataclass(frozen=True)
class DerivedFamily(Entry):
    """A dense family of Transformers that is derived without a line of ours, and checked when it is made sparse.

    Its classes are attributes of `sparse_hf.models.derived_families`.

    Attributes:
        prefix: the name of its configuration class, without `Config`.
        is_composed: has it no layers of its own, and a text among the models within it?
    """

    dense_type: str
    prefix: str
    is_composed: bool = False
    module: str = "sparse_hf.models.derived_families"

    @property
    def sparse_type(self) -> str:
        return sparse_type(self.dense_type)

    def derive(self) -> None:
        if self.is_composed:
            import_module(".composed", __package__).derive_composed(self)
        else:
            import_module(".derive", __package__).derive(self)


def sparse_type(dense_type: str) -> str:
    return f"sparse_{dense_type}".replace("-", "_")


@cache
def find_entry(model_type: str) -> DerivedFamily | None:
    """The family of a dense or sparse model type that Transformers routes through its attention interface; None if it does not."""
    dense_type = dense_types().get(model_type, model_type)
    names = configurations()
    if dense_type not in names:
        return None
    is_composed = not has_layers(dense_type)
    if TEXT not in dense_config_class(dense_type).sub_configs if is_composed else not calls_interface(dense_type):
        return None
    return DerivedFamily(dense_type, names[dense_type].removesuffix("Config"), is_composed)


def derived_types() -> list[str]:
    """The dense model types that are no entry of the table, and worked when all of them were tried (`docs/zoo.md`).

    Others are tried when they are first met, and either work or are refused with what was seen.

    Examples:
        >>> "jamba" in derived_types()
        True
    """
    return json.loads(WORKED.read_text(encoding="utf-8"))["types"]


@cache
def dense_types() -> dict[str, str]:
    """Sparse model type -> dense model type, of all that Transformers knows."""
    return {sparse_type(name): name for name in configurations()}


def configurations() -> dict[str, str]:
    """Model type -> the name of its configuration class."""
    return dict(_table().CONFIG_MAPPING_NAMES)


def dense_config_class(dense_type: str) -> Any:
    """The configuration class of a model type of Transformers. Its own table would ask us first."""
    module = import_module(f"transformers.models.{_table().model_type_to_module_name(dense_type)}")
    name = configurations()[dense_type]
    return getattr(module, name) if hasattr(module, name) else getattr(import_module("transformers"), name)


def calls_interface(dense_type: str) -> bool:
    """Does the modelling file of a model type speak of Transformers' attention interface? Read off its source."""
    try:
        name = dense_config_class(dense_type).__module__.replace(".configuration_", ".modeling_")
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, AttributeError):
        return False
    return spec is not None and spec.origin is not None and INTERFACE in Path(spec.origin).read_text(encoding="utf-8")


def has_layers(dense_type: str) -> bool:
    """Has a model type layers of its own? A model of several, of text and images, has those of the models within it."""
    config_class = dense_config_class(dense_type)
    if not config_class.sub_configs:
        return True
    fields = {*config_class.__dataclass_fields__, *(config_class.attribute_map or {})}
    return not fields.isdisjoint(LAYERS)


def _table() -> Any:
    return import_module("transformers.models.auto.configuration_auto")
