"""Families known by name: found by the Auto classes in any order of imports, and derived when they are asked for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

import sparse_hf
from sparse_hf.registry import ENTRIES, MODELS, entry_of_class
from tests.processes import printed

PACKAGE = Path(sparse_hf.__file__).parent


@pytest.mark.parametrize(
    "first",
    [
        "import importlib.util, sparse_hf; importlib.util.find_spec('transformers.models.auto.configuration_auto')",
        "import importlib, sparse_hf; from transformers import LlamaForCausalLM; importlib.reload(sparse_hf)",
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM; import sparse_hf",
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
    assert printed(code) == "SparseLlamaForCausalLM llama"


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
    assert printed(code) == "OneConfig TwoConfig 2 SparseBertConfig"


def test_entries_are_what_the_modules_derive():
    models = PACKAGE / "models"
    texts = {
        ".".join(path.relative_to(models).with_suffix("").parts): path.read_text() for path in models.rglob("*.py")
    }
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
