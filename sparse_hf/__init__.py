"""Sparse attention for Transformers: one pattern language, every pattern exact on every backend.

Importing this enters the sparse model types in Transformers' table of configurations and patches nothing. What is named
here is imported when it is first asked for, and so is each family of models; `__init__.pyi` lists the names.
"""

from importlib import import_module

from . import registry
from .models.names import PUBLIC  # and the families are entered
from .version import __version__

_PACKAGES = ("attention", "conversion", "evaluation", "models", "pattern", "plan")
# public names -> their package, but for those of the pattern language and the classes of the families
_PACKAGE_OF = {
    "BlockPlan": "plan",
    "build_plan": "plan",
    "convert": "conversion",
    "evaluate": "evaluation",
    "push_to_hub": "conversion",
    "tune": "evaluation",
    "mass_left_out": "attention",
    "sparse_attention": "attention",
    **dict.fromkeys(PUBLIC, "models"),
}

registry.announce()


def __getattr__(name: str):
    if name == "__all__":
        return _public()
    if name in _PACKAGES:
        return _package(name)
    package = _PACKAGE_OF.get(name, "models" if name.startswith("Sparse") else None)
    if package is None and (name.startswith("_") or name not in _package("pattern").__all__):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_package(package or "pattern"), name)


def __dir__() -> list[str]:
    return sorted({*_PACKAGES, *_public()})


def _public() -> list[str]:
    named = [*_PACKAGE_OF, *_package("models").__all__, *_package("pattern").__all__]
    return ["__version__", *dict.fromkeys(named)]


def _package(name: str):
    return import_module(f".{name}", __name__)
