"""Which Auto class loads a folder as what it was saved as."""

from __future__ import annotations

from pathlib import Path

from ..models import family_of
from ..models.hf.auto_classes import auto_classes, known_names
from .carry import read_json

# they are asked first, of what several know
FIRST = ("AutoModel", "AutoModelForCausalLM")
# they know classes that others know under a better name
LAST = ("AutoModelForPreTraining", "AutoModelWithLMHead")


def auto_class(folder: Path) -> str:
    """The name of the Auto class for the first of a folder's architectures; "AutoModel" where none is named or known."""
    config = read_json(folder / "config.json")
    dense_type = config["model_type"]
    if dense_type.startswith("sparse_"):
        dense_type = family_of(dense_type).dense_type
    named = [name.removeprefix("Sparse") for name in config.get("architectures") or ()]
    found = [auto.__name__ for auto in auto_classes() if named and named[0] in known_names(auto, dense_type)]
    return min(found, key=lambda name: (name in LAST, name not in FIRST), default="AutoModel")
