"""Who may import whom: the table of docs/ARCHITECTURE.md, read off the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

import sparse_hf
from sparse_hf.registry import ENTRIES, MODELS, entry_of_class

PACKAGE = Path(__file__).parent.parent / "sparse_hf"
# module -> the modules of ours that it may import
ALLOWED = {
    "pattern": set(),
    "plan": {"pattern"},
    "attention": {"plan"},
    "models": {"attention", "plan", "pattern", "registry"},
    "conversion": {"models", "plan", "pattern", "show", "version"},
    "bench": {"models", "attention", "plan", "pattern"},
    "train": {"models", "attention", "plan", "pattern"},
    "show": {"plan", "pattern"},
    "testing": set(),
    "registry": set(),
    "version": set(),
    "cli": {"sparse_hf", "conversion", "show", "bench", "version"},
    "__init__": {"attention", "conversion", "models", "pattern", "plan", "registry", "version"},
}
NO_TRANSFORMERS = {"pattern", "plan", "attention", "show", "testing"}
IMPLEMENTATIONS = {"reference", "blockwise", "flex", "fa", "triton", "regroup"}


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


def test_attention_implementations_do_not_import_each_other():
    for name in IMPLEMENTATIONS:
        others = {f"sparse_hf.attention.{other}" for other in IMPLEMENTATIONS - {name}}
        assert not imports(PACKAGE / "attention" / f"{name}.py") & others


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_neither_torch_nor_transformers():
    assert (
        run("import sys, sparse_hf; print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])") == "[]"
    )


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
    assert run(code) == "[] SparseBertModel"


@pytest.mark.parametrize(
    "first",
    [
        "import sparse_hf, sparse_hf",
        "from transformers import AutoConfig; import sparse_hf",
        "import transformers, sparse_hf; from transformers import LlamaForCausalLM",
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM; import sparse_hf",
        "import importlib, sparse_hf; importlib.reload(sparse_hf); sparse_hf.sparsify; importlib.reload(sparse_hf)",
        "import importlib.util, sparse_hf; importlib.util.find_spec('transformers.models.auto.configuration_auto')",
    ],
)
def test_auto_classes_find_a_family_and_derive_no_other(first):
    code = f"""
import sys
{first}
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
tiny = dict(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("sparse_llama", **tiny))
print(type(model).__name__, *(e.module for e in sparse_hf.registry.ENTRIES if e.module_name in sys.modules))
assert type(model) is sparse_hf.SparseLlamaForCausalLM and "sparse_t5" in CONFIG_MAPPING and "sparse_t5" in list(CONFIG_MAPPING)
assert not any("sparse_hf.registry" in str(type(finder)) for finder in sys.meta_path)
"""
    assert run(code) == "SparseLlamaForCausalLM llama"


def test_what_others_register_stays():
    code = """
from transformers import AutoConfig, BertConfig
class OneConfig(BertConfig): model_type = "one"
class TwoConfig(BertConfig): model_type = "two"
AutoConfig.register("one", OneConfig)
import sparse_hf
AutoConfig.register("two", TwoConfig)
from transformers import CONFIG_MAPPING
found = dict(CONFIG_MAPPING._extra_content)
print(found["one"].__name__, found["two"].__name__, len(found) - len(sparse_hf.registry.ENTRIES), found["sparse_bert"].__name__)
"""
    assert run(code) == "OneConfig TwoConfig 2 SparseBertConfig"


def test_entries_are_what_the_modules_derive():
    texts = {path.stem: path.read_text() for path in (PACKAGE / "models").glob("*.py")}
    files = {name for name, text in texts.items() if re.search(r"register_family\(\s*Sparse", text)}
    assert files == {entry.module for entry in ENTRIES}
    for entry in ENTRIES:
        family = sparse_hf.FAMILIES[entry.dense_type]
        assert (family.dense_type, family.sparse_type) == (entry.dense_type, entry.sparse_type)
        assert CONFIG_MAPPING[entry.sparse_type] is family.config_class
        names = sys.modules[entry.module_name].__all__
        assert names == [family.config_class.__name__, *(c.__name__ for c in family.classes)]
        assert all(entry_of_class(name) is entry for name in names)


def test_names_of_the_package():
    models = set(sparse_hf.models.__all__)
    assert set(MODELS) <= models and {"SparseQwen3MoeForCausalLM", "SparseQwen3Model"} <= models
    assert {*models, *sparse_hf.pattern.__all__, "sparse_attention", "convert", "build_plan", "BlockPlan"} < set(
        dir(sparse_hf)
    )
    for name in sparse_hf.__all__:
        assert getattr(sparse_hf, name) is not None
    assert sparse_hf.convert is sparse_hf.conversion.convert and set(sparse_hf.models.__all__) <= set(
        dir(sparse_hf.models)
    )


@pytest.mark.parametrize("name", ["nothing", "SparseNothing", "SparseBertForNothing", "__nothing__", "seam"])
def test_unknown_names_are_no_attributes(name):
    with pytest.raises(AttributeError, match=name):
        getattr(sparse_hf, name)
