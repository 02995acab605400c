"""Tables by name: where Transformers and libraries on top of it find things by model type or class name.

A sparse class is a subclass of a dense one, which is enough where a library asks `isinstance`. Where it looks a name up, in
the tables below, a model of type `sparse_llama` would be a stranger: Trainer would smooth its labels without shifting them,
PEFT would find no expert in it. So every name of a family is entered beside the dense one, with what the dense one has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.auto_mappings import SPECIAL_MODEL_TYPE_TO_MODULE_NAME
from transformers.models.auto.configuration_auto import model_type_to_module_name

from ...registry import ImportHook

# how Transformers names its tables of class names, and peft its tables of modules to adapt
CLASS_NAMES, TARGET_MODULES = "_MAPPING_NAMES", "TRANSFORMERS_MODELS_TO_"


@dataclass(frozen=True)
class Names:
    """What a family is called, and its classes, dense class -> sparse class."""

    dense_type: str
    config_class: type[PreTrainedConfig]
    classes: Mapping[type, type]

    @property
    def sparse_type(self) -> str:
        return self.config_class.model_type

    def copy_entry(self, table: Any) -> None:
        """Enter the sparse type of a table by model types, with what the dense one has."""
        if self.dense_type in table:
            table[self.sparse_type] = table[self.dense_type]


def enter_names(dense_type: str, config_class: type[PreTrainedConfig], classes: Mapping[type, type]) -> None:
    """Enter a family's names in every table, now or as soon as anybody imports the module that holds it."""
    names = Names(dense_type, config_class, classes)
    # where the modules of a model type are, which the tables of classes ask for
    SPECIAL_MODEL_TYPE_TO_MODULE_NAME[names.sparse_type] = model_type_to_module_name(dense_type)
    for module, enter in TABLES.items():
        if module in sys.modules:
            enter(sys.modules[module], names)
        else:
            _AWAITED.setdefault(module, []).append(names)
    if _AWAITED and not any(isinstance(hook, _NamesHook) for hook in sys.meta_path):
        sys.meta_path.insert(0, _NamesHook())


def _enter_attributes(transformers: ModuleType, names: Names) -> None:
    """`getattr(transformers, config.architectures[0])`, by which servers and TRL find a class."""
    # importing its processors makes Transformers run its `__init__` again, so that modules imported before hold another object
    held = (vars(module).get("transformers") for module in list(sys.modules.values()) if isinstance(module, ModuleType))
    copies = {id(copy): copy for copy in held if isinstance(copy, ModuleType) and copy.__name__ == "transformers"}
    for copy in (transformers, *copies.values()):
        for made in (names.config_class, *names.classes.values()):
            setattr(copy, made.__name__, made)


def _enter_models(module: ModuleType, names: Names) -> None:
    """Class names of models by type: Trainer, pipelines, model cards and lm-eval ask for both."""
    sparse = {dense.__name__: made.__name__ for dense, made in names.classes.items()}
    for table in _tables(module, CLASS_NAMES):
        found = table.get(names.dense_type)
        known = tuple(sparse[name] for name in ([found] if isinstance(found, str) else found or ()) if name in sparse)
        if known:
            table[names.sparse_type] = known[0] if isinstance(found, str) else known


def _enter_processors(module: ModuleType, names: Names) -> None:
    """Classes of tokenizers and processors, by type and by configuration."""
    for table in _tables(module, CLASS_NAMES):
        by_config: Any = getattr(table, "_model_mapping", None)
        # the table of configurations, which lies beside, is not one of these
        if by_config is not None and names.dense_type in table:
            names.copy_entry(table)
            by_config._reverse_config_mapping[names.config_class.__name__] = names.sparse_type
    # types whose folders declare a wrong class
    misdeclared: set[str] = getattr(module, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    if names.dense_type in misdeclared:
        misdeclared.add(names.sparse_type)


def _enter_scales(module: ModuleType, names: Names) -> None:
    """Activations that AWQ scales."""
    names.copy_entry(_table(module, "AWQ_SCALES_MAPPINGS"))


def _enter_responses(module: ModuleType, names: Names) -> None:
    """How `transformers serve` reads tool calls and reasoning, by tuples of model types."""
    table = _table(module, "_RESPONSE_TEMPLATE_FALLBACKS")
    for types in [types for types in table if names.dense_type in types and names.sparse_type not in types]:
        # in the same place, since the first that fits is taken
        entries = {(*key, names.sparse_type) if key == types else key: value for key, value in table.items()}
        table.clear()
        table.update(entries)


def _enter_targets(module: ModuleType, names: Names) -> None:
    """Modules that peft adapts by default."""
    for table in [value for name, value in vars(module).items() if name.startswith(TARGET_MODULES)]:
        names.copy_entry(table)


def _enter_experts(module: ModuleType, names: Names) -> None:
    """Experts that peft knows by the names that they had before Transformers merged them."""
    names.copy_entry(_table(module, "_MODEL_TO_CONVERSION_PATTERN"))


def _enter_encoders(module: ModuleType, names: Names) -> None:
    """Encoders that Sentence Transformers loads without their decoder: the first whose configuration fits."""
    table: list[tuple[type, str, str]] = getattr(module, "_ENCODER_ONLY_MODELS", [])
    for config, path, name in list(table):
        if config in names.config_class.__bases__:
            made = names.classes.get(getattr(import_module(path), name))
            if made is not None:
                table.insert(0, (names.config_class, made.__module__, made.__name__))


# module -> what enters a family's names in its tables
TABLES: dict[str, Callable[[ModuleType, Names], None]] = {
    "transformers": _enter_attributes,
    "transformers.models.auto.modeling_auto": _enter_models,
    "transformers.models.auto.tokenization_auto": _enter_processors,
    "transformers.models.auto.image_processing_auto": _enter_processors,
    "transformers.models.auto.video_processing_auto": _enter_processors,
    "transformers.models.auto.feature_extraction_auto": _enter_processors,
    "transformers.models.auto.processing_auto": _enter_processors,
    "transformers.integrations.awq": _enter_scales,
    "transformers.cli.serving.utils": _enter_responses,
    "peft.utils.constants": _enter_targets,
    "peft.utils.transformers_weight_conversion": _enter_experts,
    "sentence_transformers.base.modules.transformer": _enter_encoders,
}
# module that nobody has imported yet -> families that wait for it
_AWAITED: dict[str, list[Names]] = {}


def _table(module: ModuleType, name: str) -> dict:
    """A table that a module of another version need not have."""
    return getattr(module, name, {})


def _tables(module: ModuleType, ending: str) -> Iterable[Any]:
    return [value for name, value in vars(module).items() if name.endswith(ending) and isinstance(value, dict)]


class _NamesHook(ImportHook):
    """Enters the names that wait for a module in its tables."""

    def awaits(self, name: str) -> bool:
        return name in _AWAITED

    def enter_in(self, module: ModuleType) -> None:
        for names in _AWAITED.pop(module.__name__, ()):
            TABLES[module.__name__](module, names)
