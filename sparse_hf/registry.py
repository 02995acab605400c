"""The families by name, before any is derived, and how Transformers' table of configurations hears of them.

Deriving all families means importing torch and thirty modelling files, which takes several times as long as `import transformers`.
So names are entered, and a family is derived when its configuration or one of its classes is first asked for. Nothing here
imports torch or Transformers.
"""

from __future__ import annotations

import sys
from collections import UserDict
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import NamedTuple

# the module of Transformers that holds the table
CONFIGURATIONS = "transformers.models.auto.configuration_auto"
# what is public in `sparse_hf.models` beside the classes of the families
MODELS = (
    "FAMILIES",
    "Family",
    "Positions",
    "SparseConfigMixin",
    "SparseMixin",
    "StreamingCache",
    "dense_class",
    "family_of",
    "parse_layers",
    "register_family",
    "sparsify",
    "transformers_random_blocks",
)


class Entry(NamedTuple):
    """A family: a module of `sparse_hf.models`, what its classes are called after `Sparse`, and its model types."""

    module: str
    prefix: str
    dense_type: str
    sparse_type: str

    @property
    def module_name(self) -> str:
        return f"{__package__}.models.{self.module}"


def _entry(module: str, prefix: str, dense_type: str | None = None, sparse_type: str | None = None) -> Entry:
    return Entry(module, prefix, dense_type or module, sparse_type or f"sparse_{dense_type or module}")


ENTRIES = (
    _entry("albert", "Albert"),
    _entry("bart", "Bart"),
    _entry("bert", "Bert"),
    _entry("bigbird.modeling", "BigBird", dense_type="big_bird"),
    _entry("bigbird.pegasus", "BigBirdPegasus", dense_type="bigbird_pegasus", sparse_type="sparse_big_bird_pegasus"),
    _entry("camembert", "Camembert"),
    _entry("distilbert", "DistilBert"),
    _entry("electra", "Electra"),
    _entry("gemma2", "Gemma2"),
    _entry("gemma3", "Gemma3", dense_type="gemma3_text"),
    _entry("gpt2", "GPT2"),
    _entry("gpt_neox", "GPTNeoX"),
    _entry("longformer.led", "LED", dense_type="led"),
    _entry("llama", "Llama"),
    _entry("longformer.modeling", "Longformer", dense_type="longformer"),
    _entry("mbart", "MBart"),
    _entry("mistral", "Mistral"),
    _entry("mixtral", "Mixtral"),
    _entry("modernbert", "ModernBert"),
    _entry("opt", "OPT"),
    _entry("pegasus", "Pegasus"),
    _entry("perceiver.modeling", "Perceiver", dense_type="perceiver"),
    _entry("phi3", "Phi3"),
    _entry("qwen2", "Qwen2"),
    _entry("qwen3", "Qwen3"),
    _entry("qwen3_moe", "Qwen3Moe"),
    _entry("reformer.modeling", "Reformer", dense_type="reformer"),
    _entry("roberta", "Roberta"),
    _entry("smollm3", "SmolLM3"),
    _entry("t5", "T5"),
    _entry("xlm_roberta", "XLMRoberta", dense_type="xlm-roberta", sparse_type="sparse_xlm_roberta"),
)


def entry_of_class(name: str) -> Entry | None:
    """The family whose module would define a class of this name: `SparseQwen3MoeModel` is Qwen3Moe's, not Qwen3's."""
    found = [entry for entry in ENTRIES if name.startswith(f"Sparse{entry.prefix}")]
    return max(found, key=lambda entry: len(entry.prefix), default=None)


class LazyTable(UserDict):
    """A table in which the name of a module stands for what that module enters under the same key when it is imported."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if isinstance(value, str):
            import_module(value)
            value = super().__getitem__(key)
        return value


def announce() -> None:
    """Enter the sparse model types in Transformers' table of configurations, now or when Transformers makes it."""
    if CONFIGURATIONS in sys.modules:
        _enter(sys.modules[CONFIGURATIONS])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(configurations: ModuleType) -> None:
    table = configurations.CONFIG_MAPPING
    # what was registered beside Transformers' own; `register` would want the classes
    if not isinstance(table._extra_content, LazyTable):
        names = {entry.sparse_type: entry.module_name for entry in ENTRIES}
        table._extra_content = LazyTable({**names, **table._extra_content})


class _Finder(MetaPathFinder):
    """Finds the module of the table as others find it, and has it announced to after it was executed."""

    def find_spec(self, name, path=None, target=None):
        if name != CONFIGURATIONS:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None:
            spec.loader = _Loader(self, spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, finder: _Finder, loader: Loader):
        self.finder, self.loader = finder, loader

    def __getattr__(self, name: str):
        # sources and resources, for those who look without importing
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _enter(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
