"""The stubs say what there is: they are those that would be written now, and list what `dir` does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import transformers

import sparse_hf
from tests import stubs

WRITTEN_WITH = re.search(r"^transformers==(.+)$", (Path(__file__).parents[1] / "constraints.txt").read_text(), re.M)[1]


def declared(path: Path) -> set[str]:
    """Names that a stub gives to those who import it."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            # `import x as x` hands a name on, `import x` does not
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
    return names


@pytest.mark.skipif(transformers.__version__ != WRITTEN_WITH, reason="written with another version of Transformers")
@pytest.mark.parametrize("path", stubs.STUBS, ids=lambda path: path.parent.name)
def test_stubs_are_those_that_would_be_written(path):
    assert path.read_text(encoding="utf-8") == stubs.formatted(stubs.STUBS[path](), path), "python -m tests.stubs"


@pytest.mark.skipif(transformers.__version__ != WRITTEN_WITH, reason="written with another version of Transformers")
@pytest.mark.parametrize("package", [sparse_hf, sparse_hf.models], ids=lambda package: package.__name__)
def test_stubs_name_what_dir_does(package):
    path = Path(package.__file__).with_suffix(".pyi")
    assert sorted(declared(path)) == dir(package)
    assert set(package.__all__) <= set(dir(package))


def test_dir_shows_no_internals():
    shown = {*dir(sparse_hf), *dir(sparse_hf.models)} - {"__version__"}
    assert not [name for name in shown if name.startswith("_")]
    assert not shown & {
        "announce",
        "import_module",
        "TYPE_CHECKING",
        "registry",
        "hf",
        "dense_families",
        "testing",
        "cli",
    }


def test_the_package_says_that_it_has_types():
    assert (stubs.PACKAGE / "py.typed").exists()
