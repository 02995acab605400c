"""From the name of a sparse class to the family that it belongs to."""

from __future__ import annotations

import transformers
from transformers import PreTrainedConfig

from ... import registry
from .entry import configurations, find_entry


def derive_class(name: str) -> None:
    """Have the family derived that a class of this name would belong to, if there is one."""
    for model_type in _model_types(name.removeprefix("Sparse")):
        entry = find_entry(model_type)
        if entry is not None:
            registry.derive(entry)
            return


def _model_types(dense: str) -> list[str]:
    """The model types that a dense class of this name might belong to, the likeliest first."""
    # a class of Transformers says it itself
    known = getattr(transformers, dense, None)
    config = getattr(known, "config_class", known)
    if isinstance(config, type) and issubclass(config, PreTrainedConfig):
        return [config.model_type]
    # others stand in a modelling file alone: their names begin as that of the configuration does
    alike = {t: c.removesuffix("Config") for t, c in configurations().items()}
    found = [t for t, prefix in alike.items() if dense.startswith(prefix)]
    return sorted(found, key=lambda model_type: -len(alike[model_type]))[:1]
