"""What `trust_remote_code=True` needs beside the weights, to load them where nobody wrote `import sparse_hf`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...version import HOW_TO_INSTALL
from .auto_classes import auto_classes, known_names

MODULE = "modeling_sparse_hf"
CONTENT = '''\
"""{sparse_type}: {dense_type} with sparse attention, by the package sparse_hf.

Transformers runs this file with `trust_remote_code=True`. All it does is to name the classes, which are in the package;
`import sparse_hf` before loading does the same without it.
"""

# within `try`, so that Transformers does not tell people to install whatever an index has under this name
try:
    from sparse_hf.models import (
{imports}
    )
except ModuleNotFoundError as error:
    if error.name != "sparse_hf":
        raise
    raise ImportError({install!r}) from error

__all__ = [
{listed}
]
'''


@dataclass(frozen=True)
class RemoteCode:
    """The classes of a family by name, for folders that are loaded with `trust_remote_code=True`.

    Attributes:
        architectures: dense class name -> sparse class name.
    """

    dense_type: str
    sparse_type: str
    config_class: str
    architectures: Mapping[str, str]

    def auto_map(self, chosen: Sequence[str] | None) -> dict[str, str]:
        """What `config.json` says to Transformers: the class of each Auto class, in the file that `write` writes.

        An Auto class that knows several heads of a family gives the one among `chosen`, the configuration's `architectures`, or the
        one that its own mapping lists first.
        """
        found = {"AutoConfig": self.config_class}
        for auto in auto_classes():
            names = known_names(auto, self.dense_type)
            heads = [self.architectures[name] for name in names if name in self.architectures]
            if heads and not auto.__name__.startswith("_"):
                found[auto.__name__] = next((name for name in heads if name in (chosen or ())), heads[0])
        return {auto: f"{MODULE}.{name}" for auto, name in found.items()}

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file of which `auto_map` speaks; it imports the package and holds no code of its own.

        Transformers can carry no package with a checkpoint, and without this one the file says how it is installed.
        """
        path = Path(folder) / f"{MODULE}.py"
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(self._content(), encoding="utf-8")
        os.replace(partial, path)
        return path

    def _content(self) -> str:
        names = sorted([self.config_class, *self.architectures.values()])
        return CONTENT.format(
            sparse_type=self.sparse_type,
            dense_type=self.dense_type,
            imports="\n".join(f"        {name}," for name in names),
            install=HOW_TO_INSTALL,
            listed="\n".join(f'    "{name}",' for name in names),
        )


def auto_map(config: Any) -> dict[str, str]:
    """`RemoteCode.auto_map` of a sparse configuration."""
    return config.remote_code.auto_map(config.architectures)
