"""Sparse attention for Transformers: one pattern language, every pattern exact on every backend.

Importing this enters the sparse model types in Transformers' table of configurations and patches nothing. What is named
here is imported when it is first asked for, and so is each family of models.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .registry import MODELS, announce, entry_of_class
from .version import __version__

if TYPE_CHECKING:
    from .attention import sparse_attention
    from .conversion import convert
    from .models import *  # noqa: F403
    from .pattern import *  # noqa: F403
    from .plan import BlockPlan, build_plan

_PACKAGES = ("attention", "conversion", "models", "pattern", "plan")
# where a name is that is not of the language of patterns
_PLACES = {
    "BlockPlan": "plan",
    "build_plan": "plan",
    "convert": "conversion",
    "sparse_attention": "attention",
    **dict.fromkeys(MODELS, "models"),
}

announce()


def __getattr__(name: str):
    if name == "__all__":
        named = [*_PLACES, *_package("models").__all__, *_package("pattern").__all__]
        return ["__version__", *dict.fromkeys(named)]
    if name in _PACKAGES:
        return _package(name)
    place = "models" if entry_of_class(name) else _PLACES.get(name)
    if place is None and (name.startswith("_") or name not in _package("pattern").__all__):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_package(place or "pattern"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *__getattr__("__all__")})


def _package(name: str):
    return import_module(f".{name}", __name__)
