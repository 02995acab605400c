"""The stubs `__init__.pyi`, from which editors and type checkers know names that are looked up when they are asked for.

`python -m tests.stubs` writes them: after a family, a head or a public name has come or gone, or with another version of Transformers
in `constraints.txt`. It stands here because nothing of it belongs into the installed package.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import sparse_hf
from sparse_hf import models

PACKAGE = Path(sparse_hf.__file__).parent
HEAD = '"""Written by `python -m tests.stubs`, see there."""\n'
# what every sparse configuration takes beside its fields
ARGUMENTS = """\
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()
"""


def of_models() -> str:
    """`sparse_hf/models/__init__.pyi`: a class for each that is derived, an import for what a module defines."""
    imports: dict[str, set[str]] = defaultdict(set)
    for name, module in models.PUBLIC.items():
        imports[f".{module}"].add(f"{name} as {name}")
    imports[".hf.layer_spec"].add("LayersLike")
    imports["..pattern.like"].add("PatternLike")
    classes = []
    # families that were derived in this process, or are a test's own, are no names of the package
    listed = [family for family in models.FAMILIES.values() if family.config_class.__name__ in models.__all__]
    for family in listed:
        module = importlib.import_module(family.config_class.__module__)
        written = _written(module)
        for made in (family.config_class, *family.classes):
            # a configuration is declared anew, for the arguments that are no fields of it
            if made.__name__ in written and made is not family.config_class:
                imports[_relative(module.__name__)].add(f"{made.__name__} as {made.__name__}")
                continue
            for base in made.__bases__:
                imports[_relative(base.__module__)] |= {base.__name__} - set(models.PUBLIC)
            classes.append(_declared(made, family.config_class))
    lines = [
        HEAD,
        "from collections.abc import Sequence",
        "from dataclasses import InitVar, dataclass",
        "",
        *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())),
        "",
        _listed(models.__all__),
        *classes,
    ]
    return "\n".join(lines)


def of_package() -> str:
    """`sparse_hf/__init__.pyi`: where each public name is."""
    names = sparse_hf.__all__
    of_pattern = set(sparse_hf.pattern.__all__)
    places = {
        **sparse_hf._PACKAGE_OF,
        **dict.fromkeys(models.__all__, "models"),
        **dict.fromkeys(of_pattern, "pattern"),
    }
    imports: dict[str, list[str]] = {f".{package}": [] for package in sparse_hf._PACKAGES} | {
        ".version": ["__version__"]
    }
    for name, package in places.items():
        imports[f".{package}"].append(name)
    packages = ", ".join(f"{package} as {package}" for package in sparse_hf._PACKAGES)
    lines = [HEAD, f"from . import {packages}"]
    for module, found in sorted(imports.items()):
        lines.append(f"from {module} import {', '.join(f'{name} as {name}' for name in sorted(found))}")
    return "\n".join([*lines, "", _listed(names)])


def _declared(made: type, config_class: type) -> str:
    bases = ", ".join(base.__name__ for base in made.__bases__)
    if made is config_class:
        return f"@dataclass(kw_only=True)\nclass {made.__name__}({bases}):\n{ARGUMENTS}"
    return f"class {made.__name__}({bases}):\n    config: {config_class.__name__}\n"


def _written(module: ModuleType) -> set[str]:
    """Names of the classes that a module's source defines."""
    return {node.name for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)}


def _relative(module: str) -> str:
    return module.replace("sparse_hf.models", "", 1) if module.startswith("sparse_hf.models.") else module


def _listed(names: list[str]) -> str:
    return "__all__ = [\n" + "".join(f'    "{name}",\n' for name in names) + "]\n"


def formatted(text: str, path: Path) -> str:
    """The text as `make check` wants it."""
    for command in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        text = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path), "-"],
            input=text, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return text


# file -> what it holds
STUBS = {PACKAGE / "models" / "__init__.pyi": of_models, PACKAGE / "__init__.pyi": of_package}

if __name__ == "__main__":
    for path, text in STUBS.items():
        path.write_text(formatted(text(), path), encoding="utf-8")
