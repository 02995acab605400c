"""Who may import whom: a table, compared with the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.processes import finished, printed

PACKAGE = Path(__file__).parent.parent / "sparse_hf"
# module -> the modules of ours that it may import
ALLOWED = {
    "pattern": set(),
    "plan": {"pattern"},
    "attention": {"plan", "pattern"},
    "parallel": {"attention", "plan", "pattern"},
    "models": {"attention", "plan", "pattern", "registry", "version"},
    "analysis": {"plan", "pattern", "units"},
    "conversion": {"analysis", "models", "plan", "pattern", "version"},
    "bench": {"train", "models", "attention", "plan", "pattern", "units"},
    "evaluation": {"attention", "bench", "models", "plan", "pattern", "units"},
    "train": {"models", "parallel", "attention", "plan", "pattern"},
    "testing": set(),
    "registry": set(),
    "units": set(),
    "version": set(),
    # the command line imports the faces of packages alone
    "cli": {
        "sparse_hf",
        "FAMILIES",
        "derived_types",
        "analysis",
        "conversion",
        "bench",
        "evaluation",
        "models",
        "train",
        "units",
        "version",
    },
    "__main__": {"cli"},
    "__init__": {"attention", "conversion", "evaluation", "models", "pattern", "plan", "registry", "version"},
}
NO_TRANSFORMERS = {"pattern", "plan", "attention", "parallel", "analysis", "testing", "registry", "units"}
BACKENDS = {"reference", "blockwise", "flex", "flash", "triton"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, relative ones made absolute."""
    found = set()
    package = ("sparse_hf", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} if node.module else {f"{name}.{alias.name}" for alias in node.names}
    return found


def test_every_module_is_in_the_table():
    modules = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert modules - {"__pycache__"} == set(ALLOWED)


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_follow_the_table(module):
    target = PACKAGE / module
    files = target.rglob("*.py") if target.is_dir() else [PACKAGE / f"{module}.py"]
    for file in files:
        for name in imports(file):
            top, _, rest = name.partition(".")
            if top == "sparse_hf":
                ours = rest.split(".")[0] or "sparse_hf"
                assert ours == module or ours in ALLOWED[module], f"{file.name} imports {name}"
            if module in NO_TRANSFORMERS:
                assert top != "transformers", f"{file.name} imports transformers"
            if module == "pattern":
                assert not name.startswith("torch.nn"), f"{file.name} imports {name}"


def test_backends_do_not_import_each_other():
    for name in BACKENDS:
        place = PACKAGE / "attention" / "backends" / name
        others = tuple(f"sparse_hf.attention.backends.{other}" for other in BACKENDS - {name})
        for file in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            assert not [found for found in imports(file) if found.startswith(others)], file


def test_importing_loads_neither_torch_nor_transformers():
    code = "import sys, sparse_hf; print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    # one that was started: others have torch before
    assert finished("-c", code) == (0, "[]\n")


def test_all_families_load_only_torch_and_transformers():
    heavy = ["datasets", "evaluate", "accelerate", "peft", "matplotlib", "typer", "gguf"]
    # the model classes of Transformers load what they need themselves
    code = f"""
import sys, torch
from transformers import AutoModel, BertModel, LlamaForCausalLM
before = set(sys.modules)
from sparse_hf import *
print([m for m in {heavy} if m in set(sys.modules) - before], SparseBertModel.__name__)
"""
    assert printed(code) == "[] SparseBertModel"
