"""What `trust_remote_code=True` needs beside the weights, to load them where nobody wrote `import sparse_hf`."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedConfig

from .register import Family, _auto_classes, family_of

MODULE = "modeling_sparse_hf"
CONTENT = '''\
"""{sparse_type}: {dense_type} with sparse attention, by the package sparse_hf (pip install sparse-hf).

Transformers runs this file with `trust_remote_code=True`. All it does is to name the classes, which are in the package;
`import sparse_hf` before loading does the same without it.
"""

from sparse_hf.models import (
{imports}
)

__all__ = [
{listed}
]
'''


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """What `config.json` says to Transformers: the class of each Auto class, in the file that `write_remote` writes.

    An Auto class that knows several heads of a family gives the one that the configuration's `architectures` name, or the
    one that its own mapping lists first.
    """
    family = family_of(config.model_type)
    found = {"AutoConfig": family.config_class.__name__}
    for auto in _auto_classes():
        names = auto._model_mapping._model_mapping.get(family.dense_type, ())
        heads = [name for name in ((names,) if isinstance(names, str) else names) if name in family.architectures]
        if heads and not auto.__name__.startswith("_"):
            sparse = [family.architectures[name] for name in heads]
            found[auto.__name__] = next((name for name in sparse if name in (config.architectures or ())), sparse[0])
    return {auto: f"{MODULE}.{name}" for auto, name in found.items()}


def write_remote(folder: str | Path, config: PreTrainedConfig) -> Path:
    """Write the file of which `auto_map` speaks; it imports the package and holds no code of its own.

    Transformers can carry no package with a checkpoint, and without this one it says which to install.
    """
    path = Path(folder) / f"{MODULE}.py"
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(_content(family_of(config.model_type)), encoding="utf-8")
    os.replace(partial, path)
    return path


def _content(family: Family) -> str:
    names = sorted([family.config_class.__name__, *(c.__name__ for c in family.classes)])
    return CONTENT.format(
        sparse_type=family.sparse_type,
        dense_type=family.dense_type,
        imports="\n".join(f"    {name}," for name in names),
        listed="\n".join(f'    "{name}",' for name in names),
    )
