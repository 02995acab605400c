"""Transformers' Auto classes of models, and the dense classes that each knows by name."""

from __future__ import annotations

from functools import lru_cache

from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass


@lru_cache(maxsize=1)
def auto_classes() -> tuple[type[_BaseAutoModelClass], ...]:
    """Every Auto class that finds a model by its configuration."""
    found = (v for v in vars(modeling_auto).values() if isinstance(v, type) and issubclass(v, _BaseAutoModelClass))
    return tuple(auto for auto in found if getattr(auto, "_model_mapping", None) is not None)


def known_names(auto: type[_BaseAutoModelClass], dense_type: str) -> tuple[str, ...]:
    """Names of the dense classes that an Auto class knows for a model type, the one that it takes by default first."""
    # the table of names; looking a class up in `_model_mapping` would import its module
    names: dict[str, str | tuple[str, ...]] = getattr(auto._model_mapping, "_model_mapping", {})
    found = names.get(dense_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def head_names(dense_type: str, prefix: str) -> list[str]:
    """Names of the sparse classes of a family, in the order in which they are registered.

    Args:
        prefix: what its dense classes begin with; a family of another module may borrow the configuration.
    """
    names = (name for auto in auto_classes() for name in known_names(auto, dense_type) if name.startswith(prefix))
    return [f"Sparse{name}" for name in dict.fromkeys(names)]
