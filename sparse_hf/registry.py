"""Registry: families and attention functions by name, before any is made, and their entry in Transformers' tables.

Deriving all families means importing torch and thirty modelling files, which takes several times as long as
`import transformers`. So names are entered, and a family is derived when its configuration or one of its classes is first
asked for. Nothing here imports torch or Transformers.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import RLock
from types import ModuleType
from typing import Any

# the modules of Transformers that hold the table of configurations, that of attention functions, and names of caches
CONFIGURATIONS = "transformers.models.auto.configuration_auto"
ATTENTION = "transformers.modeling_utils"
CACHES = "transformers.generation.configuration_utils"


class Entry(ABC):
    """A family by name.

    Attributes:
        prefix: what its sparse classes are called after `Sparse`.
        dense_type: the model type in Transformers.
        sparse_type: the model type in saved folders.
        module: the module that has its sparse classes as attributes.
    """

    prefix: str
    dense_type: str
    sparse_type: str
    module: str

    @abstractmethod
    def derive(self) -> None:
        """Make the sparse classes and register them with Transformers."""


# every family that can be derived, in the order of entering; filled by `enter`
ENTRIES: list[Entry] = []
# names of attention functions -> the module that registers them when it is imported; filled by `enter_attention`
ATTENTION_NAMES: dict[str, str] = {}
# names of caches that `cache_implementation` may say; filled by `enter_cache`
CACHE_IMPLEMENTATIONS: list[str] = []
# modules that look up families which nobody entered; filled by `enter_finder`
FINDERS: list[str] = []
# families that are derived or being derived; whichever thread asks first does it, and others wait
_DERIVED: set[str] = set()
_DERIVING = RLock()


def enter(entries: Iterable[Entry]) -> None:
    """Make families known by name."""
    ENTRIES.extend(entries)


def enter_finder(module: str) -> None:
    """Have families looked up that are not entered, by the function `find_entry` of a module, which is imported then."""
    FINDERS.append(module)


def find_entry(model_type: str) -> Entry | None:
    """The family of a dense or sparse model type that nobody entered; None if nobody finds one."""
    entries = (import_module(module).find_entry(model_type) for module in FINDERS)
    found = next((entry for entry in entries if entry is not None), None)
    return None if found is None or any(entry.dense_type == found.dense_type for entry in ENTRIES) else found


def enter_attention(names: Iterable[str], module: str) -> None:
    """Make attention functions known by name, which `module` registers with Transformers when it is imported."""
    ATTENTION_NAMES.update(dict.fromkeys(names, module))


def enter_cache(name: str) -> None:
    """Make a name known that `cache_implementation` may say, and that sparse models know the cache of."""
    CACHE_IMPLEMENTATIONS.append(name)


def entry_of_class(name: str) -> Entry | None:
    """The family that a class of this name would belong to: `SparseQwen3MoeModel` is Qwen3Moe's, not Qwen3's."""
    found = [entry for entry in ENTRIES if name.startswith(f"Sparse{entry.prefix}")]
    return max(found, key=lambda entry: len(entry.prefix), default=None)


def derive(entry: Entry) -> None:
    """Have a family derived, once."""
    with _DERIVING:
        if entry.dense_type not in _DERIVED:
            _DERIVED.add(entry.dense_type)
            try:
                entry.derive()
            except BaseException:
                _DERIVED.discard(entry.dense_type)
                raise


def sparse_class(name: str) -> Any:
    """The sparse class of this name, whose family is derived now if it has not been before.

    Raises:
        AttributeError: no family has such a class.
    """
    entry = entry_of_class(name)
    if entry is None:
        raise AttributeError(f"no family of sparse_hf has a class {name!r}")
    return getattr(import_module(entry.module), name)


class LazyTable(UserDict):
    """A table in which an `Entry` stands for what it registers under the same key when it is derived.

    Families that nobody entered are found when they are asked for, and listed from then on.
    """

    def __init__(self, entries: Mapping[str, Any], name: str):
        """`name` is the attribute of an entry that is its key."""
        super().__init__(entries)
        self.name = name

    def __contains__(self, key):
        return key in self.data or self._found(key) is not None

    def __getitem__(self, key):
        value = self.data[key] if key in self.data else self._found(key)
        if value is None:
            raise KeyError(key)
        if isinstance(value, Entry):
            derive(value)
            value = self.data[key]
        return value

    def _found(self, key: Any) -> Entry | None:
        entry = find_entry(key) if isinstance(key, str) else None
        return entry if entry is not None and getattr(entry, self.name) == key else None

    def derived(self) -> dict[str, Any]:
        """What has been derived so far."""
        return {key: value for key, value in self.data.items() if not isinstance(value, Entry)}


def announce() -> None:
    """Enter the sparse model types and attention functions in Transformers' tables, now or when Transformers makes them."""
    for name, enter_in in TABLES.items():
        if name in sys.modules:
            enter_in(sys.modules[name])
        elif not any(isinstance(hook, _TableHook) and hook.name == name for hook in sys.meta_path):
            sys.meta_path.insert(0, _TableHook(name, enter_in))


def _enter_configurations(configurations: ModuleType) -> None:
    table = configurations.CONFIG_MAPPING
    # what was registered beside Transformers' own; `register` would want the classes
    if not isinstance(table._extra_content, LazyTable):
        table._extra_content = LazyTable(
            {entry.sparse_type: entry for entry in ENTRIES} | table._extra_content, "sparse_type"
        )


def _enter_attention(modeling: ModuleType) -> None:
    table = modeling.AttentionInterface
    for name in ATTENTION_NAMES:
        if name not in table._global_mapping:
            table.register(name, partial(_attention, modeling, name))


def _enter_caches(configuration: ModuleType) -> None:
    known = configuration.ALL_CACHE_IMPLEMENTATIONS
    added = tuple(name for name in CACHE_IMPLEMENTATIONS if name not in known)
    vars(configuration)["ALL_CACHE_IMPLEMENTATIONS"] = known + added


def _attention(modeling: ModuleType, name: str, *args, **kwargs) -> Any:
    """Stand for an attention function until its module is imported."""
    import_module(ATTENTION_NAMES[name])
    return modeling.AttentionInterface._global_mapping[name](*args, **kwargs)


# modules of Transformers -> what enters ours in their tables
TABLES: dict[str, Callable[[ModuleType], None]] = {
    CONFIGURATIONS: _enter_configurations,
    ATTENTION: _enter_attention,
    CACHES: _enter_caches,
}


class ImportHook(MetaPathFinder):
    """Finds modules that are waited for as others find them, and enters what is ours after they were executed."""

    @abstractmethod
    def awaits(self, name: str) -> bool:
        """Whether a module of this name is waited for."""

    @abstractmethod
    def enter_in(self, module: ModuleType) -> None:
        """Enter what is ours in a module that was just executed."""

    def find_spec(self, name, path=None, target=None):
        if not self.awaits(name):
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: ModuleSpec | None = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(self, spec, spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, hook: ImportHook, spec: ModuleSpec, loader: Loader):
        self.hook, self.spec, self.loader = hook, spec, loader

    def __getattr__(self, name: str):
        # sources and resources, for those who inspect the module without importing it
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.hook.enter_in(module)


class _TableHook(ImportHook):
    """Waits for the module of one table."""

    def __init__(self, name: str, enter: Callable[[ModuleType], None]):
        self.name, self.enter = name, enter

    def awaits(self, name: str) -> bool:
        return name == self.name

    def enter_in(self, module: ModuleType) -> None:
        self.enter(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
